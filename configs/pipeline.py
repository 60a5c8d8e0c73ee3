"""All of the paper in order, by one command: charts, cold start 1, dialogues, cold start 2, stage
1, stage 2, evaluation, report.

python -m mmrecoder_jax.train --config=configs/pipeline.py:tiny --workdir=runs/tiny

`smoke` runs the same in under three minutes; its numbers mean nothing. Sections that all stages
share are set here (`--config.data.train_count=...`), those of one stage below `stages`
(`--config.stages.stage2.optim.lr=...`).
"""

from mmrecoder_jax.config import STAGES, base, load

OWN = ("train", "optim", "rl", "reward", "dialogues", "checkpoint")


def get_config(size: str | None = None):
    """The four stages' configurations under `stages`, the shared sections beside them."""
    config = base("pipeline", size or "paper")
    for section in OWN:
        del config[section]
    config.stages = {
        name: {section: load(name, config.size)[section] for section in OWN} for name in STAGES
    }
    if config.size == "paper":
        config.init_from = "Qwen/Qwen2.5-VL-7B-Instruct"
        config.data.dir = "data/chart2code_160k"
    elif config.size == "tiny":
        config.data.gallery = "data/gallery"
        config.data.gallery_sample = 120
    return config
