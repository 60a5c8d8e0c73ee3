"""Attempts to be paid for a chart that is not in the picture."""

import pytest

from mmrecoder_jax.env import EnvConfig, ExecutorPool
from mmrecoder_jax.env.chartmimic import score
from tests.env.child.gaming import ATTEMPTS, TARGETS


@pytest.fixture(scope="module")
def pool():
    config = EnvConfig(workers=2, preload=("numpy", "matplotlib"), replay_share=1.0)
    with ExecutorPool(config) as pool:
        yield pool


@pytest.fixture(scope="module")
def records(pool):
    return {name: run.record for name, run in zip(TARGETS, pool.run(TARGETS.values()), strict=True)}


@pytest.mark.parametrize("name", TARGETS)
def test_each_target_shows_all_parts(records, name):
    own = records[name]
    assert own.texts and own.layout and own.types and own.colors
    assert score(own, own).overall == 1


@pytest.mark.parametrize("attempt", ATTEMPTS, ids=lambda attempt: attempt.name)
def test_an_attempt_is_paid_what_its_picture_deserves(pool, records, attempt):
    (run,) = pool.run([attempt.code])
    assert run.ok, run.error
    assert score(run.record, records[attempt.target]).overall <= attempt.most + 1e-6
