"""Modes of the sandbox, and what is said where a layer is missing (test_attacks enters them)."""

import pytest

from mmrecoder_jax.env.sandbox import confinement
from mmrecoder_jax.env.sandbox.confinement import SandboxMode, SandboxUnavailable


def test_modes_by_name():
    assert [confinement.check(mode) for mode in ("auto", "unsafe", "landlock", "seccomp")] == [
        *SandboxMode
    ]


def test_an_unknown_mode_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'none'.*auto, unsafe, landlock, seccomp"):
        confinement.check("none")


@pytest.mark.parametrize(
    ("layer", "missing"), [("landlock_abi", "Landlock"), ("has_seccomp", "seccomp filters")]
)
def test_a_missing_layer_is_named_with_the_remedy(monkeypatch, layer, missing):
    monkeypatch.setattr(confinement, layer, lambda: 0)
    with pytest.raises(SandboxUnavailable, match=rf"lacks {missing}.*sandbox=\"unsafe\""):
        confinement.check("auto")
    assert confinement.check("unsafe") == SandboxMode.UNSAFE
