"""Cold start 2: two-turn SFT on correction dialogues, kept where turn 2 beats turn 1 by at least
0.02 low-level.

python -m mmrecoder_jax.train --config=configs/sft_self_correction.py:tiny
--workdir=runs/sft_self_correction \
    --config.init_from=runs/tiny/sft_chart2code --config.data.dir=runs/tiny/data
"""

from mmrecoder_jax.config import base


def get_config(size: str | None = None):
    """The paper's 7B recipe (about 7k dialogues, 2 epochs, batch 128, lr 1e-5), or `tiny` /
    `smoke`.
    """
    size = size or "paper"
    config = base("sft_self_correction", size)
    if size == "paper":
        config.data.dir = "data/chart2code_160k"
        config.train.epochs = 2.0
    else:
        config.train.single_turn_share = 0.25
        config.optim.lr = 8e-4
        config.train.steps = 400 if size == "tiny" else 16
        config.checkpoint.every = 150 if size == "tiny" else config.checkpoint.every
    return config
