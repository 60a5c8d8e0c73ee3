"""The divergence of turns by hand, whatever the batch they are packed into."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from mmrecoder_jax.data.batching import (
    BatchShape,
    Collate,
    Piece,
    TokenRow,
    VisionLayout,
    loss_mask,
    slots_of_rows,
    with_advantages,
)
from mmrecoder_jax.rl.divergence import OfTurns, divergence_of_turns
from mmrecoder_jax.rl.losses import Divergence, divergence
from mmrecoder_jax.rl.trajectory import Mode

LAYOUT = VisionLayout(1, 0, 4, 12)
LOGPS = {5: -1.0, 6: -2.0, 7: -0.5}  # of a token, by the policy
REFERENCE = {5: -1.5, 6: -1.0, 7: -0.5}
ESTIMATES = {  # by hand: d = -0.5, 1, 0
    Divergence.K1: {5: 0.5, 6: -1.0, 7: 0.0},
    Divergence.K2: {5: 0.125, 6: 0.5, 7: 0.0},
    Divergence.K3: {5: np.exp(-0.5) - 0.5, 6: np.e - 2.0, 7: 0.0},
}


def piece(ids, turn: int) -> Piece:
    return Piece(np.array(ids, np.int32), turn)


def group_of(*answers, loss_turns=(1, 2), first=None) -> list[TokenRow]:
    """A group's rows from the tokens of both turns; they share the prompt, and `first` if given."""
    prompt, feedback = piece([2, 3, 4], 0), piece([3, 3], 0)
    return [
        TokenRow((prompt, first or piece(one, 1), feedback, piece(two, 2)), loss_turns)
        for one, two in answers
    ]


ROWS = [
    *group_of(([5, 6], [7]), ([6], [5, 5, 5])),
    *group_of(([7, 7], [6, 6]), ([5], [6, 5])),
]


def packed(rows, micro_rows=4, ways=1, budget=0):
    shape = BatchShape(micro_rows, (16,), (1,), 0, sampled=True, budget=budget, numbered=True)
    return Collate(shape, dataclasses.replace(LAYOUT, ways=ways))(rows)


def of_tokens(batch, values) -> np.ndarray:
    """Log-probabilities of a batch's tokens; what is shown is infinitely improbable."""
    found = np.vectorize(lambda token: values.get(token, -np.inf))(batch["tokens"])
    return found.astype(np.float32)


def found_in(batch, rows, kind=Divergence.K1, mode=Mode.FULL_TRAJECTORY) -> OfTurns:
    with np.errstate(invalid="ignore"):
        both = of_tokens(batch, LOGPS), of_tokens(batch, REFERENCE)
        return divergence_of_turns(*both, batch, rows, 2, mode, kind)


@pytest.mark.parametrize("kind", Divergence)
def test_an_estimate_of_each_token(kind):
    logps, reference = (jnp.array(list(x.values())) for x in (LOGPS, REFERENCE))
    expected = list(ESTIMATES[kind].values())
    np.testing.assert_allclose(divergence(kind, logps, reference), expected, atol=1e-6)


@pytest.mark.parametrize("kind", Divergence)
def test_a_turn_has_the_sum_of_its_tokens(kind):
    of = ESTIMATES[kind]
    five, six = of[5], of[6]
    expected = [[five + six, 0], [six, 3 * five], [0, 2 * six], [five, six + five]]
    found = found_in(packed(ROWS), ROWS, kind)
    np.testing.assert_allclose(found.sums, expected, atol=1e-5)
    np.testing.assert_array_equal(found.tokens, [[2, 1], [1, 3], [2, 2], [1, 2]])


@pytest.mark.parametrize("how", [(2, 1, 0), (4, 2, 0), (4, 4, 0), (2, 2, 0), (4, 1, 20)])
def test_how_a_batch_is_cut_changes_nothing(how):
    whole = found_in(packed(ROWS), ROWS, Divergence.K3)
    cut = found_in(packed(ROWS, *how), ROWS, Divergence.K3)
    np.testing.assert_array_equal(cut.sums, whole.sums)
    np.testing.assert_array_equal(cut.tokens, whole.tokens)


def test_stage_1_counts_the_turn_that_it_trains():
    rows = group_of(([], [5]), ([], [6, 6]), loss_turns=(2,), first=piece([5, 6, 6], 1))
    found = found_in(packed(rows), rows, mode=Mode.SHARED_FIRST_TURN)
    np.testing.assert_allclose(found.sums, [[0, 0.5], [0, -2.0]], atol=1e-6)
    np.testing.assert_array_equal(found.tokens, [[0, 1], [0, 2]])


def test_a_masked_turn_counts_whole():
    rows = [*group_of(([5], [5, 6]), loss_turns=(1,)), *group_of(([5], [5]))]
    np.testing.assert_allclose(found_in(packed(rows), rows).sums, [[0.5, -0.5], [0.5, 0.5]])


def test_rows_that_rest_are_left_out():
    empty = TokenRow((piece([0], 0),), ())
    batch = packed([*ROWS[:2], empty, empty])
    np.testing.assert_allclose(found_in(batch, ROWS[:2]).sums, [[-0.5, 0], [-1.0, 1.5]])


def test_metrics_are_means_of_tokens_and_of_trajectories():
    found = OfTurns(np.array([[1.0, 2.0], [0.0, 3.0]]), np.array([[4.0, 4.0], [2.0, 10.0]]))
    assert found.metrics(0.1) == pytest.approx({"kl": 6 / 20, "kl_penalty": 0.1 * 6 / 2})


@pytest.mark.parametrize("how", [(4, 1, 0), (2, 2, 0), (4, 1, 20)])
def test_a_batch_with_other_advantages_is_that_of_rows_that_have_them(how):
    others = [
        dataclasses.replace(row, advantage=9.0, turn_advantages=(0.5 + i, -1.0 - i))
        for i, row in enumerate(ROWS)
    ]
    turns = np.array([row.turn_advantages for row in others])
    found, expected = with_advantages(packed(ROWS, *how), ROWS, turns), packed(others, *how)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        seen = expected["weights"] != 0 if name == "advantages" else ...
        np.testing.assert_array_equal(found[name][seen], values[seen], err_msg=name)
    assert np.unique(found["advantages"]).size == 1 + 8


def test_every_row_of_a_batch_is_found_with_its_tokens():
    batch = packed(ROWS, 2, 2)
    seen = {n: batch["tokens"][*part, slots] for n, part, slots in slots_of_rows(batch)}
    assert sorted(seen) == [0, 1, 2, 3]
    for number, row in enumerate(ROWS):
        ids = np.concatenate([p.ids for p in row.pieces])
        np.testing.assert_array_equal(seen[number], ids)
        assert len(loss_mask(row)) == len(ids)
