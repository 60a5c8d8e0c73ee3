"""The script that tries the lowest and the newest versions: what it holds an environment to."""

import runpy
import sys

import pytest

from tests.scripts.run import ROOT, run_script

SCRIPT = runpy.run_path(str(ROOT / "scripts" / "test_versions.py"))


@pytest.mark.parametrize(
    "requirement, held",
    [
        ("jax>=0.10.1,<0.13", "jax==0.10.1"),
        ("jax[tpu]>=0.10", "jax==0.10"),
        ("matplotlib==3.8.4", "matplotlib==3.8.4"),
        ("orbax-checkpoint >= 0.11", "orbax-checkpoint==0.11"),
    ],
)
def test_the_lowest_version_of_a_requirement(requirement, held):
    assert SCRIPT["lower_bound"](requirement) == held


@pytest.mark.parametrize("requirement", ["jax", "jax<1", "jax!=0.10"])
def test_a_requirement_without_a_lower_bound_is_refused(requirement):
    with pytest.raises(ValueError, match="has no lower bound"):
        SCRIPT["lower_bound"](requirement)


def test_every_dependency_that_is_declared_has_one():
    declared = SCRIPT["requirements"](sys.executable, ("test", "charts", "parity", "tpu"))
    held = [SCRIPT["lower_bound"](requirement) for requirement in declared]
    assert "matplotlib==3.8.4" in held and any(line.startswith("torch==") for line in held)


def test_an_environment_that_cannot_be_made_is_a_failure(tmp_path):
    done = run_script("test_versions", "--pythons", "/no/python", f"--where={tmp_path / 'v'}")
    assert done.returncode == 1
    assert done.stdout.count("/no/python") >= 2  # the lowest and the newest
    assert "FAILED: no environment" in done.stdout
