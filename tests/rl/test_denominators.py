"""Exact denominators: the loss and the step of a batch are those of its rows one by one, however
they are cut into micro-batches, packed, or dealt to devices, hosts and mini-batches.

Rows have 1 to 128 loss tokens, some none. The reference is written row by row in float64
(`tests.rl.denominators`) and calls nothing of the product.
"""

import sys

import jax
import numpy as np
import pytest

from tests.learner.processes import run
from tests.rl.denominators import (
    AGGREGATIONS,
    COUNTS,
    GROUP,
    PROMPTS,
    plain,
    rows_of,
    table,
    trained,
)
from tests.rl.denominators_main import CASES, RATE

# rows of a micro-batch, budget of tokens, whether prompts are in common
CUTS = {
    "one go": (GROUP * PROMPTS, 0, False),
    "micro-batches": (GROUP, 0, False),
    "single rows": (1, 0, False),
    "prefixes in common": (GROUP * PROMPTS, 0, True),
    "prefixes and micro-batches": (2 * GROUP, 0, True),
    "filled to a budget": (GROUP, 300, True),
}
SLOW = pytest.mark.slow
LOSSES = {
    "grpo": {},
    "kl": {"kl_coef": 0.7},
    "k2 and entropy": {"kl_coef": 0.7, "kl": "k2", "entropy_coef": 0.4},
    "cispo": {"objective": "cispo"},
}


def agree(found, wanted):
    (losses, ended), (wanted_losses, wanted_table) = found[:2], wanted
    np.testing.assert_allclose(losses, wanted_losses, rtol=2e-5, atol=1e-6)
    moved = np.abs(wanted_table - table(1)).max()
    assert moved > 0.05, "this test would not notice a gradient of 0"
    np.testing.assert_allclose(ended, wanted_table, atol=1e-5 * max(moved, 1.0))


def test_the_rows_are_very_unequal():
    counts = [row.loss_tokens() for row in rows_of(shared=True)]
    assert max(counts) == 128 and min(counts) == 0 and sum(count == 1 for count in counts) > 1
    assert len(counts) == GROUP * PROMPTS and len(COUNTS[0]) == GROUP


FAST = ("prefixes and micro-batches", "filled to a budget")


@pytest.mark.parametrize(
    "cut", [pytest.param(cut, marks=[] if cut in FAST else SLOW) for cut in CUTS]
)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_however_a_batch_is_cut(aggregation, cut):
    most, budget, shared = CUTS[cut]
    rows, fields = rows_of(shared), {"aggregation": aggregation}
    found = trained(rows, fields, 1, most, budget, RATE, jax.devices()[:1])
    assert (found[2] > 1) == (most < len(rows)), "the batch was not cut"
    agree(found, plain(rows, fields, 1, RATE))


@SLOW
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_stage_1_shares_its_first_turn_and_trains_the_last(aggregation):
    rows, fields = rows_of(shared=True, last_turn=True), {"aggregation": aggregation}
    found = trained(rows, fields, 1, 2 * GROUP, 0, RATE, jax.devices()[:1])
    agree(found, plain(rows, fields, 1, RATE))


@pytest.mark.parametrize("parts", [2, pytest.param(4, marks=SLOW)])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_each_mini_batch_is_divided_by_its_own_counts(aggregation, parts):
    rows, fields = rows_of(shared=True), {"aggregation": aggregation}
    found = trained(rows, fields, parts, GROUP, 0, RATE, jax.devices()[:1])
    agree(found, plain(rows, fields, parts, RATE))


@SLOW
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("cut", ["one go", "filled to a budget", "prefixes and micro-batches"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_every_loss_in_every_cut(aggregation, loss, cut, parts):
    most, budget, shared = CUTS[cut]
    rows, fields = rows_of(shared), {"aggregation": aggregation} | LOSSES[loss]
    found = trained(rows, fields, parts, most // parts, budget, RATE, jax.devices()[:1])
    agree(found, plain(rows, fields, parts, RATE))


@SLOW
@pytest.mark.parametrize("cut", ["one go", "filled to a budget"])
def test_a_ratio_of_a_row_is_over_its_own_tokens(cut):
    most, budget, shared = CUTS[cut]
    rows, fields = rows_of(shared), {"aggregation": "sequence_mean", "objective": "gspo"}
    found = trained(rows, fields, 2, most // 2, budget, RATE, jax.devices()[:1])
    agree(found, plain(rows, fields, 2, RATE))


@SLOW
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_however_a_batch_is_dealt_to_devices_and_hosts(hosts, tmp_path):
    run([sys.executable, "-m", "tests.rl.denominators_main", str(tmp_path)], hosts)
    rows = rows_of(shared=True)
    parts_of = [np.load(tmp_path / f"{host}.npz") for host in range(hosts)]
    for name, (fields, parts, _, _) in CASES.items():
        wanted = plain(rows, fields, parts, RATE)
        for found in parts_of:
            agree((found[f"{name} losses"], found[f"{name} table"]), wanted)
