"""`python -m mmrecoder_jax.train --config=configs/stage2.py:tiny --workdir=runs/stage2`

Runs the stage that the configuration names (sft_chart2code, sft_self_correction, stage1, stage2),
or all of them (pipeline). Every field is a flag: `--config.optim.lr=1e-5`. Kill it at any point;
the same command resumes from the last checkpoint.
"""

from ml_collections import ConfigDict

from mmrecoder_jax import cli, pipeline
from mmrecoder_jax.config import STAGES


def main(config: ConfigDict, workdir: str) -> None:
    """Runs a stage, or the whole paper."""
    if config.stage == "pipeline":
        pipeline.run_pipeline(config, workdir)
    else:
        pipeline.run_stage(config, workdir)


if __name__ == "__main__":
    cli.run((*STAGES, "pipeline"), main)
