"""The attack corpus against the default sandbox, older Landlock versions, an ordinary user, and (as a control) single layers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmrecoder_jax.env import ExecutorPool, confinement
from tests.env import attacks

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def achieved():
    return attacks.achieved(attacks.QUIET)


@pytest.mark.parametrize("name", attacks.QUIET)
def test_contained(achieved, name):
    assert achieved[name] == []


@pytest.fixture(scope="module")
def heavy():
    with ExecutorPool(attacks.config(workers=2)) as pool:
        results = dict(zip(attacks.HEAVY, pool.run([code for code, _ in attacks.HEAVY.values()]), strict=True))
        left = [path for path in pool._directory.glob("*/work/*")]
        yield results, pool.stats(), left, attacks._processes(str(pool._directory))


@pytest.mark.parametrize("name", attacks.HEAVY)
def test_ended_by_a_limit(heavy, name):
    result = heavy[0][name]
    assert result.status in attacks.HEAVY[name][1].split(), result
    assert result.ok == (result.image is not None)
    assert len(result.error) <= 1200
    assert result.error.isprintable() or "\n" in result.error


def test_executors_outlive_every_attack(heavy):
    _, stats, left, processes = heavy
    assert stats["respawns"] == 0 and left == [] and processes == 2


@pytest.mark.parametrize("abi", [1, 2])
def test_contained_with_an_older_landlock(abi):
    if confinement.landlock_abi() < abi:
        pytest.skip("this kernel's Landlock is older")
    assert {name: won for name, won in attacks.achieved(attacks.OLD_LANDLOCK.split(), abi=abi).items() if won} == {}


@pytest.mark.parametrize(("layers", "abi"), attacks.CONTROLS)
def test_with_a_layer_off_the_attack_succeeds(layers, abi):
    won = attacks.achieved(attacks.CONTROLS[layers, abi].split(), layers, abi)
    assert [name for name, what in won.items() if not what] == []


@pytest.mark.slow
def test_contained_as_an_ordinary_user():
    program = [sys.executable, str(ROOT / "tests/env/attacks.py")]
    options = {"env": {"PYTHONPATH": str(ROOT), "HOME": "/", "PATH": os.defpath}, "stdout": subprocess.PIPE, "timeout": 600}
    if os.geteuid() != 0:
        pytest.skip("the corpus already ran as an ordinary user")
    if subprocess.run([sys.executable, "-c", "import matplotlib"], user=65534, group=65534, extra_groups=(), cwd="/").returncode:
        pytest.skip("an ordinary user cannot run this interpreter")
    done = subprocess.run(program, user=65534, group=65534, extra_groups=(), cwd="/", check=True, **options)
    assert {name: won for name, won in json.loads(done.stdout).items() if won} == {}
