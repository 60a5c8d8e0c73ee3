"""`python -m mmrecoder_jax.evaluate --config=configs/evaluate.py:tiny --workdir=runs/eval`

Evaluates the policy of `--config.init_from` on the configured charts and prints the table; writes
`evaluation.json` and the trajectories into the work directory.
"""

import os

from ml_collections import ConfigDict

from mmrecoder_jax import cli, prepare, stage
from mmrecoder_jax.env.chart_env import ChartEnv
from mmrecoder_jax.evaluation import evaluate, table_rows
from mmrecoder_jax.reporting.tables import format_table


def main(config: ConfigDict, workdir: str) -> None:
    """Evaluates one policy."""
    prepare.find_source(config)
    prepare.ensure_charts(config, workdir)
    with ChartEnv(stage.env_config(config)) as env:
        built = stage.build(config, workdir)
        os.makedirs(workdir, exist_ok=True)
        name = os.path.basename(os.path.normpath(config.init_from))
        rows = table_rows(evaluate(built, built.initial_params(), env, name))
    prepare.say(format_table(rows))


if __name__ == "__main__":
    cli.run((cli.EVALUATE,), main)
