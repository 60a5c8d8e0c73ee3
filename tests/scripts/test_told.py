"""Second turns that are told what to correct."""

import dataclasses
import json
import runpy

import numpy as np

from mmrecoder_jax.data import panels
from mmrecoder_jax.data.grammars import GRAMMARS
from mmrecoder_jax.data.sources import png_bytes
from mmrecoder_jax.env import Execution, Status
from mmrecoder_jax.rl.sampler import Response
from tests.scripts.run import ROOT, run_script

BLANK = np.full((112, 168, 3), 255, np.uint8)


def turn_of(engine, chart, code: str, thought: str = "bar"):
    """A turn whose script ran, and has drawn nothing."""
    text = f"<think>{thought}</think>\n```python\n{code}\n```"
    ids = engine.processor.response(text)
    nothing = np.zeros(len(ids), np.float32)
    said = Response(ids, nothing, True, nothing)
    return engine.scored(chart, said, Execution(Status.OK, image=BLANK))


def test_a_told_response_begins_as_cold_start_2_has_taught_it(policy, pool):
    told = runpy.run_path(str(ROOT / "scripts" / "told.py"))["Told"]
    engine = policy.stage_with({"rl.response_length": 96}).engine(pool, 0.0)
    spec = panels.chart_spec(0, 0)
    stop, start = spec.columns
    wrong = dataclasses.replace(spec, columns=(stop - 1, start)).code()
    chart = dataclasses.replace(policy.charts[0], code=spec.code(), image=png_bytes(BLANK))
    fix = f"Fix columns {stop - 1}+1={stop} {start}."
    for code, thought in ((wrong, fix), (spec.code(), "Looks right.")):
        turn = turn_of(engine, chart, code)
        plain = engine.feedback(turn, chart)
        piece = told(engine, GRAMMARS["panels"]).feedback(turn, chart)
        np.testing.assert_array_equal(piece.ids[: len(plain.ids)], plain.ids)
        said = piece.ids[len(plain.ids) :]
        assert engine.processor.decode(said) == f"<think>{thought}"
        taught = engine.processor.response(
            f"<think>{thought}</think>\n```python\n{chart.code}\n```"
        )
        np.testing.assert_array_equal(said, taught[: len(said)])
        assert piece.images == plain.images and piece.turn == 0


def test_it_measures_a_policy(smoke_run, tmp_path):
    done = run_script(
        "told",
        "--config=evaluate:smoke",
        f"--workdir={tmp_path}",
        f"--config.init_from={smoke_run.workdir}/sft_self_correction",
        f"--config.data.dir={smoke_run.workdir}/data",
        "--config.eval.count=4",
        "--config.eval.batch_size=4",
    )
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "told.json").read_text())
    rows = told["turns"]
    assert [(row["policy"], row["turn"], row["decoding"]) for row in rows] == [
        (policy, turn, decoding)
        for decoding in ("greedy", "sampled")
        for policy, turn in (("own", 1), ("own", 2), ("told", 2), ("always right", 2))
    ]
    for row in rows:
        if row["policy"] == "always right":
            assert row["low_level"] == 1 and row["exec_rate"] == 1
            assert row.get("improvement", 0) >= 0
    assert "always right" in done.stdout
    of = {(row["decoding"], row["first turn"]): row["turns"] for row in told["thoughts"]}
    assert of.keys() == {(d, kind) for d in ("greedy", "sampled") for kind in ("wrong", "right")}
    assert of["greedy", "wrong"] + of["greedy", "right"] <= 4


def test_thoughts_are_counted_apart_from_what_is_done(policy, pool):
    rows_of = runpy.run_path(str(ROOT / "scripts" / "told.py"))["thought_rows"]
    engine = policy.stage_with({"rl.response_length": 96}).engine(pool, 0.0)
    spec = panels.chart_spec(0, 0)
    stop, start = spec.columns
    right, wrong = spec.code(), dataclasses.replace(spec, columns=(stop - 1, start)).code()
    fix = panels.diagnosis(wrong, right)

    def turn(thought: str, code: str):
        return turn_of(engine, policy.charts[0], code, thought)

    first, ended = (
        turn("bar", wrong),
        dataclasses.replace(turn("bar", wrong), execution=Execution(Status.ERROR, error="boom")),
    )
    pairs = [
        (right, (first, turn(fix, right))),  # thinks and does it
        (right, (first, turn(fix, wrong))),  # thinks it, and repeats
        (right, (first, turn("Looks right.", right))),  # does it all the same
        (right, (ended, turn(fix, right))),  # has not run
        (right, (turn("bar", "x = 1"), turn(fix, right))),  # no code of the grammar
        (right, (turn("bar", right), turn("Looks right.", right))),
        (right, (turn("bar", right), turn(fix, wrong))),  # spoils it
    ]
    assert rows_of(pairs, GRAMMARS["panels"]) == [
        {"first turn": "wrong", "turns": 3, "thought right": 2, "and done": 1, "done without": 1},
        {"first turn": "right", "turns": 2, "thought right": 1, "and done": 1, "done without": 0},
    ]
