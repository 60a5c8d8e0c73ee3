"""Correction dialogues: what is kept, and what the second turn says."""

import dataclasses

import numpy as np
import pytest

from mmrecoder_jax.data import panels
from mmrecoder_jax.data.build import build_synthetic
from mmrecoder_jax.data.corruptions import corrupt
from mmrecoder_jax.data.self_correction import (
    POLICY,
    Draft,
    build_dialogues,
    make_dialogue,
    synthetic_drafts,
)
from mmrecoder_jax.data.sources import Chart
from mmrecoder_jax.env import Execution, ExecutorPool, Record, Status
from mmrecoder_jax.env.chart_env import oversized
from mmrecoder_jax.env.response import extract_code, has_format, response_text
from mmrecoder_jax.images import BadImage

FEEDBACK = {"image": "render", "render": "Improve it.", "error": "It failed:\n{error}"}


@pytest.fixture(scope="module")
def charts(pool, tmp_path_factory):
    return build_synthetic(tmp_path_factory.mktemp("charts") / "train", "train", 24, 0, pool)


RECORD = Record(("Rain", "day"), ((1, 1, 0, 0, 0, 0),), {"bar": 1}, ("bar--#FF0000",))
CHART = Chart("one", b"png", "right code", RECORD, "Draw.", "test", "none")


def draft(code: str) -> Draft:
    return Draft("d", CHART, response_text("bar", code), "edited")


def drawn(**changes) -> Execution:
    """What drew the chart, or with changes something else."""
    record = dataclasses.replace(RECORD, **changes)
    return Execution(Status.OK, np.zeros((2, 2, 3), np.uint8), record=record)


def dialogue_of(code: str, execution: Execution, min_gain: float = 0.02):
    return make_dialogue(draft(code), execution, FEEDBACK, min_gain)


def test_dialogue_from_a_wrong_render():
    # One of two texts is right: text F1 = 1/2, everything else 1, so the truth gains 1/8.
    dialogue = dialogue_of("wrong", drawn(texts=("Rain", "month")))
    assert dialogue.gain == pytest.approx(0.125)
    assert dialogue.responses == (
        "<think>bar</think>\n```python\nwrong\n```",
        "<think>Fix text.</think>\n```python\nright code\n```",
    )
    assert dialogue.feedback_text == ("Improve it.",)
    ((picture,),) = dialogue.feedback_images
    assert picture.startswith(b"\x89PNG")


def test_dialogue_from_a_crash():
    error = "line 3: ax.bra(x)\nAttributeError: 'Axes' object has no attribute 'bra'"
    dialogue = dialogue_of("wrong", Execution(Status.ERROR, error=error))
    assert dialogue.gain == 1.0
    assert dialogue.responses[1].startswith("<think>Fix error: AttributeError.</think>")
    assert dialogue.feedback_text == (f"It failed:\n{error}",)
    assert dialogue.feedback_images == ((),)


def test_what_is_thought_of_a_stopped_script():
    error = "The script was stopped: it ran longer than 20 seconds."
    dialogue = dialogue_of("wrong", Execution(Status.TIMEOUT, error=error))
    assert dialogue.responses[1].startswith("<think>Fix error: timeout.</think>")


@pytest.mark.parametrize(("min_gain", "kept"), [(0.124, True), (0.126, False)])
def test_min_gain(min_gain, kept):
    found = dialogue_of("wrong", drawn(texts=("Rain", "month")), min_gain)
    assert (found is not None) == kept


def test_right_drafts_are_left_out():
    assert dialogue_of("other code", drawn()) is None


def test_right_drafts_are_answered_that_they_look_right_where_they_are_wanted():
    found = make_dialogue(draft("right code"), drawn(), FEEDBACK, 0.02, keep_right=True)
    assert found.gain == 0
    assert found.responses[1] == "<think>Looks right.</think>\n```python\nright code\n```"
    assert make_dialogue(draft("other"), drawn(), FEEDBACK, 0.02, keep_right=True) is None


def test_what_only_a_judge_of_pixels_sees_is_data():
    found = make_dialogue(draft("other"), drawn(), FEEDBACK, min_gain=0.0)
    assert found.responses[1] == "<think>Fix data.</think>\n```python\nright code\n```"


def test_a_share_of_the_drafts_is_right(charts):
    drafts = list(synthetic_drafts(charts, 200, 1, corrupt, right_share=0.3))
    right = [d for d in drafts if d.origin == "right"]
    assert 40 < len(right) < 80
    assert all(extract_code(d.response).strip() == d.chart.code for d in right)
    wrong = [d for d in drafts if d.origin != "right"]
    assert all(extract_code(d.response).strip() != d.chart.code for d in wrong)


def thought_of(draft):
    return draft.response.partition("</think>")[0].removeprefix("<think>")


def test_a_share_of_the_drafts_thinks_as_later_turns_do(charts):
    plain = list(synthetic_drafts(charts, 200, 1, corrupt, right_share=0.3))
    drafts = list(synthetic_drafts(charts, 200, 1, corrupt, right_share=0.3, later_share=0.4))
    assert [extract_code(d.response) for d in drafts] == [extract_code(d.response) for d in plain]
    later = [thought_of(d) for d, was in zip(drafts, plain, strict=True) if d != was]
    assert 60 < len(later) < 100
    satisfied = later.count("Looks right.")
    assert 0.3 < satisfied / len(later) < 0.7
    parts = {f"Fix {part}." for part in ("text", "layout", "type", "color")}
    assert set(later) == parts | {"Looks right."}
    assert {d.origin for d in drafts if thought_of(d) in later} == {"right", "edited", "broken"}


def test_a_later_turn_says_what_it_mended_where_the_grammar_can():
    specs = [panels.chart_spec(3, index) for index in range(60)]
    charts = [dataclasses.replace(CHART, code=spec.code()) for spec in specs]
    drafts = list(synthetic_drafts(charts, 60, 1, panels.corrupt, 0.2, 1.0, panels.diagnosis))
    mended = [d for d in drafts if thought_of(d) != "Looks right."]
    assert 15 < len(mended) < 45
    named = [d for d in mended if thought_of(d).startswith("Fix columns ")]
    assert len(named) > len(mended) / 2  # the others: another kind, which the diagnosis leaves out
    # It speaks of the way to its own code, not to the chart's: a wrong one is still to be mended.
    truths = [panels.diagnosis(extract_code(d.response), d.chart.code) for d in named]
    told = sum(thought_of(d) == truth for d, truth in zip(named, truths, strict=True))
    assert told < len(named) / 4


def test_drafts_depend_on_their_seed_and_number_alone(charts):
    drafts = list(synthetic_drafts(charts, 40, 1, corrupt))
    assert drafts[:10] == list(synthetic_drafts(charts, 10, 1, corrupt))
    assert drafts != list(synthetic_drafts(charts, 40, 2, corrupt))
    assert {d.origin for d in drafts} == {"broken", "edited"}
    assert len({d.id for d in drafts}) == 40
    assert drafts[25].chart == charts[1]  # the charts in turn
    assert all(has_format(d.response) and extract_code(d.response) != d.chart.code for d in drafts)


def test_build_dialogues(charts, pool, tmp_path):
    drafts = list(synthetic_drafts(charts, 40, 1, corrupt))
    right = Draft("right", charts[0], response_text("bar", charts[0].code), "unchanged")
    drafts.append(right)
    calls = []
    dialogues = build_dialogues(
        tmp_path / "set",
        drafts,
        pool,
        pool,
        {"name": "corrections"},
        FEEDBACK,
        0.02,
        progress=lambda *c: calls.append(c),
    )
    assert calls == [(i + 1, 41) for i in range(41)]
    assert 20 <= len(dialogues) < 41
    for dialogue in dialogues:
        assert dialogue.id != "right" and dialogue.gain >= 0.02
        assert all(map(has_format, dialogue.responses))
        assert extract_code(dialogue.responses[1]).strip() == dialogue.chart.code
        failed = dialogue.feedback_text[0].startswith("It failed:")
        assert len(dialogue.feedback_images[0]) == (not failed)
    again = build_dialogues(tmp_path / "again", drafts[::-1], pool, pool, {}, FEEDBACK, 0.02)
    assert list(again) == list(dialogues)
    with pytest.raises(ValueError, match="none of 1 drafts"):
        build_dialogues(tmp_path / "nothing", [right], pool, pool, {}, FEEDBACK, 0.02)


class Asked(ExecutorPool):
    """A pool that notes what it is asked to run, and has it run by another."""

    def __init__(self, pool):  # starts nothing
        self.pool, self.codes = pool, []

    def stream(self, codes):
        self.codes += codes
        return self.pool.stream(codes)


def test_what_is_made_of_right_code_runs_where_no_policy_does(charts, pool, tmp_path):
    drafts = list(synthetic_drafts(charts, 6, 1, corrupt))
    drafts.insert(3, Draft("policy-0", charts[0], response_text("bar", "plt.plot([1])"), POLICY))
    answers, references = Asked(pool), Asked(pool)
    build_dialogues(tmp_path / "set", drafts, answers, references, {}, FEEDBACK, 0.02)
    assert answers.codes == [extract_code(drafts[3].response)]
    assert set(references.codes) == {
        extract_code(draft.response) for draft in drafts if draft.origin != POLICY
    }


def test_what_cannot_be_shown_or_read_is_no_picture_of_a_dialogue(charts, pool, tmp_path):
    """Every figure is too large here, and the last chart has no image."""
    drafts = [d for d in synthetic_drafts(charts, 12, 1, corrupt) if d.origin == "edited"]
    cut = dataclasses.replace(drafts[-1].chart, image=b"<html>")
    drafts[-1] = dataclasses.replace(drafts[-1], chart=cut)
    unreadable = []

    def shown(execution, chart):
        return oversized(execution) if execution.image is not None else execution

    failed = build_dialogues(tmp_path / "none", drafts, pool, pool, {}, FEEDBACK, 0.02, shown=shown)
    assert all(dialogue.feedback_images == ((),) for dialogue in failed)
    assert all("too large or too thin" in dialogue.feedback_text[0] for dialogue in failed)
    feedback = FEEDBACK | {"image": "difference"}
    read = build_dialogues(
        tmp_path / "read",
        drafts,
        pool,
        pool,
        {},
        feedback,
        0.02,
        unreadable=lambda draft, error: unreadable.append((draft.id, str(error))),
    )
    assert [name for name, _ in unreadable] == [drafts[-1].id]
    assert drafts[-1].id not in {dialogue.id for dialogue in read}
    both = build_dialogues(
        tmp_path / "both", drafts[:-1], pool, pool, {}, FEEDBACK | {"image": "both"}, 0.02
    )
    for one, two in zip(read, both, strict=True):
        render, difference = two.feedback_images[0]
        assert (difference,) == one.feedback_images[0] and render != difference
    with pytest.raises(BadImage):
        build_dialogues(tmp_path / "raises", drafts[-1:], pool, pool, {}, feedback, 0.02)
