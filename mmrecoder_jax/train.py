"""`python -m mmrecoder_jax.train --config=configs/stage2.py:tiny --workdir=runs/stage2`

Runs the stage that the configuration names (sft_chart2code, sft_self_correction, stage1, stage2),
or all of them (pipeline). Every field is a flag: `--config.optim.lr=1e-5`. Kill it at any point;
the same command resumes from the last checkpoint.

`--preflight` tries everything that a stage needs and says what it will cost (`preflight`).
`--selfcheck` compares the configured model's kernels with plain matmuls on this machine instead.
`--profile=3-4` also writes a trace of steps 3 and 4 (`monitoring.profile`).
"""

from ml_collections import ConfigDict

from mmrecoder_jax import cli, pipeline
from mmrecoder_jax.config import STAGES, ConfigError
from mmrecoder_jax.learner.selfcheck import check, format_findings
from mmrecoder_jax.preflight import preflight as try_all
from mmrecoder_jax.prepare import say


def main(config: ConfigDict, workdir: str) -> None:
    """Runs a stage, or the whole paper."""
    if config.stage == "pipeline":
        pipeline.run_pipeline(config, workdir)
    else:
        pipeline.run_stage(config, workdir)


def selfcheck(config: ConfigDict) -> bool:
    """Prints the table of `learner.selfcheck`; whether all is right."""
    findings = check(config)
    say(format_findings(config, findings))
    return all(finding.right for finding in findings)


def preflight(config: ConfigDict, workdir: str, changes: cli.Changes) -> bool:
    """Tries everything that a stage needs; whether all is well."""
    if config.stage == "pipeline":
        raise ConfigError("--preflight tries one stage: name it, e.g. --config=stage2")
    return try_all(config, workdir, changes)


if __name__ == "__main__":
    cli.run((*STAGES, "pipeline"), main, selfcheck, profiles=True, preflight=preflight)
