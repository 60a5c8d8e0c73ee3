"""Correction dialogues: what is corrupted, what is kept, what the second turn says."""

import collections
import random

import numpy as np
import pytest

from mmrecoder_jax.data import self_correction, sources, synthetic
from mmrecoder_jax.data.self_correction import (
    Draft,
    break_code,
    build_dialogues,
    corrupt,
    make_dialogue,
    synthetic_drafts,
)
from mmrecoder_jax.data.sources import Chart
from mmrecoder_jax.env import Execution, Record, Status
from mmrecoder_jax.env.response import extract_code, has_format, response_text

FEEDBACK = {"image": "render", "render": "Improve it.", "error": "It failed:\n{error}"}


@pytest.fixture(scope="module")
def charts(pool, tmp_path_factory):
    return sources.build_synthetic(
        tmp_path_factory.mktemp("charts") / "train", "train", 24, 0, pool
    )


RECORD = Record(("Rain", "day"), ((1, 1, 0, 0, 0, 0),), {"bar": 1}, ("bar--#FF0000",))
CHART = Chart("one", b"png", "right code", RECORD, "Draw.", "test", "none")


def draft(code: str) -> Draft:
    return Draft("d", CHART, response_text("bar", code), "edited")


def drawn(**changes) -> Execution:
    record = Record(
        **(
            {
                "texts": RECORD.texts,
                "layout": RECORD.layout,
                "types": RECORD.types,
                "colors": RECORD.colors,
            }
            | changes
        )
    )
    return Execution(Status.OK, np.zeros((2, 2, 3), np.uint8), record=record)


def test_dialogue_from_a_wrong_render():
    # One of two texts is right: text F1 = 1/2, everything else 1, so the truth gains 1/8.
    dialogue = make_dialogue(draft("wrong"), drawn(texts=("Rain", "month")), FEEDBACK)
    assert dialogue.gain == pytest.approx(0.125)
    assert dialogue.responses == (
        "<think>bar</think>\n```python\nwrong\n```",
        "<think>Fix text.</think>\n```python\nright code\n```",
    )
    assert dialogue.feedback_text == ("Improve it.",)
    assert dialogue.feedback_image[0].startswith(b"\x89PNG")


def test_dialogue_from_a_crash():
    execution = Execution(
        Status.ERROR,
        error="line 3: ax.bra(x)\nAttributeError: 'Axes' object has no attribute 'bra'",
    )
    dialogue = make_dialogue(draft("wrong"), execution, FEEDBACK)
    assert dialogue.gain == 1.0
    assert dialogue.responses[1].startswith("<think>Fix error: AttributeError.</think>")
    assert dialogue.feedback_text == (f"It failed:\n{execution.error}",)
    assert dialogue.feedback_image == (None,)


def test_think_of_a_stopped_script():
    execution = Execution(
        Status.TIMEOUT, error="The script was stopped: it ran longer than 20 seconds."
    )
    assert (
        make_dialogue(draft("wrong"), execution, FEEDBACK)
        .responses[1]
        .startswith("<think>Fix error: timeout.</think>")
    )


@pytest.mark.parametrize(("min_gain", "kept"), [(0.124, True), (0.126, False)])
def test_min_gain(min_gain, kept):
    assert (
        make_dialogue(draft("wrong"), drawn(texts=("Rain", "month")), FEEDBACK, min_gain)
        is not None
    ) == kept


def test_perfect_drafts_are_left_out_unless_wanted_and_then_repeated():
    assert make_dialogue(draft("other code"), drawn(), FEEDBACK) is None
    dialogue = make_dialogue(draft("other code"), drawn(), FEEDBACK, keep_perfect=1.0)
    assert dialogue.gain == 0
    assert dialogue.responses[1] == "<think>Looks right.</think>\n```python\nother code\n```"


def test_keep_perfect_is_not_for_small_gains():
    assert (
        make_dialogue(
            draft("wrong"), drawn(texts=("Rain", "month")), FEEDBACK, min_gain=0.5, keep_perfect=1.0
        )
        is None
    )


def test_corrupt_borrows_from_donors():
    code = synthetic.chart_spec(0, 1).code()
    donors = [synthetic.chart_spec(0, index).code() for index in range(2, 6)]
    known = set(" ".join([code, *donors]).split("'"))
    wrongs = {corrupt(code, donors, random.Random(i), most_edits=1) for i in range(200)}
    assert code not in wrongs
    assert len(wrongs) > 10
    for wrong in wrongs:
        compile(wrong, "wrong", "exec")
        changed = set(wrong.splitlines()) ^ set(code.splitlines())
        assert 1 <= len(changed) <= 2, "one edit changes one line"
    strings = {
        line.split("'")[1] for wrong in wrongs for line in wrong.splitlines() if "set_" in line
    }
    assert strings <= known


def test_corrupt_needs_something_to_change():
    with pytest.raises(ValueError, match="no edit applies"):
        corrupt("print(1)", ["print(2)"], random.Random(0))


def test_corruptions_are_seen_by_the_score_and_breaks_by_python(charts, pool):
    codes = [charts[i].code for i in range(24)]
    rng = random.Random(0)
    edited = pool.run([corrupt(code, codes, rng) for code in codes])
    broken = pool.run([break_code(code, rng) for code in codes])
    assert sum(execution.ok for execution in edited) >= 20
    assert sum(execution.status == Status.ERROR for execution in broken) >= 20
    kinds = collections.Counter(
        execution.error.rpartition("\n")[2].split(":")[0]
        for execution in broken
        if not execution.ok
    )
    assert len(kinds) >= 3, f"slips of one kind only: {kinds}"
    lower = [
        self_correction.score(execution.record, charts[i].record).overall < 1
        for i, execution in enumerate(edited)
        if execution.ok
    ]
    assert sum(lower) >= 0.75 * len(lower)


def test_build_dialogues(charts, pool, tmp_path):
    drafts = list(synthetic_drafts(charts, 40, seed=1, broken=0.4, unchanged=0.2))
    assert drafts == list(synthetic_drafts(charts, 40, seed=1, broken=0.4, unchanged=0.2))
    assert {d.origin for d in drafts} == {"broken", "unchanged", "edited"}
    calls = []
    dialogues = build_dialogues(
        tmp_path / "set",
        drafts,
        pool,
        {"name": "corrections"},
        FEEDBACK,
        progress=lambda *c: calls.append(c),
    )
    assert calls == [(i + 1, 40) for i in range(40)]
    assert 20 <= len(dialogues) < 40
    for i in range(len(dialogues)):
        dialogue = dialogues[i]
        assert dialogue.origin != "unchanged"
        assert dialogue.gain >= 0.02
        assert all(map(has_format, dialogue.responses))
        assert extract_code(dialogue.responses[1]).strip() == dialogue.chart.code
        assert (dialogue.feedback_image[0] is None) == dialogue.feedback_text[0].startswith(
            "It failed:"
        )
    again = build_dialogues(
        tmp_path / "again", drafts[::-1], pool, {"name": "corrections"}, FEEDBACK
    )
    assert [again[i] for i in range(len(again))] == [dialogues[i] for i in range(len(dialogues))]


def test_nothing_to_learn_from(charts, pool, tmp_path):
    drafts = list(synthetic_drafts(charts, 3, seed=0, broken=0.0, unchanged=1.0))
    with pytest.raises(ValueError, match="none of 3 drafts"):
        build_dialogues(tmp_path / "set", drafts, pool, {}, FEEDBACK)
