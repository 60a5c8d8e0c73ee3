"""RL stage 1, shared first turn: GRPO on G second turns that follow one first turn per prompt.

python -m mmrecoder_jax.train --config=configs/stage1.py:tiny --workdir=runs/stage1 \\
    --config.init_from=runs/tiny/sft_self_correction --config.data.dir=runs/tiny/data

Expected time: `:tiny` about 3 minutes on two CPU cores (36 steps at 5 seconds where both are
busy), `:smoke` half a minute. The paper trained on 16 x 8 H200; the 7B recipe was not run here.

Stage 1 shares every field and value with stage 2 (`stage2.py` shows them all) but for these.
"""

from ml_collections import ConfigDict

from mmrecoder_jax.config import load, sized

TINY = {
    "train.steps": 36,
    "checkpoint.every": 12,
}
SMOKE = {
    "train.steps": 3,
    "checkpoint.every": 1,
}


def get_config(size: str | None = None) -> ConfigDict:
    """The 7B recipe (128 prompts, G = 8, lr 1e-6, 1 epoch), or `tiny` / `smoke`."""
    config = load("stage2", size)
    config.stage = "stage1"
    return sized(config, size, TINY, SMOKE)
