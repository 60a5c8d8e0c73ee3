"""Rollouts of one checkout, for `bench_rollout.py --against`: it measures two beside each other.

Reads a number per line, draws the rollouts of that seed with a random tiny policy, and answers with
seconds and sampled tokens. It uses of the package only what older commits have too.
"""

import argparse
import json
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np

from mmrecoder_jax import prepare
from mmrecoder_jax.config import load, set_fields
from mmrecoder_jax.env.execution import Execution, Status
from mmrecoder_jax.rl.trajectory import Mode
from mmrecoder_jax.stage import build


class Sleeps:
    """Every script takes 50 ms, two at one time, and draws the same figure."""

    def __init__(self) -> None:
        self._workers = ThreadPoolExecutor(2)

    def submit(self, code: str | None) -> Future[Execution]:
        return self._workers.submit(self._run)

    watch = submit

    def _run(self) -> Execution:
        time.sleep(0.05)
        return Execution(Status.OK, image=np.full((112, 168, 3), 90, np.uint8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", required=True, help="where charts and a tokenizer are kept")
    parser.add_argument("--prompts", type=int, required=True)
    parser.add_argument("--group", type=int, required=True)
    parser.add_argument("--turns", type=int, required=True)
    parser.add_argument("--response", type=int, required=True, help="longest response in tokens")
    parser.add_argument("--stage", choices=("stage1", "stage2"), required=True)
    args = parser.parse_args()
    config = load(args.stage, "smoke")
    set_fields(
        config,
        {"rl.response_length": args.response, "rl.turns": args.turns, "rl.decode_chunk": 24},
    )
    config.data.update({"train_count": args.prompts, "val_count": 1, "test_count": 1})
    prepare.ensure_charts(config, args.workdir)
    stage = build(config, args.workdir, prepare.ensure_tokenizer(config, args.workdir))
    params = stage.initial_params()
    # nearly even odds, or a policy without training would write one token again and again
    params["model"]["embed_tokens"]["weight"] /= 8
    charts = [stage.charts("train")[i] for i in range(args.prompts)]
    engine = stage.engine(Sleeps(), 1.0)
    mode = Mode.SHARED_FIRST_TURN if args.stage == "stage1" else Mode.FULL_TRAJECTORY
    for line in sys.stdin:
        start = time.perf_counter()
        groups = engine.rollout(
            params,
            charts,
            range(args.prompts),
            jax.random.key(int(line)),
            mode=mode,
            group=args.group,
            turns=args.turns,
        )
        seconds = time.perf_counter() - start
        # what a group has in common was written once, and is the same array in all its members
        lengths = {id(turn.ids): len(turn.ids) for g in groups for t in g for turn in t.turns}
        print(json.dumps({"seconds": seconds, "tokens": sum(lengths.values())}), flush=True)


if __name__ == "__main__":
    main()
