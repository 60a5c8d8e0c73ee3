"""All of the paper in order: charts, both cold starts, both RL stages, an evaluation after each.

python -m mmrecoder_jax.train --config=configs/pipeline.py:tiny --workdir=runs/tiny

Expected time: `:tiny` about 33 minutes on two free CPU cores (docs/tiny.md), `:smoke` 2 minutes.

The fields are those of the stages' own files. A section that several stages have (`SHARED`) is
set once, at the top (`--config.data.train_count=...`); the sections in which stages differ are
below `stages` (`--config.stages.stage2.optim.lr=...`, `--config.stages.evaluate.rl...`).
"""

from ml_collections import ConfigDict

from mmrecoder_jax.config import SHARED, STAGES, load


def get_config(size: str | None = None) -> ConfigDict:
    """The stages' configurations under `stages`, the sections they share beside them."""
    parts = {name: load(name, size) for name in (*STAGES, "evaluate")}
    config = ConfigDict({"stage": "pipeline", "stages": {}})
    for name, part in parts.items():
        own = {field: part[field] for field in part if field not in (*SHARED, "init_from")}
        del own["stage"], own["size"], own["seed"]
        config.stages[name] = ConfigDict(own)
        for section in SHARED:
            if section in part:
                shared = {} if section not in config else config[section].to_dict()
                config[section] = ConfigDict(part[section].to_dict() | shared)
    first = parts[STAGES[0]]
    config.update({"size": first.size, "seed": first.seed, "init_from": first.init_from})
    config.data.gallery_sample = 0  # real charts to gather where data.gallery is missing; 0: none
    config.data.dir = first.data.dir
    if config.size == "tiny":
        config.data.gallery = "data/gallery"
        config.data.gallery_sample = 120
    return config
