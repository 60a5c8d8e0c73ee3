"""The command `python -m mmrecoder_jax.env.sandbox`; all of it is in `probe`."""

import sys

from mmrecoder_jax.env.sandbox.probe import main

if __name__ == "__main__":
    sys.exit(main())
