"""The grammar of shades: charts that draw what their code says, mistakes that are small."""

import ast
import random

import pytest

from mmrecoder_jax.data import grammars, shades, splits
from mmrecoder_jax.data.build import build_synthetic, check_synthetic
from mmrecoder_jax.data.self_correction import build_dialogues, synthetic_drafts
from mmrecoder_jax.env import ExecutorPool, Status
from mmrecoder_jax.env.chartmimic import score
from mmrecoder_jax.env.execution import EnvConfig
from mmrecoder_jax.env.response import extract_code, has_format

SPECS = [shades.chart_spec(0, index) for index in range(200)]


@pytest.fixture(scope="module")
def shades_pool():
    config = EnvConfig(workers=1, dpi=70, rc_params=shades.RC_PARAMS, preload=("matplotlib",))
    with ExecutorPool(config) as pool:
        yield pool


def test_depends_on_seed_index_and_split_alone():
    assert SPECS[:20] == [shades.chart_spec(0, index) for index in range(20)]
    assert shades.chart_spec(0, 5) != shades.chart_spec(1, 5)
    tests = {shades.chart_spec(0, index, "test").code() for index in range(200)}
    assert not tests & {spec.code() for spec in SPECS}
    assert all(splits.split_of(code) == "test" for code in tests)


def test_what_a_spec_may_hold():
    for spec in SPECS:
        assert spec.grid in shades.GRIDS and len(spec.panels) == spec.grid[0] * spec.grid[1]
        for panel in spec.panels:
            assert len(panel.values) == len(panel.colors) in (2, 3)
            assert min(panel.values) >= 1 and max(panel.values) == shades.LARGEST
            assert all(set(color) <= set(shades.DIGITS) for color in panel.colors)
        assert all(word in shades.SYLLABLES for word in spec.title.split())
        assert has_format(spec.response())
        assert extract_code(spec.response()).rstrip("\n") == spec.code()
    assert {spec.grid for spec in SPECS} == set(shades.GRIDS)


def test_the_score_sees_what_the_specs_say(shades_pool):
    for spec, execution in zip(
        SPECS[:12], shades_pool.run([s.code() for s in SPECS[:12]]), strict=True
    ):
        record = execution.record
        assert execution.image.shape == (112, 168, 3)
        assert tuple(record.texts) == (spec.title,)  # no ticks
        assert len(record.layout) == len(spec.panels)
        drawn = {color.partition("--")[2].lower() for color in record.colors}
        full = {"".join(2 * digit for digit in color) for p in spec.panels for color in p.colors}
        assert drawn == {f"#{color}" for color in full}


def test_mistakes_are_small_and_the_score_sees_them(shades_pool):
    rng = random.Random(0)
    codes = [spec.code() for spec in SPECS[:24]]
    wrong = [shades.corrupt(code, [], rng) for code in codes]
    for code, edited in zip(codes, wrong, strict=True):
        ast.parse(edited)
        changed = set(code.splitlines()) ^ set(edited.splitlines())
        assert 2 <= len(changed) <= 2 * shades.MOST_EDITS
    right, edited = shades_pool.run(codes), shades_pool.run(wrong)
    assert all(execution.status == Status.OK for execution in edited)
    scores = [score(e.record, r.record).overall for e, r in zip(edited, right, strict=True)]
    assert max(scores) < 1 and sum(scores) / len(scores) > 0.6


def test_edits_need_something_to_change():
    with pytest.raises(ValueError, match="no edit applies"):
        shades.corrupt("print(1)", [], random.Random(0))


def test_a_directory_of_one_grammar_is_not_one_of_another(tmp_path, shades_pool):
    build_synthetic(tmp_path / "val", "val", 3, 0, shades_pool, grammar="shades")
    assert len(check_synthetic(tmp_path / "val", "val", 3, 0, shades_pool.config, "shades")) == 3
    with pytest.raises(ValueError, match="holds other charts \\(grammar"):
        check_synthetic(tmp_path / "val", "val", 3, 0, shades_pool.config, "words")


@pytest.mark.parametrize("name", grammars.GRAMMARS)
def test_every_grammar_has_what_a_run_needs(name):
    grammar = grammars.GRAMMARS[name]
    assert isinstance(grammar, grammars.Grammar)
    code = grammar.chart_spec(0, 1).code()
    assert grammar.corrupt(code, [grammar.chart_spec(0, 2).code()], random.Random(0)) != code
    assert grammar.tokenizer_texts(200, 0, ["own words"]).count("own words") == 20


def test_a_diagnosis_names_what_is_to_be_done():
    spec = next(spec for spec in SPECS if spec.panels[0].kind == "bar")
    code = spec.code()
    panel = spec.panels[0]
    assert shades.diagnosis(code, code) is None
    lighter = "9" if panel.colors[1][0] != "9" else "0"
    step = shades.DIGITS.index(panel.colors[1][0]) - shades.DIGITS.index(lighter)
    wrong = code.replace(f"'#{panel.colors[1]}'", f"'#{lighter}{panel.colors[1][1:]}'", 1)
    assert shades.diagnosis(wrong, code) == f"Fix 2 red {step:+}."
    value = str(panel.values[0] % 9 + 1)
    wrong = wrong.replace(f"[{panel.values[0]},", f"[{value},", 1).replace(spec.title, "KA KA")
    height = panel.values[0] - int(value)
    assert shades.diagnosis(wrong, code) == f"Fix title, 1 value {height:+}, 2 red {step:+}."
    assert shades.diagnosis(wrong.replace(".bar(", ".barh("), code) is None
    assert shades.diagnosis(wrong.replace("subplot(", "subplot(1"), code) is None
    assert shades.diagnosis("plt.pie([1,,2], colors=['#000'])", code) is None
    every = code
    for color in {color for p in spec.panels for color in p.colors}:
        other = "".join("3" if digit == "0" else "0" for digit in color)
        every = every.replace(f"'#{color}'", f"'#{other}'")
    assert shades.diagnosis(every, code) == "Redraw."


def test_dialogues_think_the_diagnosis(tmp_path, shades_pool):
    charts = build_synthetic(tmp_path / "train", "train", 8, 0, shades_pool, grammar="shades")
    drafts = list(synthetic_drafts(charts, 30, 0, shades.corrupt))
    dialogues = build_dialogues(
        *(tmp_path / "set", drafts, shades_pool, shades_pool, {}),
        *({"image": "signed", "render": "Improve it.", "error": "{error}"}, 0.0),
        diagnosis=shades.diagnosis,
    )
    thoughts = [think.split("</think>")[0] for think in (d.responses[1] for d in dialogues)]
    assert any(" red " in t or " green " in t or " blue " in t for t in thoughts), thoughts
    assert any("Fix error" in t for t in thoughts)
