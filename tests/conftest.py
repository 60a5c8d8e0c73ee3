"""What tests share: a compilation cache for the session (subprocesses too), and a tiny policy with its environment."""

import dataclasses
import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="mmrecoder-jax-cache-"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import pytest
from absl import flags

flags.FLAGS.mark_as_parsed()


@dataclasses.dataclass
class Policy:
    """A randomly initialised tiny policy: `runtime`, `params`, and some charts with their records."""

    runtime: object
    params: object
    charts: list


@pytest.fixture(scope="session")
def pool():
    """One warm executor pool in the synthetic charts' house style."""
    from mmrecoder_jax.data.sources import synthetic_env
    from mmrecoder_jax.env import ChartEnv

    with ChartEnv(synthetic_env(workers=2)) as env:
        yield env


@pytest.fixture(scope="session")
def policy(tmp_path_factory, pool) -> Policy:
    from mmrecoder_jax import runtime, stages
    from mmrecoder_jax.config import load

    workdir = str(tmp_path_factory.mktemp("policy"))
    config = load("sft_chart2code", "smoke")
    config.data.update({"train_count": 12, "val_count": 4, "test_count": 4})
    stages.ensure_charts(config, workdir, pool)
    built = runtime.build(config, workdir, stages.ensure_tokenizer(config, workdir))
    runtime.prepare_workdir(built)
    charts = built.charts("train")
    return Policy(built, built.initial_params(), [charts[i] for i in range(len(charts))])
