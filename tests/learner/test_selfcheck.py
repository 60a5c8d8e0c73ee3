"""The self-check: right kernels pass, wrong ones are named, replaced or refused."""

import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrecoder_jax.config import ConfigError, load, set_fields
from mmrecoder_jax.learner import selfcheck
from mmrecoder_jax.learner.selfcheck import (
    attention_by_hand,
    check,
    check_attention,
    format_findings,
    relative,
    settle_attention,
)
from mmrecoder_jax.models import attention
from mmrecoder_jax.models.config import preset


def config_with(**fields):
    """Lengths that kernels apply to: 128 tokens, images of 8 windows of 16 patches."""
    config = load("sft_chart2code", "smoke")
    fields = {"data__lengths": (128,), "data__windows": (8,)} | fields
    set_fields(config, {name.replace("__", "."): value for name, value in fields.items()})
    return config


def plain(q, k, v, q_segments, kv_segments, *, causal, interpret=False):
    """A right kernel."""
    return attention.attend(q, k, v, q_segments, kv_segments, 0 if causal else None, "xla")


@jax.custom_vjp
def without_gradient(x):
    """x; its gradient is NaN."""
    return x


without_gradient.defvjp(lambda x: (x, None), lambda _, slope: (slope * jnp.nan,))


def broken(q, k, v, q_segments, kv_segments, *, causal, interpret=False):
    """A kernel whose output is right and whose dQ is NaN, as cuDNN's was."""
    return plain(without_gradient(q), k, v, q_segments, kv_segments, causal=causal)


def skewed(q, k, v, q_segments, kv_segments, *, causal, interpret=False):
    """The scale of the scores is 10 % too large: finite, and wrong."""
    return plain(1.1 * q, k, v, q_segments, kv_segments, causal=causal)


def test_plain_matmuls_are_right():
    """On a CPU: beside float64, and the model beside itself."""
    found = check(config_with())
    assert all(f.right and f.kernel == "xla" for f in found)
    alone = [f for f in found if not f.what.startswith("model")]
    assert len(alone) == 12 and all(0 < f.error < 1e-5 for f in alone)
    model = [f for f in found if f.what.startswith("model")]
    assert len(model) == 5 and all(f.error == 0 for f in model)
    assert settle_attention(config_with()) is None


def test_plain_matmuls_in_bfloat16_are_right_by_a_wide_margin():
    sizes = dataclasses.replace(preset("tiny"), dtype="bfloat16")
    assert all(f.error < f.allowed / 3 for f in check_attention(sizes, 128, 8))


def test_the_reference_by_hand_is_that_of_automatic_differentiation():
    rng = np.random.default_rng(0)
    q, slope = rng.standard_normal((2, 2, 5, 3, 4))
    k, v = rng.standard_normal((2, 2, 5, 1, 4))
    segments = np.array([[1, 1, 2, 2, 0], [1, 1, 1, 1, 1]], np.int32)
    for causal in (False, True):
        where = jnp.asarray(segments)
        right = functools.partial(plain, q_segments=where, kv_segments=where, causal=causal)
        out, backward = jax.vjp(right, *(jnp.asarray(x, jnp.float32) for x in (q, k, v)))
        by_hand, gradients = attention_by_hand(q, k, v, slope, segments, causal)
        np.testing.assert_allclose(out, by_hand, atol=1e-5)
        for a, b in zip(backward(jnp.asarray(slope, jnp.float32)), gradients, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_an_error_of_what_is_not_finite_is_never_right():
    assert np.isnan(relative([1.0, np.nan], [1.0, 1.0]))
    assert not selfcheck.Finding("x", "xla", np.nan, 1.0).right


@pytest.mark.slow
@pytest.mark.parametrize("kernel, what", [(broken, "gradient of q"), (skewed, "output")])
def test_a_wrong_kernel_asked_for_by_name_is_refused(monkeypatch, kernel, what):
    monkeypatch.setattr(attention, "_splash", kernel)
    config = config_with(model__attention="splash")
    found = check(config)
    wrong = [f for f in found if not f.right]
    assert {f.kernel for f in wrong} == {"splash"} and any(what in f.what for f in wrong)
    assert any("model: gradients" in f.what for f in wrong)
    # windows do not go through the kernel
    assert all(f.right for f in found if f.what.startswith("windows"))
    table = format_findings(config, found)
    assert f"{len(wrong)} of {len(found)} are wrong" in table
    assert table.count("WRONG") == len(wrong)
    monkeypatch.setattr(selfcheck, "mesh_platform", lambda: "tpu")
    with pytest.raises(ConfigError, match=r"model\.attention='splash'.*--config.model.attention="):
        settle_attention(config)
    assert config.model.attention == "splash"


def on_a_tpu(monkeypatch, kernel):
    """The platform is said to be a TPU, and `kernel` stands in for the Pallas kernel."""
    monkeypatch.setattr(attention, "_splash", kernel)
    for module in (selfcheck, attention):
        monkeypatch.setattr(module, "mesh_platform", lambda: "tpu")


def test_a_wrong_kernel_that_auto_chose_is_replaced_and_said(monkeypatch):
    on_a_tpu(monkeypatch, broken)
    config = config_with()
    said = settle_attention(config)
    assert config.model.attention == "xla"
    assert said.startswith("model.attention=xla: ") and "splash" in said and "\n" not in said


def uncompilable(q, k, v, q_segments, kv_segments, *, causal, interpret=False):
    """A kernel that the card's compiler refuses."""
    raise jax.errors.JaxRuntimeError("INTERNAL: no such instruction\nand a long trace")


def test_a_kernel_that_does_not_compile_is_replaced_and_said(monkeypatch):
    on_a_tpu(monkeypatch, uncompilable)
    config = config_with()
    found = check(config)
    failed = [f for f in found if f.failure]
    assert {f.failure for f in failed} == {"INTERNAL: no such instruction"}
    assert not any(f.right for f in failed) and any("model: loss" in f.what for f in failed)
    assert "INTERNAL: no such instruction" in format_findings(config, found)
    said = settle_attention(config)
    assert config.model.attention == "xla"
    assert "INTERNAL: no such instruction" in said and "\n" not in said


def test_the_command_prints_the_table_and_needs_no_workdir(tmp_path):
    command = ["-m", "mmrecoder_jax.train", "--config=configs/sft_chart2code.py:smoke"]
    done = subprocess.run(
        [sys.executable, *command, "--selfcheck"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "all are right" in done.stdout and "model: gradients of the decoder" in done.stdout


def test_a_right_kernel_stays(monkeypatch):
    on_a_tpu(monkeypatch, plain)
    config = config_with()
    assert settle_attention(config) is None and config.model.attention == "auto"


def test_where_even_plain_matmuls_are_wrong_nothing_runs(monkeypatch):
    on_a_tpu(monkeypatch, plain)
    monkeypatch.setattr(selfcheck, "attention_by_hand", lambda q, *_: (q * 2, (q, q, q)))
    with pytest.raises(ConfigError, match="another version of jax"):
        settle_attention(config_with(data__lengths=(112,), data__windows=(6,)))
