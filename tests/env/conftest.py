import pytest

from mmrecoder_jax.env import EnvConfig, ExecutorPool


@pytest.fixture(scope="package")
def pool():
    """One executor with what most tests need; small limits."""
    with ExecutorPool(
        EnvConfig(
            workers=1,
            preload=("numpy", "matplotlib"),
            wall_seconds=6,
            cpu_seconds=3,
            memory_mb=1024,
        )
    ) as pool:
        yield pool


@pytest.fixture(scope="package")
def styled_pool():
    """Two executors with a house style, which also record what was drawn before an error.

    The trainer that starts them has a secret in its environment.
    """
    config = EnvConfig(
        workers=2, preload=(), dpi=50, rc_params={"figure.facecolor": "black"}, partial=True
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", "secret")
        with ExecutorPool(config) as pool:
            yield pool
