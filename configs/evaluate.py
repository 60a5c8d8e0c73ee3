"""Evaluation of a policy with several turns, greedy and sampled.

python -m mmrecoder_jax.evaluate --config=configs/evaluate.py:tiny --workdir=runs/eval \
    --config.init_from=runs/tiny/stage2 --config.data.dir=runs/tiny/data
"""

from mmrecoder_jax.config import base


def get_config(size: str | None = None):
    """256 test charts of the configured data, four turns."""
    size = size or "paper"
    config = base("evaluate", size)
    if size == "paper":
        config.data.dir = "data/chartmimic"
    return config
