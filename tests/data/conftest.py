import pytest

from mmrecoder_jax.data.sources import synthetic_env
from mmrecoder_jax.env import ExecutorPool


@pytest.fixture(scope="session")
def pool():
    """Executors in the house style of the synthetic charts."""
    with ExecutorPool(synthetic_env(workers=2)) as pool:
        yield pool
