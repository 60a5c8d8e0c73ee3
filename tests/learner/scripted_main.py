"""What `test_hosts` starts: a training command whose scripts are not executed.

python -m tests.learner.scripted_main CODES HOST FLAGS...

A script's text decides whether it fails or what it draws, so that it does the same on every host.
Of HOST every script fails and is appended to CODES, with the conversation that wrote it; with
HOST=-1 those fail that are in CODES. So one process sees what several saw of which one was unlucky.
In an evaluation nobody is.
"""

import hashlib
import json
import sys
from concurrent.futures import Future
from pathlib import Path

import jax
import numpy as np

from mmrecoder_jax import cli, pipeline, train
from mmrecoder_jax.config import STAGES
from mmrecoder_jax.env import Execution, Status
from mmrecoder_jax.env.records import Record
from mmrecoder_jax.held_out import HeldOutCharts
from mmrecoder_jax.rl import rollout
from mmrecoder_jax.rl.answering import Answering

# height and width: the smallest bucket, and the largest
SIZES = ((56, 84), (112, 168))
CHOICES = 7


class ScriptedEnv:
    """In place of `ChartEnv`: a seventh of all scripts fails by itself.

    Attributes:
      asker: the conversation whose script is submitted next. The unlucky host's share of two equal
        texts is known by it.
    """

    def __init__(self, codes: Path, host: int):
        self._codes, self._host, self._asked = codes, host, 0
        self.evaluates, self.asker = False, 0
        known = codes.read_text("utf-8").splitlines() if host < 0 else ()
        self._bad = set(known)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, code):
        self._asked += 1
        choice = hashlib.sha256(code.encode()).digest()[0] % CHOICES
        script = json.dumps([self.asker, code])
        unlucky = script in self._bad and not self.evaluates
        if not self.evaluates and jax.process_index() == self._host:
            unlucky = True
            with open(self._codes, "a", encoding="utf-8") as file:
                file.write(script + "\n")
        future = Future()
        if unlucky or not choice:
            future.set_result(Execution(Status.ERROR, error=f"NameError: {code[:20]}"))
        else:
            image = np.full((*SIZES[choice % 2], 3), 36 * choice, np.uint8)
            # one axes, as the charts have; every second script draws none and is paid less
            record = Record(layout=((1, 1, 0, 0, 0, 0),) if choice > CHOICES // 2 else ())
            future.set_result(Execution(Status.OK, image=image, record=record))
        return future

    watch = submit

    def stats(self):
        rates = {"rate_tamper": 0.0, "rate_hidden_text": 0.0, "rate_forged": 0.0}
        return {"executions": self._asked, "replays": 0, "flag_tamper": 0} | rates


def main(codes: str, host: int) -> None:
    # The text itself is the code: a policy of three steps writes none.
    rollout.extract_code = lambda text: text
    env = ScriptedEnv(Path(codes), host)
    pipeline.ChartEnv = lambda config: env
    ask, evaluate = Answering._ask, HeldOutCharts.metrics

    def _ask(self, talk, response):
        env.asker = talk.uid
        ask(self, talk, response)

    def metrics(self, params):
        env.evaluates = True
        found = evaluate(self, params)
        env.evaluates = False
        return found

    Answering._ask = _ask
    HeldOutCharts.metrics = metrics
    cli.run(STAGES, train.main)


if __name__ == "__main__":
    codes, host = sys.argv[1], int(sys.argv[2])
    sys.argv[1:] = sys.argv[3:]
    main(codes, host)
