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
    pad_prompts,
)
from mmrecoder_jax.data.pipeline import learner_batch
from mmrecoder_jax.models.processor import ImagePatches

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
    both = collate([TokenRow(row.pieces, (1, 2))])
    assert np.flatnonzero(both["weights"][0, 0]).tolist() == [4, 5, 11, 12, 13]
    for batch in (one, both):
        shown = batch["turns"][0, 0] == 0
        assert (batch["weights"][0, 0][shown] == 0).all()  # never prompt, feedback or padding
    np.testing.assert_array_equal(
        one["tokens"][0, 0, :14], [1, 50, 50, 2, 11, 12, 3, 50, 50, 50, 4, 21, 22, 23]
    )
    assert one["advantages"][0, 0] == 1.5


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
    np.testing.assert_array_equal(batch["vision_index"][0, 0], batch["vision_index"][0, 1])


def test_too_many_images_for_a_micro_batch(row):
    other = TokenRow((piece([IMAGE, IMAGE], images=[image(2, 1, 1)]),), (1,))
    with pytest.raises(ValueError, match="3 distinct images exceed the 2"):
        collate([row, other], BatchShape(2, (16,), (1,), images=2))


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
    np.testing.assert_array_equal(index[:2], whole["vision_index"][0, :2])
    np.testing.assert_array_equal(index[2][index[2] >= 0], other.images[0].slots)
    np.testing.assert_array_equal(index[3], np.where(index[0] >= 0, index[0] + merged, -1))
    with pytest.raises(
        ValueError, match="3 distinct images exceed the 2 places of a device's part"
    ):
        Collate(BatchShape(4, (16,), (1,), images=4), layout)([row, row, other, row])
    with pytest.raises(
        ValueError, match="3 rows and 4 images of a host cannot be cut over its 2 devices"
    ):
        Collate(BatchShape(3, (16,), (1,), images=4), layout)([row, row, other])


def rows_of_lengths(*lengths):
    return [TokenRow((piece([1]), piece([7] * n, turn=1)), (1,)) for n in lengths]


def test_aggregations_by_hand():
    rows = rows_of_lengths(1, 3)
    weights = {
        name: collate(rows, aggregation=name, max_tokens=8)["weights"][0].sum(axis=1)
        for name in ("token_mean", "sequence_mean", "constant")
    }
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
    assert whole.shape == (1, 4, 16) and split.shape == (2, 2, 16)
    np.testing.assert_array_equal(whole.reshape(4, 16), split.reshape(4, 16))


def test_totals_of_other_hosts_enter_the_denominator():
    rows = rows_of_lengths(2)
    weights = collate(rows, totals=lambda counts: counts * 4)["weights"]
    assert weights.sum() == pytest.approx(1 / 4)


def test_short_batches_are_padded_with_rows_that_weigh_nothing():
    batch = collate(rows_of_lengths(2, 2, 2), BatchShape(2, (16,), (1,), 2))
    assert batch["weights"][1, 1].sum() == 0 and batch["segment_ids"][1, 1].sum() == 0
    assert batch["weights"].sum() == pytest.approx(1.0)


def test_shapes_come_from_buckets():
    assert bucket(16, (32, 16), "length") == 16
    with pytest.raises(
        ValueError, match=r"a row length \(data.lengths\) of 33 exceeds the largest bucket 32"
    ):
        collate(rows_of_lengths(32))
    assert collate(rows_of_lengths(16))["tokens"].shape == (1, 1, 32)


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
