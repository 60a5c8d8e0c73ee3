"""RL stage 2, full trajectory: G whole trajectories a prompt, GRPO on both turns, one advantage a
trajectory.

python -m mmrecoder_jax.train --config=configs/stage2.py:tiny --workdir=runs/stage2 \
    --config.init_from=runs/tiny/stage1 --config.data.dir=runs/tiny/data
"""

from mmrecoder_jax.config import base


def get_config(size: str | None = None):
    """The paper's 7B recipe (128 prompts, G = 8, lr 1e-6, 1 epoch, responses up to 4,096 tokens),
    or `tiny` / `smoke`.
    """
    size = size or "paper"
    config = base("stage2", size)
    if size == "paper":
        config.data.dir = "data/chart2code_160k"
        config.optim.lr = 1e-6
        config.reward.judge = "http"
    else:
        config.optim.schedule = "constant"
        config.optim.warmup_steps = 5
        config.optim.lr = 1.2e-4
        config.train.log_every = 2 if size == "tiny" else 1
        config.train.steps = 26 if size == "tiny" else 3
        config.train.batch_size = 8 if size == "tiny" else 4
        config.train.micro_batch_size = 64 if size == "tiny" else 8
        config.checkpoint.every = 10 if size == "tiny" else 1
    return config
