"""What is left out of a stage's data is said, kept, and refused where too little is left."""

import dataclasses
import json

import numpy as np
import pytest

from mmrecoder_jax import accounts
from mmrecoder_jax.config import ConfigError, load
from mmrecoder_jax.data.batching import Piece, TokenRow
from mmrecoder_jax.data.sources import png_bytes
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


@pytest.fixture
def prompts(tmp_path, policy):
    """`prompts(charts, fields)`: a survey of the prompts of stage 2."""

    def run(charts, fields, turns=2):
        stage = policy.stage_with(fields)
        source = Source(charts)
        bad = accounts.bad_rows(stage.config, source)
        return accounts.survey_prompts(
            stage.config, str(tmp_path), source, stage.processor, bad, turns
        )

    return run


def test_prompts_that_leave_no_room_are_left_out(prompts, policy, capsys, tmp_path):
    charts = list(policy.charts)
    strip = png_bytes(np.zeros((28, 672, 3), np.uint8))
    charts[1] = dataclasses.replace(charts[1], image=strip)
    charts[4] = dataclasses.replace(charts[4], instruction="Redraw " * 99)
    charts[5] = dataclasses.replace(charts[5], image=b"<html>")
    found = prompts(charts, {"data.windows": (6,), "data.max_bad_rows": 1})
    assert found.kept.tolist() == [0, 2, 3, 6, 7, 8, 9, 10, 11]
    said = capsys.readouterr().out
    assert "9 of 12 prompts fit rl.prompt_length or rl.feedback_length and data.windows" in said
    kept = json.loads((tmp_path / "data_stage2.json").read_text())["prompts"]
    assert (kept["kept"], kept["too_long"], kept["too_wide"], kept["bad"]) == (9, 1, 1, 1)


def test_a_chart_whose_own_render_cannot_be_fed_back_leaves_no_room(prompts, policy):
    """24 visual tokens do not fit a feedback of 30; with one turn there is no feedback."""
    with pytest.raises(ConfigError, match=r"0 of 12 prompts .* rl\.feedback_length=30"):
        prompts(policy.charts, {"rl.feedback_length": 30})
    assert len(prompts(policy.charts, {"rl.feedback_length": 30}, turns=1).kept) == 12
    room = {"rl.feedback_length": 60}
    assert len(prompts(policy.charts, room).kept) == 12
    with pytest.raises(ConfigError, match=r"0 of 12 prompts .* rl\.feedback_length=60"):
        prompts(policy.charts, room | {"feedback.image": "both"})


def test_too_few_prompts_are_refused_with_the_fields(prompts, policy):
    with pytest.raises(ConfigError, match=r"data\.windows=\(2,\), and data\.lengths"):
        prompts(policy.charts, {"data.windows": (2,)})
