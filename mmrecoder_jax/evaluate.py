"""Evaluates a policy: on a benchmark, or on the charts of a configuration.

    python -m mmrecoder_jax.evaluate --benchmark=tiny
    python -m mmrecoder_jax.evaluate --config=configs/evaluate.py:tiny --workdir=runs/eval

The first is `exam.command` (docs/evaluation.md). The second evaluates the policy of
`--config.init_from` on the configured charts and prints the table; it writes `evaluation.json` and
the trajectories into the work directory.
"""

import os
import sys

from ml_collections import ConfigDict

from mmrecoder_jax import cli, prepare, stage
from mmrecoder_jax.env.chart_env import ChartEnv
from mmrecoder_jax.evaluation import evaluate, table_rows
from mmrecoder_jax.exam import command
from mmrecoder_jax.reporting.tables import format_table


def main(config: ConfigDict, workdir: str) -> None:
    """Evaluates one policy on the charts of its configuration."""
    prepare.find_source(config)
    prepare.ensure_charts(config, workdir)
    with ChartEnv(stage.env_config(config)) as env:
        built = stage.build(config, workdir)
        os.makedirs(workdir, exist_ok=True)
        name = os.path.basename(os.path.normpath(config.init_from))
        rows = table_rows(evaluate(built, built.initial_params(), env, name))
    prepare.say(format_table(rows))


def is_of_a_configuration(arguments: list[str]) -> bool:
    """Whether a command line asks for the evaluation of a configuration: only that has these."""
    names = [word.lstrip("-").partition("=")[0] for word in arguments if word.startswith("-")]
    return any(name == "workdir" or name.partition(".")[0] == "config" for name in names)


if __name__ == "__main__":
    if not is_of_a_configuration(sys.argv[1:]):
        sys.exit(command.main(sys.argv[1:]))
    cli.run((cli.EVALUATE,), main)
