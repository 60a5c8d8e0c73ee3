import pytest

from mmrecoder_jax.env import EnvConfig, ExecutorPool


@pytest.fixture(scope="package")
def pool():
    """One executor with what every test needs; small limits."""
    with ExecutorPool(EnvConfig(workers=1, preload=("numpy", "matplotlib"), wall_seconds=6, cpu_seconds=3, memory_mb=1024)) as pool:
        yield pool
