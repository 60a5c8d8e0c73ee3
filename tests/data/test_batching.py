"""Loss masks, weights, images and positions of learner batches, on rows small enough to write
out.
"""

import dataclasses

import numpy as np
import pytest

from mmrecoder_jax.data.batching import (
    BatchShape,
    Collate,
    Piece,
    TokenRow,
    VisionLayout,
    bucket,
    distinct_tokens,
    pad_prompts,
)
from mmrecoder_jax.data.pipeline import learner_batch
from mmrecoder_jax.models.processor import ImagePatches
from tests.rows import by_row, first_micro

IMAGE, PAD = 50, 0
LAYOUT = VisionLayout(IMAGE, PAD, window_patches=16, patch_dim=588)


def image(height: int, width: int, windows: int) -> ImagePatches:
    """An image whose merged grid is `height` x `width`; cells lie in the tower's output in reverse,
    to notice a wrong order.
    """
    slots = np.arange(height * width, dtype=np.int32)[::-1].copy()
    shape = (windows, 16)
    return ImagePatches(
        np.ones((*shape, 588), np.float32),
        np.zeros((*shape, 2), np.int32),
        np.ones(shape, bool),
        (height, width),
        slots,
    )


def piece(ids, turn=0, images=()):
    return Piece(np.array(ids, np.int32), turn, tuple(images))


@pytest.fixture
def row():
    """prompt (1 image of 2x1 cells), response 1, feedback (1 image of 1x3 cells), response 2."""
    target, render = image(2, 1, 1), image(1, 3, 1)
    return TokenRow(
        (
            piece([1, IMAGE, IMAGE, 2], images=[target]),
            piece([11, 12], turn=1),
            piece([3, IMAGE, IMAGE, IMAGE, 4], images=[render]),
            piece([21, 22, 23], turn=2),
        ),
        loss_turns=(2,),
        advantage=1.5,
    )


def collate(rows, shape=None, **options):
    shape = shape or BatchShape(rows=len(rows), lengths=(16, 32), windows=(1, 2), images=4)
    return Collate(shape, LAYOUT, **options)(rows)


def test_stage_1_trains_turn_two_only_and_stage_2_both(row):
    one = collate([row])
    assert np.flatnonzero(one["weights"][0, 0]).tolist() == [11, 12, 13]
    # never prompt, feedback or padding
    both = collate([TokenRow(row.pieces, (1, 2))])
    assert np.flatnonzero(both["weights"][0, 0]).tolist() == [4, 5, 11, 12, 13]
    np.testing.assert_array_equal(
        one["tokens"][0, 0, :14], [1, 50, 50, 2, 11, 12, 3, 50, 50, 50, 4, 21, 22, 23]
    )
    assert (one["advantages"][0, 0, :14] == 1.5).all() and (one["sequence"] == 0).all()
    np.testing.assert_array_equal(one["parent"][0, 0, :15], [*range(-1, 13), -1])
    np.testing.assert_array_equal(one["home"][0, 0, :15], [*range(14), -1])
    np.testing.assert_array_equal(one["rows"][0, 0], [*range(14), -1, -1])


def test_mrope_positions_of_two_images(row):
    """Text counts on all three axes; an image of h x w cells holds its place in time and spreads
    rows and columns; text goes on after the larger of h and w.
    """
    positions = collate([row])["positions"][0, 0, :, :14]
    time = [0, 1, 1, 3, 4, 5, 6, 7, 7, 7, 10, 11, 12, 13]
    rows = [0, 1, 2, 3, 4, 5, 6, 7, 7, 7, 10, 11, 12, 13]
    columns = [0, 1, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]
    np.testing.assert_array_equal(positions, [time, rows, columns])


def test_placeholders_point_at_their_own_image(row):
    batch = collate([row])
    # each image occupies windows * 16 / 4 = 4 rows of the merged features; cells are reversed
    # inside
    np.testing.assert_array_equal(
        batch["vision_index"][0, 0, :14], [-1, 1, 0, -1, -1, -1, -1, 6, 5, 4, -1, -1, -1, -1]
    )


def test_an_image_shown_by_many_rows_stands_once(row):
    batch = collate([row, TokenRow(row.pieces, (1,))])
    assert batch["patch_valid"][0].any(axis=(1, 2)).tolist() == [True, True, False, False]
    one, other = by_row(first_micro(batch), batch["vision_index"][0])
    np.testing.assert_array_equal(one, other)


def test_what_rows_have_in_common_stands_once(row):
    """Two rows with the same prompt and first turn, where the second is learnt; then one that
    learns the first turn, which is its own in spite of equal pieces.
    """
    prompt, first, feedback, second = row.pieces
    other = TokenRow((prompt, first, feedback, piece([31, 32], turn=2)), (2,), 0.5)
    third = TokenRow((prompt, first, feedback, second), (1,), 2.0)
    micro = first_micro(collate([row, other, third]))
    tokens = micro["tokens"][0]
    assert (micro["home"][0] >= 0).sum() == 14 + 2 + 10
    np.testing.assert_array_equal(tokens[:16], [*whole(row), 31, 32])
    np.testing.assert_array_equal(tokens[16:26], whole(third)[4:])
    np.testing.assert_array_equal(micro["rows"][1][:14], [*range(11), 14, 15, -1])
    np.testing.assert_array_equal(micro["rows"][2][:14], [*range(4), *range(16, 26)])
    assert micro["parent"][0, [14, 16]].tolist() == [10, 3]  # the last of feedback, of prompt
    assert micro["home"][0, [14, 16]].tolist() == [16 + 11, 2 * 16 + 4]
    learnt = np.flatnonzero(micro["weights"][0])
    assert learnt.tolist() == [11, 12, 13, 14, 15, 16, 17]
    assert micro["advantages"][0, learnt].tolist() == [1.5] * 3 + [0.5] * 2 + [2.0] * 2
    assert micro["sequence"][0, learnt].tolist() == [0] * 3 + [1] * 2 + [2] * 2
    for r, each in enumerate((row, other, third)):
        np.testing.assert_array_equal(by_row(micro, micro["tokens"])[r], whole(each))
        alone = first_micro(collate([each]))
        positions = micro["positions"][0][:, micro["rows"][r][: each.length]]
        np.testing.assert_array_equal(positions, alone["positions"][0, :, : each.length])


def whole(row):
    return np.concatenate([piece.ids for piece in row.pieces])


def test_an_equal_piece_that_is_another_object_is_not_in_common(row):
    again = TokenRow(tuple(dataclasses.replace(p) for p in row.pieces), (2,))
    assert distinct_tokens([row, again]) == 28 and distinct_tokens([row, row]) == 14 + 3


def test_parts_have_about_as_many_tokens_each_and_whole_groups():
    """Eight rows of four groups over two devices and two micro-batches: 40 + 2, 30 + 4 would be
    worse than 40, 30, 20 and 10.
    """
    rows = []
    for size in (40, 2, 30, 20):
        prompt = piece([1] * size)
        rows += [TokenRow((prompt, piece([7] * n, turn=1)), (1,)) for n in (1, 2)]
    shape = BatchShape(4, (64,), (1,), 0)
    batch = Collate(shape, dataclasses.replace(LAYOUT, ways=2))(rows)
    assert batch["tokens"].shape == (2, 2, 128)  # two rows of at most 64 places
    held = (batch["home"] >= 0).sum(axis=2)
    assert sorted(held.reshape(-1).tolist()) == [5, 23, 33, 43]


def test_a_budget_of_tokens_decides_how_many_micro_batches_there_are(row):
    rows = rows_of_lengths(9, 9, 9, 9, 9)
    shape = BatchShape(8, (16,), (1,), 0, budget=25)
    batch = Collate(shape, LAYOUT)(rows)
    assert batch["tokens"].shape == (3, 1, 25)
    assert batch["weights"].sum() == pytest.approx(1.0)
    whole = Collate(dataclasses.replace(shape, budget=50), LAYOUT)(rows)
    assert whole["tokens"].shape == (1, 1, 50) and (whole["home"] >= 0).all()
    few = Collate(dataclasses.replace(shape, rows=2), LAYOUT)(rows)
    assert [(x >= 0).any(axis=1).sum() for x in few["rows"]] == [2, 2, 1]
    with pytest.raises(ValueError, match=r"a row of 10 tokens exceeds train.micro_tokens=9"):
        Collate(dataclasses.replace(shape, budget=9), LAYOUT)(rows)
    # a group of 32 tokens is cut, and its prompt computed twice
    prompt = piece([1] * 20)
    group = [TokenRow((prompt, piece([7] * 3, turn=1)), (1,)) for _ in range(4)]
    split = Collate(BatchShape(8, (32,), (1,), 0, budget=29), LAYOUT)(group)
    assert (split["home"] >= 0).sum(axis=2).tolist() == [[29], [23]]
    assert len(Collate(BatchShape(8, (32,), (1,), 0, budget=32), LAYOUT)(group)["tokens"]) == 1
    # two rows of two images each, and places for two
    images = [TokenRow(tuple(dataclasses.replace(p) for p in row.pieces), (2,)) for _ in range(2)]
    other = [image(2, 1, 1), image(1, 3, 1)]
    pieces = [dataclasses.replace(p) for p in images[1].pieces]
    pieces[0], pieces[2] = (
        dataclasses.replace(pieces[n], images=(picture,))
        for n, picture in zip((0, 2), other, strict=True)
    )
    images[1] = TokenRow(tuple(pieces), (2,))
    shown = Collate(BatchShape(8, (32,), (1,), 2, budget=64), LAYOUT)(images)
    assert len(shown["tokens"]) == 2


def test_hosts_agree_on_sizes_and_micro_batches():
    rows = rows_of_lengths(3, 3)
    asked = []

    def largest(own):
        asked.append(own.tolist())
        return np.maximum(own, [30, 2, 0, 3]) if len(own) == 4 else np.maximum(own, 700)

    batch = Collate(BatchShape(2, (8, 512), (1, 2), 2), LAYOUT, largest=largest)(rows)
    assert asked == [[4, 0, 0, 1], [4]]
    assert batch["tokens"].shape == (3, 1, 1024) and batch["rows"].shape == (3, 2, 512)
    assert batch["patches"].shape[2] == 2


def test_too_many_images_for_a_micro_batch(row):
    """Rows with more images than places go into more micro-batches; one row cannot."""
    other = TokenRow((piece([IMAGE, IMAGE], images=[image(2, 1, 1)]),), (1,))
    batch = collate([row, other], BatchShape(2, (16,), (1,), images=2))
    assert (batch["rows"] >= 0).any(axis=2).sum(axis=1).tolist() == [1, 1]
    with pytest.raises(ValueError, match="2 distinct images of a row exceed the 1 places"):
        collate([row, other], BatchShape(2, (16,), (1,), images=1))


def test_a_row_finds_its_images_in_its_own_devices_part(row):
    """Four rows over two devices: the image that rows of both show stands in each part, and rows
    count from their own part's first.
    """
    other = TokenRow((piece([IMAGE, IMAGE], images=[image(2, 1, 1)]),), (1,))
    layout = dataclasses.replace(LAYOUT, ways=2)
    batch = Collate(BatchShape(4, (16,), (1,), images=6), layout)([row, row, other, row])
    whole = collate([row, row, other, row], BatchShape(4, (16,), (1,), images=6))
    first, second = row.images
    for part, images in (
        (batch["patches"][0, :3], (first, second)),
        (batch["patches"][0, 3:], (*other.images, first, second)),
    ):
        for place, shown in enumerate(images):
            np.testing.assert_array_equal(part[place], shown.patches)
        assert not part[len(images) :].any()
    index, merged = batch["vision_index"][0], layout.merged(1)
    of_rows = by_row(first_micro(batch), index)
    wanted = by_row(first_micro(whole), whole["vision_index"][0])
    np.testing.assert_array_equal(of_rows[0], wanted[0])
    np.testing.assert_array_equal(of_rows[1], wanted[1])
    np.testing.assert_array_equal(of_rows[2], other.images[0].slots)
    np.testing.assert_array_equal(of_rows[3], np.where(of_rows[0] >= 0, of_rows[0] + merged, -1))
    few = Collate(BatchShape(4, (16,), (1,), images=4), layout)([row, row, other, row])
    assert len(few["tokens"]) == 2 and (few["rows"] >= 0).any(axis=2).sum() == 4
    with pytest.raises(
        ValueError, match="3 rows and 4 images of a host cannot be cut over its 2 devices"
    ):
        Collate(BatchShape(3, (16,), (1,), images=4), layout)([row, row, other])


def rows_of_lengths(*lengths):
    return [TokenRow((piece([1]), piece([7] * n, turn=1)), (1,)) for n in lengths]


def test_aggregations_by_hand():
    rows = rows_of_lengths(1, 3)
    weights = {}
    for name in ("token_mean", "sequence_mean", "constant"):
        micro = first_micro(collate(rows, aggregation=name, max_tokens=8))
        weights[name] = [of_row.sum() for of_row in by_row(micro, micro["weights"])]
    np.testing.assert_allclose(weights["token_mean"], [1 / 4, 3 / 4])
    np.testing.assert_allclose(weights["sequence_mean"], [1 / 2, 1 / 2])
    np.testing.assert_allclose(weights["constant"], [1 / 16, 3 / 16])
    with pytest.raises(ValueError, match="'token_average'"):
        collate(rows, aggregation="token_average")


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
def test_denominators_do_not_depend_on_the_micro_batch(aggregation):
    rows = rows_of_lengths(1, 3, 2, 5)
    whole = collate(rows, aggregation=aggregation)["weights"]
    split = collate(rows, BatchShape(2, (16,), (1,), 4), aggregation=aggregation)["weights"]
    assert whole.shape == (1, 1, 128) and split.shape == (2, 1, 32)
    assert sorted(whole[whole > 0].tolist()) == sorted(split[split > 0].tolist())


def test_totals_of_other_hosts_enter_the_denominator():
    rows = rows_of_lengths(2)
    weights = collate(rows, totals=lambda counts: counts * 4)["weights"]
    assert weights.sum() == pytest.approx(1 / 4)


def test_short_batches_are_padded_with_rows_that_weigh_nothing():
    batch = collate(rows_of_lengths(2, 2, 2), BatchShape(2, (16,), (1,), 2))
    assert (batch["rows"][1, 1] == -1).all() and (batch["rows"][1, 0] >= 0).sum() == 3
    assert batch["weights"].sum() == pytest.approx(1.0)


def test_shapes_come_from_buckets():
    assert bucket(16, (32, 16), "length") == 16
    with pytest.raises(
        ValueError, match=r"a row length \(data.lengths\) of 33 exceeds the largest bucket 32"
    ):
        collate(rows_of_lengths(32))
    assert collate(rows_of_lengths(16))["rows"].shape == (1, 1, 32)


def test_grain_gives_what_collate_gives(row):
    shape = BatchShape(2, (16,), (1,), 4)
    direct, through = (
        Collate(shape, LAYOUT)([row, row]),
        learner_batch([row, row], Collate(shape, LAYOUT)),
    )
    assert direct.keys() == through.keys()
    for name, value in direct.items():
        np.testing.assert_array_equal(value, through[name])


def test_feedback_positions_go_on_where_the_conversation_is(row):
    prompt, response, feedback, _ = row.pieces
    whole = collate([row])
    part = pad_prompts([feedback], [(prompt, response)], 8, 1, 1, LAYOUT)
    np.testing.assert_array_equal(part["positions"][0, :, :5], whole["positions"][0, 0, :, 6:11])
    np.testing.assert_array_equal(part["tokens"][0, :5], feedback.ids)
    assert part["lengths"].tolist() == [5]
    np.testing.assert_array_equal(part["vision_index"][0], [-1, 2, 1, 0, -1, -1, -1, -1])


def test_a_lost_placeholder_is_an_error():
    broken = TokenRow((piece([1, IMAGE], images=[image(2, 1, 1)]),), (1,))
    with pytest.raises(ValueError, match="1 image placeholders"):
        collate([broken])


def simulated(prompts, group, shared, own, seed):
    """Rows of groups whose lengths are spread as those of models that think: most are short, a few
    reach the limit.
    """
    rng = np.random.default_rng(seed)

    def length(mean, most):
        return int(min(most, mean * rng.lognormal(-0.125, 0.5)))

    rows = []
    for _ in range(prompts):
        prompt = piece([1] * length(*shared))
        for _ in range(group):
            rows.append(TokenRow((prompt, piece([7] * length(*own), turn=1)), (1,)))
    return rows


@pytest.mark.parametrize(
    "prompts, group, shared, own, most, ways, budget",
    [
        (8, 8, (150, 192), (55, 72), 64, 1, 0),  # the tiny preset, stage 1
        (8, 8, (30, 40), (150, 224), 32, 1, 0),  # stage 2
        (128, 8, (1100, 2048), (700, 2048), 256, 4, 16384),  # 7B on four devices, stage 2
        (128, 8, (3400, 6144), (700, 2048), 256, 2, 32768),  # stage 1, on two
    ],
)
def test_little_of_a_batch_is_padding(prompts, group, shared, own, most, ways, budget):
    for seed in range(1 if budget else 5):
        rows = simulated(prompts, group, shared, own, seed)
        shape = BatchShape(most, (max(row.length for row in rows),), (1,), 0, budget=budget)
        home = Collate(shape, dataclasses.replace(LAYOUT, ways=ways))(rows)["home"]
        assert (home < 0).mean() < 0.1, (seed, home.shape)
        assert not budget or home.shape[1:] == (ways, budget)
