"""What is left out of a stage's data is said, kept, and refused where too little is left."""

import json

import numpy as np
import pytest

from mmrecoder_jax import accounts
from mmrecoder_jax.config import ConfigError, load
from mmrecoder_jax.data.batching import Piece, TokenRow
from mmrecoder_jax.data.survey import TooManyBadRows


class Source(list):
    """Lengths as rows; None is a bad one."""

    def where(self, index):
        return f"charts.jsonl line {index + 1}"

    def stamp(self):
        return f"{len(self)} rows"


def outline(length):
    if length is None:
        raise ValueError("code is null")
    return TokenRow((Piece(np.zeros(length, np.int32), 1),), (1,))


@pytest.fixture
def look(tmp_path):
    """`look(lengths, max_bad_rows)`: a survey with buckets of 40 tokens and batches of 8."""

    def run(lengths, limit=0.0):
        config = load("sft_chart2code", "smoke")
        config.data.lengths, config.data.max_bad_rows = (20, 40), limit
        source = Source(lengths)
        bad = accounts.bad_rows(config, source)
        return accounts.survey_rows(config, str(tmp_path), "charts", source, outline, bad)

    return run


def test_what_fits_needs_no_words(look, capsys):
    assert look([30] * 10).kept.tolist() == list(range(10))
    assert "left out" not in capsys.readouterr().out
    assert look([30] * 4).kept.tolist() == list(range(4)), "a small data set is no filtered one"


def test_what_is_left_out_is_said_and_kept(look, capsys, tmp_path):
    assert len(look([30] * 10 + [99, None], 1.0).kept) == 10
    said = capsys.readouterr().out
    assert "bad row 1 of 1 allowed is skipped: charts.jsonl line 12: code is null" in said
    assert "10 of 12 charts fit data.lengths" in said
    assert "1 are longer than 40 tokens (data.lengths)" in said and "1 are bad" in said
    kept = json.loads((tmp_path / "data_sft_chart2code.json").read_text())
    assert kept["charts"]["too_long"] == kept["charts"]["bad"] == 1


@pytest.mark.parametrize("lengths", [[99] * 12, [30] * 7 + [99], [30] * 10 + [99] * 11, []])
def test_too_little_is_refused(look, lengths):
    with pytest.raises(ConfigError, match=r"raise the largest of data\.lengths=\(20, 40\)"):
        look(lengths)


def test_a_bad_row_too_many_is_refused(look):
    with pytest.raises(ConfigError, match=r"charts\.jsonl line 2: code is null .*max_bad_rows"):
        look([30, None] + [30] * 10)
    with pytest.raises(ConfigError, match=r"data\.max_bad_rows=-1"):
        look([30], -1.0)


def test_a_stream_that_meets_one_too_many_is_refused():
    def batches():
        yield 1
        raise TooManyBadRows("line 3 is bad")

    iterator = batches()
    assert accounts.next_of(iterator) == 1
    with pytest.raises(ConfigError, match="line 3 is bad"):
        accounts.next_of(iterator)
