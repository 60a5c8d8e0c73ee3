"""What the grammars say of themselves is true of their charts."""

import json
import re

import pytest

from mmrecoder_jax.data import panels, synthetic
from mmrecoder_jax.data.grammars import GRAMMARS, drawn_as

CODES = {
    name: "\n".join(grammar.chart_spec(0, index).code() for index in range(200))
    for name, grammar in GRAMMARS.items()
}


@pytest.mark.parametrize("name", GRAMMARS)
def test_a_description_is_a_phrase_that_names_all_kinds(name):
    grammar = GRAMMARS[name]
    kinds = set(re.findall(r"\b(?:ax|plt)\.([a-z_]+)\((?:x|range|\[)", CODES[name]))
    assert kinds and all(kind in grammar.DESCRIPTION for kind in kinds)
    for phrase in (grammar.DESCRIPTION, grammar.BEYOND):
        assert phrase and not phrase.endswith((".", ",", ";"))


def test_numbers_of_words():
    said, values = synthetic.DESCRIPTION, re.findall(r"x, \[([\d,]+)\]", CODES["words"])
    assert {len(listed.split(",")) for listed in values} == {3, 4, 5} and "3 to 5 points" in said
    assert all(int(value) < 10 for listed in values for value in listed.split(","))
    assert f"{len(synthetic.words())} words" in said
    assert all(color in said for color in set(re.findall(r"color='(\w+)'", CODES["words"])))


def test_numbers_of_panels():
    said, code = panels.DESCRIPTION, CODES["panels"]
    assert set(re.findall(r"range\((\d)\)", code)) == {"3"} and "3 bars in each" in said
    lists = [set(listed.split(",")) for listed in re.findall(r"\), \[([\d,]+)\]", code)]
    assert set.union(*lists) == set("369") and set.intersection(*lists) == {"9"}
    assert "3, 6, 9 of which the largest" in said
    assert set("".join(re.findall(r"'#(\w+)'", code))) == set("3579") and "3579" in said
    titles = set(re.findall(r"suptitle\('(.*)'", code))
    assert {len(title.split()) for title in titles} == {2} and "title of 2 syllables" in said
    assert set(re.findall(r"GridSpec\(2, (\d+)", code)) == {"40"} and "grid of 40 columns" in said


def test_a_house_style_says_whose_it_is():
    for name, grammar in GRAMMARS.items():
        assert drawn_as(grammar.RC_PARAMS) == name
        assert drawn_as(json.loads(json.dumps(grammar.RC_PARAMS))) == name  # tuples became lists
        assert drawn_as({**grammar.RC_PARAMS, "font.size": 99}) == ""
    assert drawn_as({}) == ""
