"""What `test_cluster` starts: joins whatever the environment says, and prints where it is.

python -m tests.learner.join_main [SECONDS]
"""

import sys

import jax
import numpy as np

from mmrecoder_jax.config import ConfigError
from mmrecoder_jax.learner import distributed


def main(seconds: float = 60) -> None:
    try:
        distributed.start(seconds)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    total = distributed.global_sum(np.array([1 + jax.process_index()]))[0]
    print(f"process {jax.process_index()} of {jax.process_count()} sum {total}")


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
