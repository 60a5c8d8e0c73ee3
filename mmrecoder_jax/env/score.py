"""`python -m mmrecoder_jax.env.score --pairs pairs.jsonl --out scores.jsonl`: see
`benchmarks.score`.
"""

import sys

from mmrecoder_jax.benchmarks.score import main

if __name__ == "__main__":
    sys.exit(main())
