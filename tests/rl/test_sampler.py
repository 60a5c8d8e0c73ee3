"""What a token is drawn from, what ends a response, and that a row is what it would be alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrecoder_jax.data.batching import Piece, VisionLayout, pad_prompts
from mmrecoder_jax.models.config import PRESETS
from mmrecoder_jax.models.processor import window_patches
from mmrecoder_jax.models.qwen2_5_vl import Qwen25VL, init_params
from mmrecoder_jax.models.sharding import make_mesh
from mmrecoder_jax.rl.sampler import (
    Places,
    Plan,
    Sampler,
    SamplerSpec,
    bounded,
    ends,
    noise,
    sample,
)

SIZES = dataclasses.replace(PRESETS["tiny"], num_layers=2, scan_unroll=1)
IMAGE, PAD, END = 500, 501, 7
SPEC = SamplerSpec(
    response_length=20, forbidden=(IMAGE, PAD), eos_ids=(END,), pad_id=PAD, temperature=1.0, chunk=6
)
KEY = jax.random.key(5)


# ------------------------------------------------------------ one token

LOGITS = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.04, 0.01], np.float32))
NOTHING = np.zeros(6, bool)


def draws(count=4000, forbidden=NOTHING, **choices):
    """(ids, log-probabilities of the policy, of what they were drawn from) of many draws."""
    spec = dataclasses.replace(SPEC, **choices)
    keys = jax.random.split(jax.random.key(0), count)
    logits = jnp.broadcast_to(jnp.asarray(LOGITS), (count, 6))
    found = sample(
        spec, jnp.float32(spec.temperature), forbidden, logits, keys, jnp.zeros(count, jnp.int32)
    )
    return [np.asarray(x) for x in found]


@pytest.mark.parametrize(
    "choices, kept",
    [
        ({}, 6),
        ({"top_k": 2}, 2),
        ({"top_k": 99}, 6),
        ({"top_p": 0.8}, 3),  # 0.4 + 0.3 is less, the third reaches it
        ({"top_p": 0.7}, 2),
        ({"top_p": 0.01}, 1),  # the most probable one always stays
        ({"min_p": 0.3}, 3),  # 0.12 and more
        ({"min_p": 1.0}, 1),
        ({"top_k": 3, "top_p": 0.6}, 2),  # of 0.85: 0.47, 0.82
        ({"top_p": 0.9, "min_p": 0.5}, 2),
    ],
)
def test_only_what_is_left_is_drawn_and_as_often_as_it_should(choices, kept):
    ids, logps, sampled = draws(**choices)
    np.testing.assert_array_equal(np.unique(ids), np.arange(kept))
    right = np.exp(LOGITS[:kept]) / np.exp(LOGITS[:kept]).sum()
    np.testing.assert_allclose(np.bincount(ids, minlength=kept) / len(ids), right, atol=0.03)
    np.testing.assert_allclose(logps, LOGITS[ids], atol=1e-5)  # of the policy, which is not cut
    np.testing.assert_allclose(sampled, np.log(right)[ids], atol=1e-5)


def test_temperature_and_forbidden_ids_are_part_of_the_policy():
    banned = NOTHING.copy()
    banned[0] = True
    ids, logps, sampled = draws(temperature=0.5, forbidden=banned)
    right = np.exp(2 * LOGITS) * ~banned
    np.testing.assert_allclose(
        np.bincount(ids, minlength=6) / len(ids), right / right.sum(), atol=0.03
    )
    np.testing.assert_allclose(logps, np.log((right / right.sum())[ids]), atol=1e-5)
    np.testing.assert_array_equal(logps, sampled)


@pytest.mark.parametrize("turn, uid, token", [(1, 4, 0), (2, 4, 0), (1, 5, 0), (1, 4, 9)])
def test_what_is_drawn_is_the_largest_sum_of_log_probability_and_noise(turn, uid, token):
    step_key = jax.random.key(token + 100 * turn)
    row = jax.random.fold_in(jax.random.fold_in(step_key, turn), uid)
    drawn, _, _ = sample(
        *(SPEC, jnp.float32(1.0), NOTHING, jnp.asarray(LOGITS)[None]),
        *(row[None], jnp.array([token], jnp.int32)),
    )
    assert int(drawn[0]) == int((LOGITS + noise(step_key, turn, uid, token, 6)).argmax())


def test_greedy_takes_the_most_probable():
    assert (draws(temperature=0.0)[0] == 0).all()


def test_what_ends_a_response():
    spec = dataclasses.replace(SPEC, eos_ids=(7, 8), stop=((1, 2), (3,)))
    tokens = jnp.asarray(
        [[7, 0, 0], [0, 8, 0], [1, 2, 0], [2, 1, 0], [0, 3, 0], [2, 0, 0], [1, 0, 2]]
    )
    at = jnp.asarray([0, 1, 1, 1, 1, 0, 2])
    token = tokens[jnp.arange(7), at]
    assert ends(spec, tokens, at, token).tolist() == [True, True, True, False, True, False, False]


def test_bounds_hold_what_they_must_and_are_few():
    found = {bounded(length, 1000, 4) for length in range(1, 1001)}
    assert found == {(250, 250), (500, 250), (750, 250), (1000, 250)}
    assert all(bounded(length, 1000, 4)[0] >= length for length in range(1, 1001))
    assert bounded(5000, 1000, 4)[0] == 1000


# ------------------------------------------------------------ many conversations


@pytest.fixture(scope="module")
def params():
    return init_params(SIZES, jax.random.key(1))


def prompts(numbers):
    """Prompts of unequal length with one image each; number n is the same in every batch."""
    pieces = []
    for n in numbers:
        rng = np.random.default_rng(n)
        image = window_patches(rng.integers(0, 256, (112, 168, 3), np.uint8), SIZES.vision)
        ids = rng.integers(10, 400, 30 + n % 8).astype(np.int32)
        ids[4 : 4 + len(image.slots)] = IMAGE
        pieces.append(Piece(ids, 0, (image,)))
    layout = VisionLayout.of(SIZES, IMAGE, PAD, 1)
    return pad_prompts(pieces, [()] * len(pieces), 40, 6, len(pieces), layout)


@functools.cache
def sampler_of(spec):
    """One for each choice: its programs are compiled once."""
    return Sampler(Qwen25VL(SIZES), spec, make_mesh())


def answers(params, numbers, **choices):
    sampler = sampler_of(dataclasses.replace(SPEC, **choices))
    return sampler.answer(params, prompts(numbers), numbers, KEY)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_does_not_depend_on_its_neighbours(params, temperature):
    together = answers(params, [0, 1, 2, 3], temperature=temperature)
    for place, numbers in ((0, [1, 9, 8, 3]), (2, [7, 6, 1, 5])):
        again = answers(params, numbers, temperature=temperature)
        np.testing.assert_array_equal(again[place].ids, together[1].ids)
        np.testing.assert_allclose(again[place].logps, together[1].logps, atol=1e-5)
    assert not np.array_equal(together[0].ids, together[1].ids)


def test_responses_end_where_they_should(params):
    found = answers(params, range(4), eos_ids=tuple(range(0, 400, 20)))
    for response in found:
        ending = np.flatnonzero(response.ids % 20 == 0)
        assert response.finished == bool(len(ending))
        assert len(response.ids) == (ending[0] + 1 if len(ending) else SPEC.response_length)
    assert {response.finished for response in found} == {True, False} or len(found[0].ids) < 20
    first = found[0].ids
    stopped = answers(params, range(4), eos_ids=(), stop=(tuple(first[:3].tolist()),))
    np.testing.assert_array_equal(stopped[0].ids, first[:3])
    assert stopped[0].finished


def test_a_group_that_shares_its_prefix_writes_what_its_rows_would_alone(params):
    """Four rows of two prefixes, in places that are not in order, beside rows of their own."""
    sampler = sampler_of(SPEC)
    alone = sampler.answer(params, prompts([0, 0, 1, 1]), [10, 11, 12, 13], KEY)
    state = sampler.begin(Places(rows=4, prefixes=2, row_slots=20, prefix_slots=40))
    state = sampler.prefill(params, state, prompts([0, 1]), np.array([1, 0]))
    # row 0: prompt 1 first of its group; row 1: prompt 0; row 2: prompt 0; row 3: prompt 1
    plan = Plan(
        start=np.ones(4, bool),
        prefix=np.array([0, 1, 1, 0], np.int32),
        members=np.array([[3, 0], [1, 2]], np.int32),
        place=np.array([1, 2, 3, 0], np.int32),
        uid=np.array([12, 10, 11, 13], np.uint32),
        turn=np.ones(4, np.int32),
        limit=np.array([20, 20, 20, 5], np.int32),
    )
    weights = sampler.weights(params)
    for step in range(4):
        state = sampler.decode(weights, state, plan, KEY, (40, 6 * step))
        plan = plan.replace(start=np.zeros(4, bool))
    found = sampler.responses(state, range(4))
    for row, number in ((0, 2), (1, 0), (2, 1)):
        np.testing.assert_array_equal(found[row].ids, alone[number].ids)
    np.testing.assert_array_equal(found[3].ids, alone[3].ids[:5])  # cut at its own limit
    assert not found[3].finished


def test_a_promoted_turn_is_what_it_was_in_its_row(params):
    """A turn moved behind its prefix, then feedback there and a second turn: the same as feedback
    in the row.
    """
    sampler = sampler_of(SPEC)
    weights, here = sampler.weights(params), np.array([0])
    places = Places(rows=1, prefixes=1, row_slots=80, prefix_slots=100)
    turn = Plan(
        start=np.ones(1, bool),
        prefix=np.zeros(1, np.int32),
        members=np.zeros((1, 1), np.int32),
        place=np.zeros(1, np.int32),
        uid=np.array([3], np.uint32),
        turn=np.ones(1, np.int32),
        limit=np.full(1, 20, np.int32),
    )
    second = turn.replace(turn=np.full(1, 2, np.int32))
    feedback = prompts([4])
    written = []
    for promoted in (False, True):
        state = sampler.prefill(params, sampler.begin(places), prompts([0]), here)
        for chunk in range(4):
            start = np.array([chunk == 0])
            state = sampler.decode(weights, state, turn.replace(start=start), KEY, (40, 20))
        held = np.asarray(state.lengths)
        if promoted:
            state = sampler.promote(state, here, here)
            state = sampler.extend_prefix(params, state, feedback, here)
        else:
            state = sampler.extend(params, state, feedback, here, here, held, [None])
        for chunk in range(4):
            start = np.array([promoted and chunk == 0])
            state = sampler.decode(weights, state, second.replace(start=start), KEY, (100, 60))
        written.append(sampler.responses(state, [0])[0])
    np.testing.assert_array_equal(written[0].ids, written[1].ids)
    np.testing.assert_allclose(written[0].logps, written[1].logps, atol=1e-4)
