"""The annotations of the package are executed while tests run (`tests.typecheck`)."""

import io

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from mmrecoder_jax.models.config import LoraConfig
from mmrecoder_jax.monitoring.progress import Bar
from mmrecoder_jax.rl.judge.base import VerdictCache
from mmrecoder_jax.rl.judge.visual import VisualJudge
from mmrecoder_jax.rl.losses import sft_loss


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(TypeCheckError, match="weights"):
        sft_loss(jnp.zeros((2, 3)), jnp.zeros((2, 4)))
    with pytest.raises(TypeCheckError, match="logps"):
        sft_loss(jnp.zeros(3), jnp.zeros(3))


def test_shapes_are_checked_under_jit_too():
    with pytest.raises(TypeCheckError, match="weights"):
        jax.jit(sft_loss)(jnp.zeros((2, 3)), jnp.zeros((2, 4)))


def test_a_dataclass_checks_its_fields():
    with pytest.raises(TypeCheckError, match="rank"):
        LoraConfig(rank="8")


def test_what_mypy_allows_is_allowed():
    assert LoraConfig(rank=8, alpha=16).scale == 2.0  # an int for a float
    Bar("count", None, out=io.StringIO())  # a StringIO for a TextIO
    with VisualJudge(VerdictCache()) as judge:  # Self
        assert isinstance(judge, VisualJudge)
