"""Tokens that rows have in common are computed once: losses and gradients are those of the rows one
by one, whatever computes attention.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrecoder_jax.data.batching import BatchShape, Collate, Piece, TokenRow, VisionLayout
from mmrecoder_jax.models.config import LoraConfig
from mmrecoder_jax.models.processor import Processor, Segment
from mmrecoder_jax.models.qwen2_5_vl import Qwen25VL, init_params
from mmrecoder_jax.rl.losses import weighted_sum
from mmrecoder_jax.rl.policy import policy_logps
from tests.models.conversation import (
    PIXELS,
    ByteTokenizer,
    model_inputs,
    picture,
    small_config,
    stack_images,
)
from tests.rows import by_row, first_micro

GROUP, LENGTH, WINDOWS = 3, 128, 4
CONFIG = small_config(num_layers=2)


def group(seed, parts_at):
    """A group's rows of two turns, with images, which part before turn `parts_at`; losses and
    advantages of their own.
    """
    rng = np.random.default_rng(seed)
    process = Processor(ByteTokenizer(), CONFIG.vision, *PIXELS, system=None)

    def image():
        return process.image(picture(56, 28 * int(rng.integers(1, 4)), int(rng.integers(99))))

    def answer(turn):
        return Piece(rng.integers(97, 123, rng.integers(5, 20)).astype(np.int32), turn)

    def fed_back():
        return Piece.shown(process.feedback_prompt("Better", (image(),), closed=True))

    def later():
        return [answer(1), fed_back(), answer(2)]

    common = [Piece.shown(process.first_prompt("draw", image()))]
    common += later()[:2] if parts_at == 2 else []
    return [
        TokenRow(
            (*common, *later()[2 * (parts_at - 1) :]),
            (2,) if parts_at == 2 else (1, 2),
            0.5 * member - 0.4 + seed,
        )
        for member in range(GROUP)
    ]


@functools.cache
def rows_of(parts_at):
    """Two groups, and a row on its own."""
    return [*group(1, parts_at), *group(2, parts_at), group(3, 1)[0]]


def apart(rows):
    """The same rows, of which none shares a piece with another."""
    return [
        dataclasses.replace(row, pieces=tuple(dataclasses.replace(p) for p in row.pieces))
        for row in rows
    ]


def layout(ways=1):
    return VisionLayout.of(CONFIG, ByteTokenizer.image_pad_id, 0, ways)


def packed(rows, most=7, ways=1, budget=0):
    shape = BatchShape(most, (LENGTH,), (WINDOWS,), 16 * ways, budget=budget)
    return Collate(shape, layout(ways), aggregation="sequence_mean")(rows)


@functools.cache
def gradient(config):
    """Of a micro-batch."""
    logps = policy_logps(Qwen25VL(config), [3], 0.7, chunk=300)

    def loss(params, micro):
        return weighted_sum(micro["weights"] * micro["advantages"], logps(params, micro)[0])

    return jax.jit(jax.value_and_grad(loss))


def found_by(config, params, batch):
    """(value, gradients), summed over micro-batches."""
    found = [
        gradient(config)(params, {name: jnp.asarray(x[i]) for name, x in batch.items()})
        for i in range(len(batch["tokens"]))
    ]
    return jax.tree.map(lambda *parts: sum(parts), *found)


def plain_loss(config, params, rows):
    """Row by row, by the forward pass that is compared with the reference implementation."""
    net, total = Qwen25VL(config), 0.0
    images = [image for row in rows for image in row.images]
    arrays, cells = stack_images(images, WINDOWS)
    arrays = [jnp.asarray(x) for x in arrays]
    segments = [Segment(np.concatenate([p.ids for p in row.pieces]), row.images) for row in rows]
    inputs = {
        name: jnp.asarray(x) for name, x in model_inputs(segments, LENGTH, rows=cells).items()
    }
    features = net.apply({"params": params}, *arrays, method="encode_images")
    order = inputs["tokens"], inputs["positions"], inputs["segment_ids"], inputs["vision_index"]
    hidden = net.apply({"params": params}, *order, features)
    logits = net.apply({"params": params}, hidden, method="logits") / 0.7
    logps = jax.nn.log_softmax(logits.at[..., 3].set(-1e30))
    for r, row in enumerate(rows):
        of_row = np.concatenate([np.full(len(p.ids), p.turn in row.loss_turns) for p in row.pieces])
        at = np.flatnonzero(of_row)
        chosen = logps[r, at - 1, inputs["tokens"][r, at]]
        total += chosen.sum() / len(at) / len(rows) * row.advantage
    return total


@functools.cache
def plain_gradient(config, parts_at):
    """Of `rows_of(parts_at)` one by one, as a function of the parameters."""
    return jax.jit(jax.value_and_grad(lambda p: plain_loss(config, p, rows_of(parts_at))))


def agree(found, wanted):
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5, atol=1e-6)
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(wanted[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 + 1e-5 * float(np.abs(b).max()))


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


@pytest.mark.parametrize("parts_at", [1, 2])
def test_a_prefix_in_common_changes_neither_loss_nor_gradient(params, parts_at):
    rows = rows_of(parts_at)
    batch, alone = packed(rows), packed(apart(rows))
    tokens, without = ((first_micro(b)["home"] >= 0).sum() for b in (batch, alone))
    in_common = sum(len(p.ids) for row in rows[:6:3] for p in row.pieces[: 2 * parts_at - 1])
    assert without == sum(row.length for row in rows) == tokens + (GROUP - 1) * in_common
    assert (first_micro(batch)["patch_valid"].any(axis=(1, 2))).sum() == len(
        {id(image) for row in rows for image in row.images}
    )
    wanted = plain_gradient(CONFIG, parts_at)(params)
    agree(found_by(CONFIG, params, batch), wanted)
    agree(found_by(CONFIG, params, alone), wanted)


VARIANTS = {
    "remat": {"remat": "full"},
    "unrolled": {"scan_unroll": 2},
    "splash": {"attention": "splash"},
    "untied": {"tie_word_embeddings": False},
    "lora": {"lora": LoraConfig(4, 8.0, ("q_proj", "v_proj", "down_proj"))},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_so_it_is_in_every_variant_of_the_model(changes):
    config = dataclasses.replace(CONFIG, **changes)
    params = init_params(config, jax.random.key(1))
    if config.lora.rank:  # at first the second factor is zero, and the first has no gradient
        params = jax.tree.map(lambda x: x + 0.01, params)
    found = found_by(config, params, packed(rows_of(2)))
    # the others compute what the model does without them
    plain = config if changes.keys() <= {"lora", "tie_word_embeddings"} else CONFIG
    wanted = plain_gradient(plain, 2)(params)
    if "attention" not in changes:
        agree(found, wanted)
        return
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-4)
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(wanted[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 + 1e-4 * float(np.abs(b).max()))


@pytest.mark.parametrize("most, budget", [(3, 0), (7, 200), (4, 150)])
def test_so_it_is_however_rows_are_dealt_out(params, most, budget):
    rows = rows_of(1)
    batch = packed(rows, most, budget=budget)
    assert len(batch["tokens"]) > 1 and (not budget or batch["tokens"].shape[2] == budget)
    agree(found_by(CONFIG, params, batch), found_by(CONFIG, params, packed(rows)))


def test_every_row_is_whole():
    """Tokens, positions and what they are predicted from, read row by row out of a batch that
    shares, are those of the rows alone; so on two devices.
    """
    rows = rows_of(2)
    alone = packed(apart(rows))
    for batch in (packed(rows), packed([*rows, *group(4, 1)[:1]], most=8, ways=2)):
        micro = first_micro(batch)
        found = {tuple(ids) for ids in by_row(micro, micro["tokens"]) if len(ids)}
        assert found >= {tuple(ids) for ids in by_row(first_micro(alone), alone["tokens"][0])}
        parts = len(micro["tokens"])
        own = len(micro["rows"]) // parts
        for r, row in enumerate(micro["rows"]):
            slots = row[row >= 0]
            np.testing.assert_array_equal(micro["parent"][r // own][slots[1:]], slots[:-1])
            home = micro["home"][r // own][slots]
            np.testing.assert_array_equal(
                micro["rows"][own * (r // own) :][:own].reshape(-1)[home], slots
            )
