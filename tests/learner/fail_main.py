"""What `test_distributed` starts: a command of several processes, of which one fails.

python -m tests.learner.fail_main HOST [SIGNAL [SECONDS [WHERE]]]

HOST raises a ConfigError in work of its own; with a signal (SIGKILL, SIGSTOP, SIGTERM) it gets that
instead. A process without a sign of life for so many SECONDS is lost. The others wait for it in an
exchange, or with WHERE=alone are in work of their own that takes long; with WHERE=stage all are in
a stage that listens to SIGTERM.
"""

import os
import signal
import sys
import time

import jax
import numpy as np

from mmrecoder_jax.command import ending_in_one_line
from mmrecoder_jax.config import ConfigError
from mmrecoder_jax.learner import distributed, preemption


def main(host: int, ending: str = "", seconds: str = "60", where: str = "") -> None:
    distributed.start(silent_seconds=float(seconds))
    with ending_in_one_line(), distributed.leaving_at_once():
        distributed.global_sum(np.ones(1))
        failing = jax.process_index() == host
        if where == "stage":
            preemption.listen()
            with preemption.training():
                if failing:
                    os.kill(os.getpid(), signal.Signals[ending])
            return
        if failing and ending:
            os.kill(os.getpid(), signal.Signals[ending])
        if where == "alone":
            time.sleep(300)
        with distributed.together():
            if failing and not ending:
                raise ConfigError("row 7 is bad")
        distributed.global_sum(np.ones(1))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
