"""Cold start 1: single-turn SFT on (chart, code) pairs.

python -m mmrecoder_jax.train --config=configs/sft_chart2code.py:tiny --workdir=runs/sft_chart2code
python -m mmrecoder_jax.train --config=configs/sft_chart2code.py --workdir=runs/7b
--config.init_from=Qwen/Qwen2.5-VL-7B-Instruct
"""

from mmrecoder_jax.config import base


def get_config(size: str | None = None):
    """The paper's 7B recipe (1 epoch, batch 128, lr 1e-5), or `tiny` / `smoke`."""
    size = size or "paper"
    config = base("sft_chart2code", size)
    if size == "paper":
        config.init_from = "Qwen/Qwen2.5-VL-7B-Instruct"
        config.data.dir = "data/chart2code_160k"
    else:
        config.train.steps = 1100 if size == "tiny" else 120
        config.train.eval_every = 100 if size == "tiny" else 120
        config.checkpoint.every = 200 if size == "tiny" else config.checkpoint.every
    return config
