"""What `test_distributed` compares, without a model: what one process finds, or each of two.

python -m tests.learner.exchange_main OUT

The policy is a stand-in whose answers depend on a chart's number. Writes OUT/<process>.json.
"""

import dataclasses
import json
import os
import sys
from types import SimpleNamespace

import jax
import numpy as np

from mmrecoder_jax.data.batching import BatchShape, Collate, Piece, TokenRow, VisionLayout
from mmrecoder_jax.env import Execution, Status
from mmrecoder_jax.env.chartmimic import Scores
from mmrecoder_jax.evaluation import run_evaluation, summarise
from mmrecoder_jax.learner import distributed
from mmrecoder_jax.models.processor import ImagePatches
from mmrecoder_jax.rl.monitors import RolloutLog
from mmrecoder_jax.rl.step_rollouts import StepRollouts
from mmrecoder_jax.rl.trajectory import Origin, Trajectory, Turn, write_trajectories
from tests.rl.charts import CHART

REFUSED = 2  # the number of a chart that cannot be shown


def trajectory(number: int, turns: int) -> Trajectory:
    """A conversation that its number decides alone."""
    made = []
    for turn in range(turns):
        score = (0.1, 0.7, 0.3, 0.9, 0.55)[(number + turn) % 5]
        status = Status.OK if (number + turn) % 3 else Status.ERROR
        made.append(
            Turn(
                ids=np.arange(2 + number % 4, dtype=np.int32),
                logps=np.full(2 + number % 4, -0.1 * number, np.float32),
                finished=number % 2 == 0,
                text=f"answer {number % 3}",
                execution=Execution(status, error=f"error {number}"),
                scores=Scores(score, score, score, score),
                format=1.0,
            )
        )
    return Trajectory(dataclasses.replace(CHART, id=str(number)), number, (), tuple(made))


class Engine:
    """In place of a policy and its environment."""

    layout = SimpleNamespace(ways=1)
    judge = None

    def __init__(self):
        self.sizes: list[int] = []

    def refusal(self, chart, turns) -> str:
        return "it is too wide" if chart.id == str(REFUSED) else ""

    def rollout(self, params, charts, uids, key, *, mode, group, turns, size):
        self.sizes.append(len(charts))
        return [[trajectory(uid, turns)] for uid in uids]


def monitors(found, out: str) -> None:
    numbers = distributed.own_numbers(4 // jax.process_count())
    groups = [[trajectory(2 * int(n) + g, 2) for g in range(2)] for n in numbers]
    rewards = np.array([[[u.scores.overall for u in t.turns] for t in group] for group in groups])
    counts = {"executions": 2 * len(numbers), "replays": 0, "flag_tamper": len(numbers)}
    rates = {"rate_tamper": 0.5, "rate_hidden_text": 0.0, "rate_forged": 0.0}
    env = SimpleNamespace(stats=lambda: counts | rates)
    written = os.path.join(out, "trajectories")
    how = {"saved_every": 1, "most_bytes": 1e9, "show": lambda step, rows: None}
    log = RolloutLog(written, 1, env, None, **how)
    origins = tuple(Origin(int(number), (6, 6), (0, 7), (1, 1, 1)) for number in numbers)
    silent = numbers == 1
    advantages = np.add.outer(numbers, [0.25, 0.5]).astype(np.float64)
    drawn = StepRollouts(groups, numbers, {}, origins)
    found["metrics"] = log.record(7, drawn, rewards, rewards[..., -1], advantages, silent)


def buckets(found) -> None:
    """The shapes that rows of this host get beside longer rows and wider images of another."""
    layout = VisionLayout(99, 0, window_patches=4, patch_dim=3)
    shape = BatchShape(2, (8, 16, 32), (1, 2, 4), 2)
    longer = jax.process_index() == jax.process_count() - 1
    windows = 3 if longer else 1
    image = ImagePatches(
        np.zeros((windows, 4, 3), np.float32),
        np.zeros((windows, 4, 2), np.int32),
        np.ones((windows, 4), bool),
        (1, windows),
        np.arange(windows, dtype=np.int32),
    )
    prompt = Piece(np.full(windows, 99, np.int32), 0, (image,))
    answer = Piece(np.ones(17 if longer else 3, np.int32), 1)
    collate = Collate(shape, layout, totals=distributed.global_sum, largest=distributed.global_max)
    batch = collate([TokenRow((prompt, answer), (1,))])
    found["shapes"] = {name: list(x.shape) for name, x in batch.items()}
    found["weight"] = float(batch["weights"].max())


def main(out: str) -> None:
    distributed.start()
    found = {"hosts": jax.process_count()}
    engine = Engine()
    charts = [trajectory(number, 1).chart for number in range(7)]
    evaluation = run_evaluation(engine, None, charts, name="p", turns=2, batch_size=4, seed=5)
    found["rows"], found["sizes"] = summarise(evaluation), engine.sizes
    rows = [(t, [0.0, 0.0], 0.0) for _, t in evaluation.own]
    numbers = [number for number, _ in evaluation.own]
    write_trajectories(os.path.join(out, "evaluation"), 0, rows, numbers)
    monitors(found, out)
    buckets(found)
    # Exact, whatever the type; texts of any length; rows of unequal counts, some to leave out.
    found["sum"] = float(distributed.global_sum(np.array([2.0**53 + 2 * jax.process_index()]))[0])
    found["texts"] = distributed.gather_texts("ä" * (5 * jax.process_index()))
    own = np.arange(1 + jax.process_index())
    found["ragged"] = distributed.all_rows(10 * own + jax.process_index(), 5 - own).tolist()
    found["left out"] = distributed.all_rows(own, np.where(own == 1, -1, own)).tolist()
    found["main"] = distributed.main_says(distributed.is_main())
    with open(os.path.join(out, f"{jax.process_index()}.json"), "w", encoding="utf-8") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
