"""The command `python -m mmrecoder_jax.env.score`; all of it is in `benchmarks.score`."""

import sys

from mmrecoder_jax.benchmarks.score import main

if __name__ == "__main__":
    sys.exit(main())
