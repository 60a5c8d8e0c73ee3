"""Reading a list of differences: only a whole and valid list becomes a score."""

import json

import pytest

from mmrecoder_jax.rl.judge.answers import POINTS_QUESTION
from mmrecoder_jax.rl.judge.differences import AFTER, DIFFERENCES, read_differences, verdict


def difference(category="data_error", severity=2, **more):
    return {"category": category, "severity": severity, **more}


def answer(*errors, **more):
    return json.dumps({"errors": list(errors), **more})


PLACED = difference(location="left panel", description='its title reads "{"errors": []}"')


@pytest.mark.parametrize(
    ("said", "score"),
    [
        (answer(), 1.0),
        (answer(difference()), 0.96),
        (answer(difference(severity=1), difference("text_error", 3)), 0.92),
        (answer(*[difference(severity=3)] * 16), 0.04),
        (answer(*[difference(severity=3)] * 40), 0.0),
        (answer(PLACED), 0.96),
        (answer(difference(), data_error_count=1, style_error_count=0), 0.96),
        (answer(data_error_count=0), 1.0),
        (answer({"type": "Style", "severity": 1.0}), 0.98),
        (f"```json\n{answer(difference())}\n```", 0.96),
        (f"<think>{answer()}</think>\n{answer(difference())}\n", 0.96),
        (json.dumps(json.loads(answer(difference(), PLACED)), indent=2), 0.92),
    ],
)
def test_the_score_is_what_severities_leave(said, score):
    assert verdict(said).score == pytest.approx(score)


def test_points_are_the_severities_of_each_category():
    said = answer(difference(), difference(severity=3), difference("structure_error", 1))
    expected = {"structure": 1.0, "data": 5.0, "text": 0.0, "style": 0.0}
    assert read_differences(said) == verdict(said).points == expected


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ("", "not one JSON object"),
        ("The charts look alike.", "not one JSON object"),
        ("[]", "not one JSON object"),
        ("{}", "no list of errors"),
        ('{"errors": {}}', "no list of errors"),
        ('{"errors": null}', "no list of errors"),
        (answer(difference())[:-1], "not one JSON object"),
        (f"The title reads {answer()}", "not one JSON object"),
        (f"{answer()} {answer(difference())}", "not one JSON object"),
        (answer(difference()) + "\nThat is all.", "not one JSON object"),
        ('{"errors": [], "errors": []}', "a key twice"),
        (answer(data_error_count=3), "counts differences and lists none"),
        (answer("a title"), "no difference"),
        (answer(None), "no difference"),
        (answer(difference("color_error")), "no category"),
        (answer(difference(None)), "no category"),
        (answer({"severity": 2}), "no category"),
        *(
            (answer(difference(severity=severity)), "no severity from 1 to 3")
            for severity in (0, 4, -1, 2.5, "2", "severe", True, None, [2], {}, 10**400)
        ),
        (answer(difference()).replace("2}", "NaN}"), "no severity"),
        ("[" * 60_000, "not one JSON object"),
        ('{"errors":[' * 5_000, "not one JSON object"),
        ("x" * 70_000, "70000 characters"),
        (f"<think>{answer()}", "not one JSON object"),
    ],
)
def test_answers_that_cannot_be_read_are_not_scored(said, problem):
    with pytest.raises(ValueError, match=problem):
        read_differences(said)
    assert verdict(said).score is None and problem in verdict(said).problem


def test_a_quoted_list_is_no_answer():
    """A title may be an empty list of differences; a judge that forgets to escape it quotes it."""
    said = answer(PLACED).replace('\\"', '"')
    assert verdict(said).score is None


def test_the_form_in_the_prompt_can_be_read():
    assert verdict(AFTER.rpartition("\n")[2]).score == pytest.approx(0.96)


def test_the_two_questions_differ_in_name_and_words():
    assert [q.judge("local") for q in (POINTS_QUESTION, DIFFERENCES)] == [
        "local",
        "local differences",
    ]
    assert POINTS_QUESTION.prompt != DIFFERENCES.prompt
