"""Rolls out one trajectory: a chart, a tiny policy with random weights, two turns.

    python examples/roll_out_one_trajectory.py

The policy has learnt nothing, so its answers are noise and the feedback says that they hold no
code. The way is the real one: prompt, sampled token ids, execution, feedback as further token ids,
second turn, and the loss mask. `python -m mmrecoder_jax.train --config=configs/pipeline.py:tiny`
trains the same model.
"""

import tempfile

import jax

from mmrecoder_jax import prepare
from mmrecoder_jax.config import load
from mmrecoder_jax.env.chart_env import ChartEnv, feedback_text
from mmrecoder_jax.rl.trajectory import Trajectory
from mmrecoder_jax.stage import build, env_config


def main() -> None:
    # One of the shipped configurations, with as few charts as possible.
    config = load("stage2", "smoke")
    config.data.update({"train_count": 1, "val_count": 1, "test_count": 1})
    config.env.workers = 1
    with tempfile.TemporaryDirectory() as workdir, ChartEnv(env_config(config)) as env:
        prepare.ensure_charts(config, workdir)  # draws toy charts and records them
        stage = build(config, workdir, prepare.ensure_tokenizer(config, workdir))
        chart = stage.charts("train")[0]
        engine = stage.engine(env, temperature=1.0)
        # [P][G]: one prompt, one trajectory of it. Same key and uid, same trajectory.
        groups = engine.rollout(
            stage.initial_params(), [chart], uids=[0], key=jax.random.key(0), turns=2
        )
        describe(groups[0][0], config.feedback.to_dict())


def describe(trajectory: Trajectory, templates: dict[str, str]) -> None:
    """Prints the pieces of a trajectory in their order, and what each turn scored."""
    print(f"chart {trajectory.chart.id}: {trajectory.chart.instruction}")
    for number, turn in enumerate(trajectory.turns, 1):
        print(f"turn {number}: {len(turn.ids)} tokens, {turn.text[:40]!r}...")
        print(f"  execution {turn.execution.status}, rule score {turn.scores.overall:.2f}")
        if number < len(trajectory.turns):
            print(f"  feedback {feedback_text(turn.execution, templates)!r}")
    for piece in trajectory.pieces:
        who = f"sampled in turn {piece.turn}" if piece.turn else "shown, without loss"
        print(f"piece of {len(piece.ids)} tokens: {who}")


if __name__ == "__main__":
    main()
