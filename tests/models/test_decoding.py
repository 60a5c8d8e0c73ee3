"""Decoding one token a row against the whole forward pass: prefixes shared and not, rows of unequal
length, rows that stand still.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrecoder_jax.models.attention import attend
from mmrecoder_jax.models.config import Kernel
from mmrecoder_jax.models.decoding import (
    Rows,
    cached_attention,
    choose_cached,
    decode_step,
    decoding_weights,
    empty_cache,
)
from mmrecoder_jax.models.qwen2_5_vl import Qwen25VL, init_params, no_past
from tests.models.conversation import small_config

CONFIG = small_config()
RNG = np.random.default_rng(0)
# Two prefixes of unequal length; rows 0, 2 and 3 read the first, row 1 the second, row 4 stands
# still.
PREFIXES, OWN = np.array([7, 4]), np.array([3, 5, 0, 1, 2])
ROWS = Rows(
    members=jnp.array([[0, 2, 3], [1, 4, -1]]),
    place=jnp.array([0, 3, 1, 2, 4]),
    prefix_lengths=jnp.array(PREFIXES, jnp.int32),
    own_lengths=jnp.array(OWN, jnp.int32),
)
PREFIX_OF = np.array([0, 1, 0, 0, 1])
LIVE = np.array([True, True, True, True, False])
SLOTS = (8, 12)
WHOLE = ((8, 4), (12, 3))  # all slots, in blocks


def arrays(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def test_a_row_s_mean_is_that_over_its_prefix_and_its_own_slots():
    """Beside plain attention over both parts, one behind the other."""
    q, k, v = arrays(5, 1, 4, 8), arrays(5, 1, 2, 8), arrays(5, 1, 2, 8)
    prefix = {name: arrays(2, 2, SLOTS[0], 8) for name in "kv"}
    own = {name: arrays(5, 2, SLOTS[1], 8) for name in "kv"}
    mean, kept = cached_attention(q, k, v, jnp.asarray(LIVE), prefix, own, ROWS, WHOLE)
    for row in np.flatnonzero(LIVE):
        held, shared = OWN[row], PREFIXES[PREFIX_OF[row]]
        both = {
            name: jnp.concatenate(
                [
                    prefix[name][PREFIX_OF[row], :, :shared],
                    own[name][row, :, :held],
                    new[row].swapaxes(0, 1),
                ],
                axis=1,
            ).swapaxes(0, 1)[None]
            for name, new in (("k", k), ("v", v))
        }
        seen = jnp.ones((1, shared + held + 1), jnp.int32)
        right = attend(q[row][None], both["k"], both["v"], seen[:, :1], seen)
        np.testing.assert_allclose(mean[row], right[0], atol=1e-5)
        np.testing.assert_array_equal(kept["k"][row, :, held], k[row, 0])
    np.testing.assert_array_equal(kept["v"][4], own["v"][4])  # nobody wrote


def test_what_is_in_slots_that_are_not_valid_does_not_matter():
    q, k, v = arrays(5, 1, 4, 8), arrays(5, 1, 2, 8), arrays(5, 1, 2, 8)
    prefix = {name: arrays(2, 2, SLOTS[0], 8) for name in "kv"}
    own = {name: arrays(5, 2, SLOTS[1], 8) for name in "kv"}
    live = jnp.asarray(LIVE)
    before, _ = cached_attention(q, k, v, live, prefix, own, ROWS, WHOLE)
    past = np.arange(SLOTS[1]) > OWN[:, None]
    own = {name: jnp.where(past[:, None, :, None], 1e9, x) for name, x in own.items()}
    past = np.arange(SLOTS[0]) >= PREFIXES[:, None]
    prefix = {name: jnp.where(past[:, None, :, None], 1e9, x) for name, x in prefix.items()}
    after, _ = cached_attention(q, k, v, live, prefix, own, ROWS, WHOLE)
    np.testing.assert_array_equal(np.asarray(before)[LIVE], np.asarray(after)[LIVE])


def test_slots_beyond_the_bounds_are_not_read():
    """The bounds are what XLA pays for; a row within them is the same to the bit."""
    q, k, v = arrays(5, 1, 4, 8), arrays(5, 1, 2, 8), arrays(5, 1, 2, 8)
    prefix = {name: arrays(2, 2, SLOTS[0], 8) for name in "kv"}
    own = {name: arrays(5, 2, SLOTS[1], 8) for name in "kv"}
    live = jnp.asarray(LIVE)
    whole, _ = cached_attention(q, k, v, live, prefix, own, ROWS, WHOLE)
    bounded, _ = cached_attention(q, k, v, live, prefix, own, ROWS, ((8, 4), (6, 3)))
    np.testing.assert_array_equal(np.asarray(whole)[LIVE], np.asarray(bounded)[LIVE])


@pytest.mark.parametrize("tied", [True, False])
def test_tokens_one_by_one_equal_the_full_forward(tied):
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
    model, params = Qwen25VL(config), init_params(config, jax.random.key(0))
    tokens = jnp.asarray(RNG.integers(0, config.vocab_size, (2, 9)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(9), (2, 3, 9))
    ones = jnp.ones((2, 9), jnp.int32)
    hidden = model.apply({"params": params}, tokens, positions, ones, -ones, None)
    right = model.apply({"params": params}, hidden, method="logits")

    # Row 0 holds 5 tokens in its prefix, row 1 three; the rest comes one by one.
    held = np.array([5, 3])
    _, kept = model.apply(
        {"params": params},
        tokens[:, :5],
        positions[..., :5],
        -ones[:, :5],
        None,
        jnp.asarray(held),
        *no_past(config, 2),
        method="extend",
    )
    prefix = [{name: x[i] for name, x in kept.items()} for i in range(config.num_layers)]
    own = empty_cache(config, 2, 6)
    weights = decoding_weights(params, config)
    identity = np.arange(2, dtype=np.int32)
    for step in range(4):
        at = held + step
        logits, own = decode_step(
            model,
            weights,
            tokens[identity, at],
            jnp.asarray(at),
            jnp.ones(2, bool),
            prefix,
            own,
            Rows(identity[:, None], identity, jnp.asarray(held), jnp.full(2, step)),
            ((5, 3), (6, 4)),
        )
        np.testing.assert_allclose(logits, right[identity, at], atol=2e-4)


@pytest.mark.parametrize(
    "asked, platform, dtype, features, chosen",
    [
        ("auto", "gpu", "bfloat16", 128, Kernel.CUDNN),
        ("cudnn", "cuda", "float16", 80, Kernel.CUDNN),
        ("auto", "gpu", "float32", 128, Kernel.XLA),
        ("auto", "gpu", "bfloat16", 256, Kernel.XLA),
        ("xla", "gpu", "bfloat16", 128, Kernel.XLA),
        ("auto", "tpu", "bfloat16", 128, Kernel.XLA),
        ("cudnn", "cpu", "bfloat16", 128, Kernel.XLA),
        ("splash", "gpu", "bfloat16", 128, Kernel.XLA),
    ],
)
def test_the_kernel_that_counts_slots(asked, platform, dtype, features, chosen):
    assert choose_cached(asked, platform, dtype, features) is chosen
