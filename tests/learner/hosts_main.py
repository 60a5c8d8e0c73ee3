"""What `test_hosts` compares: a rollout, an evaluation and the monitors of one process with two
devices, or of two processes with one each. The environment says which process this is.

python -m tests.learner.hosts_main WORKDIR OUT

Scripts are not executed: a script's text decides what it draws, so that it draws the same on every
host. Writes OUT/<process>.json, and OUT/trajectories as a run does.
"""

import dataclasses
import hashlib
import json
import os
import sys
from concurrent.futures import Future

import jax
import numpy as np

from mmrecoder_jax import stage as stages
from mmrecoder_jax.config import load
from mmrecoder_jax.data.sources import png_bytes
from mmrecoder_jax.env import Execution, Status
from mmrecoder_jax.evaluation import run_evaluation, summarise
from mmrecoder_jax.learner import distributed
from mmrecoder_jax.rl import rollout
from mmrecoder_jax.rl.monitors import RolloutLog
from mmrecoder_jax.rl.step_rollouts import StepRollouts
from mmrecoder_jax.rl.trajectory import Mode, Origin

CHARTS, GROUP = 4, 2
# height and width: the smallest bucket, the largest, and none (`data.windows` below)
SMALL, LARGE, NONE = (56, 84), (112, 168), (28, 672)


class Scripted:
    """Fails, or draws a figure of some size, as the script's hash says; or as `always` says."""

    def __init__(self, always=None):
        self.always, self.asked = always, 0

    def submit(self, code):
        self.asked += 1
        choice = hashlib.sha256(code.encode()).digest()[0] % 5
        size = self.always or (None, SMALL, SMALL, LARGE, NONE)[choice]
        future = Future()
        if size is None or size == "fail":
            future.set_result(Execution(Status.ERROR, error=f"NameError: {code[:20]}"))
        else:
            shade = 8 * choice + 20
            image = np.full((*size, 3), shade, np.uint8)
            future.set_result(Execution(Status.OK, image=image))
        return future

    watch = submit

    def stats(self):
        rates = {"rate_tamper": 0.5, "rate_hidden_text": 0.0, "rate_forged": 0.0}
        counts = {"executions": self.asked, "replays": 0, "flag_tamper": self.asked // 2}
        return counts | rates


def roll(engine, params, charts):
    own = distributed.own_numbers(CHARTS // jax.process_count()).tolist()
    return engine.rollout(
        params,
        [charts[i] for i in own],
        own,
        jax.random.key(3),
        mode=Mode.SHARED_FIRST_TURN,
        group=GROUP,
    )


def main(workdir: str, out: str) -> None:
    hosts = int(os.environ.get("JAX_NUM_PROCESSES", "1"))
    jax.config.update("jax_num_cpu_devices", 2 // hosts)
    distributed.start()
    assert (jax.process_count(), jax.device_count()) == (hosts, 2)
    # The text itself is the code: a random policy writes none.
    rollout.extract_code = lambda text: text
    config = load("stage2", "smoke")
    config.init_from, config.data.dir = workdir, workdir + "/data"
    config.data.windows, config.feedback.image = (2, 6), "render"
    config.rl.response_length, config.rl.decode_chunk = 12, 5
    config.model.scan_unroll = 1  # quicker to compile
    stage = stages.build(config, workdir)
    params = stage.initial_params()
    charts = list(stage.charts("train"))[:7]
    charts[2] = dataclasses.replace(charts[2], image=png_bytes(np.zeros((*NONE, 3), np.uint8)))
    found = {}

    engine = stage.engine(Scripted(), 1.0)
    groups = roll(engine, params, [charts[i] for i in (0, 1, 3, 4)])
    size = len(groups), GROUP
    rewards = np.array([[[t.scores.overall for t in x.turns] for x in group] for group in groups])
    rewards += np.arange(2)  # so that means differ by turn
    silent = np.array([distributed.is_main()] + [False] * (len(groups) - 1))
    written = os.path.join(out, "trajectories")
    how = {"saved_every": 1, "most_bytes": 1e9, "show": lambda step, rows: None}
    log = RolloutLog(written, 1, engine.env, None, **how)
    advantages = np.full(size, 0.5)
    numbers = distributed.own_numbers(len(groups))
    origins = tuple(Origin(int(number), (0, 0), (0, 1), (1, 1, 1)) for number in numbers)
    drawn = StepRollouts(groups, numbers, {}, origins)
    found["metrics"] = log.record(1, drawn, rewards, rewards[..., -1], advantages, silent)

    evaluation = run_evaluation(
        stage.engine(Scripted(), 1.0), params, charts, name="p", turns=2, batch_size=4, seed=5
    )
    texts = [[number, t.turns[-1].text] for number, t in evaluation.own]
    found["texts"] = distributed.all_values(texts, [number for number, _ in texts])
    found["rows"] = summarise(evaluation)

    # One host's scripts all fail, and the other's all draw what needs the largest bucket.
    engine = stage.engine(Scripted("fail" if jax.process_index() else LARGE), 1.0)
    roll(engine, params, charts[3:])
    found["programs"] = engine.sampler.compilations()
    with open(os.path.join(out, f"{jax.process_index()}.json"), "w", encoding="utf-8") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
