"""What a second turn is worth that is told what to correct, beside the policy's own.

    python scripts/told.py --config=configs/evaluate.py:tiny --workdir=runs/told \\
        --config.init_from=runs/tiny/sft_self_correction --config.data.dir=runs/tiny/data

The policy answers every test chart, and its first turn is drawn. Then it writes a second turn
twice: once as it does by itself, and once *told*: the right thought, which cold start 2 would have
taught for this draft ("Fix columns 36+1=37 14."), stands at the beginning of its response already,
and the policy goes on behind it. First turns are the same in both. What is between turn 1 and the
told turn is what the policy makes of a diagnosis; what is between its own turn and the told one is
lost in reading the feedback. Behind both, what a corrector would gain that is always right.

A second table says of the policy's own second turns how many think what is right, and how many
of these do it: of first turns whose code is wrong, and of those that are to be left as they are.

`<workdir>/told.json` has the rows of both; the conversations are not kept. It takes two minutes on
two cores with `--config.eval.count=256`.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from mmrecoder_jax import cli, prepare, stage
from mmrecoder_jax.config import derived_seed
from mmrecoder_jax.data.batching import Piece
from mmrecoder_jax.data.grammars import GRAMMARS, Grammar
from mmrecoder_jax.data.self_correction import LOOKS_RIGHT, POLICY, Draft, make_dialogue
from mmrecoder_jax.data.sources import Chart
from mmrecoder_jax.env.chart_env import ChartEnv
from mmrecoder_jax.env.response import extract_code, extract_thought
from mmrecoder_jax.evaluation import (
    Evaluation,
    evaluation_sets,
    run_evaluation,
    summarise,
    table_rows,
)
from mmrecoder_jax.reporting.tables import format_table
from mmrecoder_jax.rl.rollout import RolloutEngine
from mmrecoder_jax.rl.trajectory import Turn

THOUGHT_TOKENS = 48  # that the longest thought of a grammar takes, at most


class Told(RolloutEngine):
    """An engine whose later turns begin with the right thought.

    Args:
      engine: whose sampler, buckets and environment it takes.
      grammar: of the charts; it says what is wrong with a draft.
    """

    def __init__(self, engine: RolloutEngine, grammar: Grammar):
        rest = engine.layout, engine.spec, engine.tower, engine.judge, engine.decoder
        super().__init__(engine.sampler, engine.processor, engine.env, *rest)
        self._grammar = grammar

    def feedback(self, turn: Turn, chart: Chart) -> Piece:
        """The next user message, and the thought that the policy goes on behind."""
        piece = super().feedback(turn, chart)
        return dataclasses.replace(piece, ids=np.concatenate([piece.ids, self.told(turn, chart)]))

    def told(self, turn: Turn, chart: Chart) -> Int[np.ndarray, " L"]:
        """How the response begins that cold start 2 teaches after this turn: its ids, up to the end
        of the thought.
        """
        draft = Draft(chart.id, chart, turn.text, POLICY)
        dialogue = make_dialogue(
            draft, turn.execution, self.spec.feedback, -1.0, True, self._grammar.diagnosis
        )
        assert dialogue is not None  # every draft gains at least -1
        response = dialogue.responses[1]
        thought, _, _ = response.partition("</think>")
        ids = self.processor.response(response)
        # The end of the thought and the code's first lines may be one token: it is not cut.
        fits = [n for n in range(len(ids)) if len(self.processor.decode(ids[:n])) <= len(thought)]
        return ids[: max(fits)]


def main(config: ConfigDict, workdir: str) -> None:
    """Measures one policy; prints the table."""
    config.eval.turns = 2
    config.rl.feedback_length += THOUGHT_TOKENS
    prepare.find_source(config)
    prepare.ensure_charts(config, workdir)
    os.makedirs(workdir, exist_ok=True)
    grammar = GRAMMARS[config.data.grammar]
    with ChartEnv(stage.env_config(config)) as env:
        built = stage.build(config, workdir)
        params, charts = built.initial_params(), evaluation_sets(built)[config.eval.split]
        rows, thoughts = [], []
        for decoding, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            own = built.engine(env, temperature)
            engines = {"own": own, "told": Told(own, grammar)}
            for name, engine in engines.items():
                evaluation = run_evaluation(
                    engine,
                    params,
                    charts,
                    name=f"{name} {decoding}",
                    turns=config.eval.turns,
                    batch_size=min(config.eval.batch_size, len(charts)),
                    seed=derived_seed(config, "evaluation"),
                )
                labels = {"policy": name, "set": config.eval.split, "decoding": decoding}
                found = [row | labels for row in summarise(evaluation, config.seed)]
                rows += found if name == "own" else found[1:]
                if name == "own":
                    pairs = [(one.chart.code, one.turns) for _, one in evaluation.own]
                    thoughts += [
                        {"decoding": decoding} | row for row in thought_rows(pairs, grammar)
                    ]
            rows.append(right_row(evaluation, config.seed) | labels | {"policy": "always right"})
    path = os.path.join(workdir, "told.json")
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump({"turns": rows, "thoughts": thoughts}, f, indent=1)
    os.replace(path + ".tmp", path)
    prepare.say(f"{format_table(table_rows(rows))}\n\n{format_table(thoughts)}")


def right_row(evaluation: Evaluation, seed: int) -> dict[str, Any]:
    """The row of a second turn that is always right."""
    right = np.ones_like(evaluation.scores)
    scores = np.stack([evaluation.scores[:, 0], right[:, 0]], axis=1)
    executed = np.stack([evaluation.executed[:, 0], np.ones(len(right), bool)], axis=1)
    repeats = np.stack([np.zeros(len(right), bool), scores[:, 0, 0] == 1], axis=1)
    return summarise(
        dataclasses.replace(
            evaluation, scores=scores, executed=executed, repeats=repeats, oversized=None
        ),
        seed,
    )[1]


def thought_rows(
    pairs: Sequence[tuple[str, Sequence[Turn]]], grammar: Grammar
) -> list[dict[str, Any]]:
    """Counts of second turns whose thought is the right one, and of those that then do it.

    Args:
      pairs: (right code, turns) of conversations. Those whose first turn does not run, or has code
        that the grammar has no diagnosis of, are left out.
    """
    found: dict[str, list[tuple[bool, bool]]] = {"wrong": [], "right": []}
    for truth, turns in pairs:
        before, after = ((extract_code(turn.text) or "").strip() for turn in turns[:2])
        is_right = before == truth.strip()
        thought = LOOKS_RIGHT if is_right else grammar.diagnosis(before, truth)
        if not turns[0].execution.ok or thought is None:
            continue
        says_so = extract_thought(turns[1].text) == thought
        found["right" if is_right else "wrong"].append((says_so, after == truth.strip()))
    return [
        {
            "first turn": kind,
            "turns": len(seen),
            "thought right": sum(says for says, _ in seen),
            "and done": sum(says and does for says, does in seen),
            "done without": sum(does and not says for says, does in seen),
        }
        for kind, seen in found.items()
    ]


if __name__ == "__main__":
    cli.run((cli.EVALUATE,), main)
