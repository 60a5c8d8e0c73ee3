"""Rows and streams: what is learnt, what is left out, how sources are mixed and shared by hosts."""

import dataclasses
import itertools

import numpy as np
import pytest

from mmrecoder_jax.data import pipeline, synthetic
from mmrecoder_jax.data.batching import Piece, TokenRow
from mmrecoder_jax.data.sources import Chart, Dialogue, png_bytes
from mmrecoder_jax.data.survey import BadRows, TooManyBadRows
from mmrecoder_jax.env import Record
from mmrecoder_jax.env.response import response_text, think_text
from mmrecoder_jax.models.config import preset
from mmrecoder_jax.models.processor import Processor
from mmrecoder_jax.models.tokenizer import train_sentencepiece

IMAGE = png_bytes(np.full((112, 168, 3), 255, np.uint8))
CODE = synthetic.chart_spec(0, 0).code()
CHART = Chart("a", IMAGE, CODE, Record(), "Redraw.", "test", "none")


@pytest.fixture(scope="module")
def processor():
    texts = synthetic.tokenizer_texts(200, 0)
    tokenizer = train_sentencepiece(texts, 512, synthetic.words())
    return Processor(tokenizer, preset("tiny").vision, 28 * 28, 168 * 112, "You draw.")


def dialogue(*images):
    """The first response, then one more after each feedback."""
    responses = tuple(response_text(f"turn {i}", CODE) for i in range(len(images) + 1))
    texts = tuple(f"feedback {i}" for i in range(len(images)))
    return Dialogue("d", CHART, responses, texts, images, 0.5, "edited")


def test_a_pair_is_one_turn_with_a_thought_told_from_its_code(processor):
    row = pipeline.single_turn_row(CHART, processor)
    prompt, response = row.pieces
    assert (prompt.turn, response.turn, row.loss_turns) == (0, 1, (1,))
    assert len(prompt.images) == 1
    assert processor.decode(response.ids) == response_text(think_text(CODE), CODE)


def test_only_the_last_turn_of_a_dialogue_is_learnt(processor):
    row = pipeline.dialogue_row(dialogue((IMAGE,), ()), processor)
    assert [piece.turn for piece in row.pieces] == [0, 1, 0, 2, 0, 3]
    assert [len(piece.images) for piece in row.pieces] == [1, 0, 1, 0, 0, 0]
    assert row.loss_turns == (3,)
    texts = [processor.decode(piece.ids) for piece in row.pieces]
    assert texts[1::2] == list(dialogue((IMAGE,), ()).responses)
    assert "feedback 0" in texts[2] and "feedback 1" in texts[4]


def test_a_feedback_of_two_pictures_has_both_in_order(processor):
    other = png_bytes(np.full((28, 56, 3), 7, np.uint8))
    row = pipeline.dialogue_row(dialogue((IMAGE, other)), processor)
    one, two = row.pieces[2].images
    assert (one, two) == (processor.image(IMAGE), processor.image(other))
    alone = pipeline.dialogue_row(dialogue((IMAGE,)), processor)
    around = 2  # the tokens at both ends of a picture
    assert row.length - alone.length == len(two.slots) + around


def numbered(*numbers):
    """Rows that are known by their advantage, as long as it says."""
    prompt = Piece(np.zeros(1, np.int32), 0)
    return [
        TokenRow((prompt, Piece(np.zeros(n - 1, np.int32), 1)), (1,), float(n)) for n in numbers
    ]


def numbers_of(batches):
    return [[int(row.advantage) for row in rows] for rows in batches]


def as_it_is(row):
    return row


def test_rows_longer_than_the_largest_bucket_are_left_out():
    data = pipeline.rows_of(numbered(3, 9, 4), as_it_is, 4, 9, BadRows(0))
    assert [row.length for row in data.to_iter_dataset()] == [3, 4]


def test_rows_with_an_image_wider_than_the_largest_bucket_are_left_out(processor):
    row = pipeline.single_turn_row(CHART, processor)
    windows = row.images[0].patches.shape[0]
    for widest, count in ((windows, 2), (windows - 1, 0)):
        data = pipeline.rows_of([row, row], as_it_is, 999, widest, BadRows(0))
        assert len(list(data.to_iter_dataset())) == count


def stream(shares, hosts=1, host=0, seed=0):
    first, second = range(10, 30), range(50, 70)
    sets = [
        pipeline.rows_of(numbered(*numbers), as_it_is, 99, 9, BadRows(0))
        for numbers in (first, second)
    ]
    batches = pipeline.supervised(
        sets[: len(shares)], shares, 4 // hosts, seed=seed, host=host, hosts=hosts
    )
    return [n for numbers in numbers_of(itertools.islice(batches, 50)) for n in numbers]


def test_sources_are_mixed_by_share_and_the_seed_decides_the_order():
    found = stream([0.75, 0.25])
    assert sum(number >= 50 for number in found) == pytest.approx(50, abs=2)
    assert found == stream([0.75, 0.25]) != stream([0.75, 0.25], seed=1)
    alone = stream([1.0])
    assert sorted(alone[:20]) == list(range(10, 30)) != alone[:20]  # every row once, shuffled
    assert sorted(alone[20:40]) == list(range(10, 30))


def test_hosts_read_rows_of_their_own():
    first, second = (stream([1.0], hosts=2, host=host)[:10] for host in (0, 1))
    assert sorted(first + second) == list(range(10, 30))


@pytest.mark.parametrize("shares", [[1.0], [0.75, 0.25], [0.5, 0.5]])
def test_hosts_together_read_the_batches_of_one(shares):
    """Batches of four on one host are two rows on each of two hosts, whatever is mixed."""
    whole = stream(shares)
    parts = [stream(shares, hosts=2, host=host) for host in (0, 1)]
    for start in range(0, 40, 4):
        own = slice(start // 2, start // 2 + 2)
        assert sorted(parts[0][own] + parts[1][own]) == sorted(whole[start : start + 4])


def charts(count):
    return [dataclasses.replace(CHART, id=str(i)) for i in range(count)]


def test_prompts_are_every_chart_once_per_epoch_shared_by_hosts(processor):
    found = []
    for host in (0, 1):
        stream = pipeline.prompts(charts(8), 2, processor, BadRows(0), seed=3, host=host, hosts=2)
        iterator = iter(stream)
        found += [chart.id for _ in range(2) for chart in next(iterator)]
    assert sorted(found) == [str(i) for i in range(8)]


def test_held_out_batches_are_the_first_ones_in_order():
    data = pipeline.rows_of(numbered(*range(2, 12)), as_it_is, 99, 9, BadRows(0))
    whole = [[2, 3, 4], [5, 6, 7], [8, 9, 10]]
    assert numbers_of(pipeline.held_out(data, 3, 2)) == whole[:2]
    assert numbers_of(pipeline.held_out(data, 3, 9)) == whole


def test_an_outline_has_the_shapes_of_its_row(processor):
    for made in (
        lambda **how: pipeline.single_turn_row(CHART, processor, **how),
        lambda **how: pipeline.dialogue_row(dialogue((IMAGE,), ()), processor, **how),
    ):
        row, outline = made(), made(outline=True)
        assert row.length == outline.length
        for a, b in zip(row.images, outline.images, strict=True):
            shapes = [(x.patches.shape, x.valid.shape, x.grid, x.slots.shape) for x in (a, b)]
            assert shapes[0] == shapes[1]


def fails_at(*numbers):
    def to_row(row):
        if row.advantage in numbers:
            raise ValueError("it is bad")
        return row

    return to_row


def test_bad_rows_are_skipped_and_said_once():
    said = []
    bad = BadRows(2, said.append)
    data = pipeline.rows_of(numbered(*range(10, 20)), fails_at(12, 15), 99, 9, bad)
    batches = pipeline.supervised([data], [1.0], 4, seed=0)
    found = [n for numbers in numbers_of(itertools.islice(batches, 6)) for n in numbers]
    assert sorted(found[:8]) == [10, 11, 13, 14, 16, 17, 18, 19] == sorted(found[8:16])
    assert bad.count == 2
    assert [line[:35] for line in said] == [
        f"bad row {n} of 2 allowed is skipped: " for n in (1, 2)
    ]
    assert sorted(line[35:] for line in said) == ["row 2: it is bad", "row 5: it is bad"]


def test_one_bad_row_too_many_ends_the_stream():
    bad = BadRows(1, lambda message: None)
    data = pipeline.rows_of(numbered(*range(10, 20)), fails_at(12, 15), 99, 9, bad)
    batches = pipeline.supervised([data], [1.0], 4, seed=0)
    with pytest.raises(TooManyBadRows, match=r"row [25]: it is bad \(bad row 2, .* allows 1\)"):
        list(itertools.islice(batches, 6))


def test_kept_rows_are_what_is_shuffled_and_mixed():
    few, many = numbered(*range(10, 30)), numbered(*range(50, 70))
    kept = np.arange(5)
    sets = [
        pipeline.rows_of(few, as_it_is, 99, 9, BadRows(0), kept),
        pipeline.rows_of(many, as_it_is, 99, 9, BadRows(0)),
    ]
    batches = itertools.islice(pipeline.supervised(sets, [0.5, 0.5], 4, seed=0), 20)
    found = [n for numbers in numbers_of(batches) for n in numbers]
    assert sum(number < 50 for number in found) == pytest.approx(40, abs=1)
    assert {number for number in found if number < 50} == {10, 11, 12, 13, 14}


def test_prompts_without_an_image_are_skipped(processor):
    some = charts(4)
    some[2] = dataclasses.replace(some[2], image=b"<html>")
    bad = BadRows(1, lambda message: None)
    iterator = iter(pipeline.prompts(some, 3, processor, bad, seed=0))
    assert sorted(chart.id for chart in next(iterator)) == ["0", "1", "3"]
    with pytest.raises(TooManyBadRows, match="row 2: an image of 6 bytes cannot be read"):
        next(iter(pipeline.prompts(some, 3, processor, BadRows(0), seed=0)))
