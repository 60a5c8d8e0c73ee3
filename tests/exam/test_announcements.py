"""What a thought announces and the code does not contain; each line is one rule of the module."""

import pytest

from mmrecoder_jax.data import panels
from mmrecoder_jax.exam.announcements import announced_and_missing

CODE = """import matplotlib.pyplot as plt

fig, ax = plt.subplots()
x = ["Jan", "Feb", "Mar"]
ax.bar(x, [4, 6, 5], color="pink")
ax.set_title("Budget of it")
ax.legend(loc="upper left")
ax.plot([1], [2], "r--")
ax.axhline(1, color="#102030")
"""


@pytest.mark.parametrize(
    "thought, count, missing",
    [
        # The package's own short thoughts.
        ("bar, plot, 2 series, 3 points", 4, []),
        ("bar, 2 series, 3 points", 3, []),
        ("barh, plot, 2 series, 3 points", 4, ["barh"]),
        ("bar, plot, 3 series, 4 points", 4, ["3 series", "4 points"]),
        # Quoted text: case, blanks and quotes apart.
        ('Add the title "budget OF it".', 2, []),
        ('Add the title "Rain".', 2, ["Rain"]),
        ("I will set the title to 'Rain'.", 1, ["Rain"]),
        ("Add `ax.legend( loc='upper left' )`.", 1, []),
        # What is changed is announced behind to, with, into, as; without one nothing is.
        ("Change 'Rain' to 'Budget of it'.", 1, []),
        ("Change 'Budget of it' to 'Rain'.", 1, ["Rain"]),
        ("Fix the 'Rain' label.", 0, []),
        ("The title is wrong.", 0, []),
        # Colours: names, letters of formats, hex values that are alike.
        ("Make the bars into pink ones.", 1, []),
        ("Use red for the line.", 1, []),
        ("Use green for the line.", 1, ["green"]),
        ("Use #112130 for the line.", 1, []),
        ("Use #FFFF00 for the line.", 1, ["#ffff00"]),
        # Parts.
        ("Add a legend.", 1, []),
        ("Add a legend and a grid.", 2, ["grid"]),
        ("I am adding a colorbar; then I use a heat map.", 2, ["colorbar", "heat map"]),
        # Sentences that deny, doubt or compare.
        ("Add no grid.", 0, []),
        ("Draw the line without a grid.", 0, []),
        ("Maybe add a grid.", 0, []),
        ("Use a grid instead of a legend.", 0, []),
        ("", 0, []),
    ],
)
def test_a_thought_against_its_code(thought, count, missing):
    assert announced_and_missing(thought, CODE, before=None) == (count, missing)


@pytest.mark.parametrize(
    "change, fulfilled",
    [
        (("Budget of it", "Rain"), "text"),
        (("pink", "blue"), "color"),
        (("ax.bar(", "ax.barh("), "type"),
        (("subplots()", "subplots(2, 1)"), "layout"),
    ],
)
def test_fixes_of_parts_are_looked_for_in_the_code_before(change, fulfilled):
    after = CODE.replace(*change)
    assert announced_and_missing("Fix text, layout, type, color.", after, CODE) == (
        4,
        [part for part in ("text", "layout", "type", "color") if part != fulfilled],
    )
    assert announced_and_missing(f"Fix {fulfilled}.", after, CODE) == (1, [])
    assert announced_and_missing(f"Fix {fulfilled}.", after, None) == (0, [])


def test_a_fix_of_an_error_is_another_code():
    assert announced_and_missing("Fix error: ValueError.", CODE, CODE + "\n") == (1, ["error"])
    assert announced_and_missing("Fix error: ValueError.", CODE, "1 / 0") == (1, [])


@pytest.mark.parametrize("code", ["x = (", "(" * 30_000, "-" * 30_000 + "1", "'\\d'", "\0"])
def test_code_that_is_no_python_ends_nothing(code):
    assert announced_and_missing('Add "Rain".', code, None) == (1, ["Rain"])
    assert announced_and_missing("Fix text.", code, code) == (1, ["text"])


SPEC = next(
    spec
    for spec in (panels.chart_spec(0, index) for index in range(50))
    if spec.columns[0] < panels.COLUMNS - 8
)


def test_moves_of_panels_are_held_against_the_code_before():
    code, (stop, _) = SPEC.code(), SPEC.columns
    before = code.replace(f"[0, :{stop}]", f"[0, :{stop + 2}]")
    assert before != code
    assert announced_and_missing("Fix columns -2 0.", code, before) == (1, [])
    assert announced_and_missing("Fix columns -2 0.", code, code) == (1, ["columns -2 0"])
    assert announced_and_missing("Fix columns -1 0.", code, before) == (1, ["columns -1 0"])
    assert announced_and_missing("Fix columns 0 0, title.", code, before) == (1, ["title"])
    both = ["title", "2 blue -1"]
    assert announced_and_missing("Fix columns -2 0, title, 2 blue -1.", code, before) == (3, both)
    retitled = code.replace(SPEC.title, "Another")
    assert announced_and_missing("Fix columns -2 0, title.", retitled, before) == (2, [])
    assert announced_and_missing("Fix columns -2 0.", code, None) == (0, [])
    assert announced_and_missing("Fix columns -2 0.", "1 /", before) == (1, ["columns -2 0"])
    assert announced_and_missing("Redraw.", code, before) == (0, [])


def test_moves_of_panels_that_are_worked_out():
    code, (stop, start) = SPEC.code(), SPEC.columns
    before = code.replace(f"[0, :{stop}]", f"[0, :{stop + 2}]")
    thought = panels.diagnosis(before, code)
    assert thought == f"Fix columns {stop + 2}-2={stop} {start}."
    assert announced_and_missing(thought, code, before) == (1, [])
    assert announced_and_missing(thought, before, before) == (1, ["columns -2 0"])
    # what it comes to counts, not how it got there
    wrong = f"Fix columns {stop + 2}-2={stop + 1} {start}, title."
    assert announced_and_missing(wrong, code, before) == (2, ["columns -1 0", "title"])
    still = f"Fix columns {stop}-2={stop} {start}."
    assert announced_and_missing(still, code, before) == (0, [])
