"""The grammar of panels: charts that draw what their code says, mistakes that are small."""

import ast
import random
import re

import numpy as np
import pytest

from mmrecoder_jax.data import grammars, panels, splits
from mmrecoder_jax.data.build import build_synthetic, check_synthetic
from mmrecoder_jax.data.self_correction import build_dialogues, synthetic_drafts
from mmrecoder_jax.env import ExecutorPool, Status
from mmrecoder_jax.env.chartmimic import score
from mmrecoder_jax.env.execution import EnvConfig
from mmrecoder_jax.env.response import extract_code, has_format

SPECS = [panels.chart_spec(0, index) for index in range(200)]


@pytest.fixture(scope="module")
def panels_pool():
    config = EnvConfig(workers=1, dpi=70, rc_params=panels.RC_PARAMS, preload=("matplotlib",))
    with ExecutorPool(config) as pool:
        yield pool


def test_depends_on_seed_index_and_split_alone():
    assert SPECS[:20] == [panels.chart_spec(0, index) for index in range(20)]
    assert panels.chart_spec(0, 5) != panels.chart_spec(1, 5)
    tests = {panels.chart_spec(0, index, "test").code() for index in range(200)}
    assert not tests & {spec.code() for spec in SPECS}
    assert all(splits.split_of(code) == "test" for code in tests)


def test_what_a_spec_may_hold():
    for spec in SPECS:
        (left, right), (stop, start) = spec.edges, spec.columns
        assert panels.LEFT[0] <= left <= panels.LEFT[1] < panels.RIGHT[0] <= right
        assert right <= panels.RIGHT[1]
        assert panels.NARROWEST <= stop <= panels.COLUMNS
        assert 0 <= start <= panels.COLUMNS - panels.NARROWEST
        for panel in spec.panels:
            assert set(panel.values) <= set(panels.VALUES)
            assert max(panel.values) == max(panels.VALUES)
            assert set(panel.color) <= set(panels.DIGITS)
        assert all(word in panels.SYLLABLES for word in spec.title.split())
        assert has_format(spec.response())
        assert extract_code(spec.response()).rstrip("\n") == spec.code()
    kinds = {panel.kind for spec in SPECS for panel in spec.panels}
    assert kinds == set(panels.KINDS)


def test_the_score_sees_what_the_specs_say(panels_pool):
    for spec, execution in zip(
        SPECS[:12], panels_pool.run([s.code() for s in SPECS[:12]]), strict=True
    ):
        record = execution.record
        assert execution.image.shape == (112, 168, 3)
        assert tuple(record.texts) == (spec.title,)  # no ticks
        assert len(record.layout) == len(spec.panels)
        drawn = {color.partition("--")[2].lower() for color in record.colors}
        full = {"".join(2 * digit for digit in panel.color) for panel in spec.panels}
        assert drawn == {f"#{color}" for color in full}


def test_columns_are_fractions_of_the_common_width(panels_pool):
    for spec, execution in zip(
        SPECS[:12], panels_pool.run([s.code() for s in SPECS[:12]]), strict=True
    ):
        (left, right), (stop, start) = spec.edges, spec.columns
        width = (right - left) / panels.COLUMNS
        for line, expected in (
            (29, (left, left + stop * width)),  # of pixels, above the bars of the upper panel
            (73, (left + start * width, right)),
        ):
            dark = execution.image[line].sum(axis=-1) < 300
            ends = np.flatnonzero(np.diff(np.pad(dark.astype(int), 1)))
            assert np.abs(ends - 1.68 * np.array(expected)).max() < 1.5


def test_a_missed_column_costs_the_panel(panels_pool):
    right = SPECS[0].code()
    stop, _ = SPECS[0].columns
    ours, target = panels_pool.run([right.replace(f"[0, :{stop}]", f"[0, :{stop - 1}]"), right])
    scores = score(ours.record, target.record)
    assert (scores.text, scores.type, scores.color) == (1, 1, 1)
    assert scores.layout == pytest.approx(0.5)


def test_mistakes_are_small_and_the_score_sees_them(panels_pool):
    rng = random.Random(0)
    codes = [spec.code() for spec in SPECS[:24]]
    wrong = [panels.corrupt(code, [], rng) for code in codes]
    for code, edited in zip(codes, wrong, strict=True):
        ast.parse(edited)
        changed = set(code.splitlines()) ^ set(edited.splitlines())
        assert 2 <= len(changed) <= 2 * panels.MOST_EDITS
    right, edited = panels_pool.run(codes), panels_pool.run(wrong)
    assert all(execution.status == Status.OK for execution in edited)
    scores = [score(e.record, r.record).overall for e, r in zip(edited, right, strict=True)]
    assert max(scores) < 1 and sum(scores) / len(scores) > 0.6


def test_edits_need_something_to_change():
    with pytest.raises(ValueError, match="no edit applies"):
        panels.corrupt("print(1)", [], random.Random(0))


def test_a_directory_of_one_grammar_is_not_one_of_another(tmp_path, panels_pool):
    build_synthetic(tmp_path / "val", "val", 3, 0, panels_pool, grammar="panels")
    assert len(check_synthetic(tmp_path / "val", "val", 3, 0, panels_pool.config, "panels")) == 3
    with pytest.raises(ValueError, match="holds other charts \\(grammar"):
        check_synthetic(tmp_path / "val", "val", 3, 0, panels_pool.config, "words")


@pytest.mark.parametrize("name", grammars.GRAMMARS)
def test_every_grammar_has_what_a_run_needs(name):
    grammar = grammars.GRAMMARS[name]
    assert isinstance(grammar, grammars.Grammar)
    code = grammar.chart_spec(0, 1).code()
    assert grammar.corrupt(code, [grammar.chart_spec(0, 2).code()], random.Random(0)) != code
    assert grammar.tokenizer_texts(200, 0, ["own words"]).count("own words") == 20


def test_a_diagnosis_names_what_is_to_be_done():
    spec = next(spec for spec in SPECS if spec.panels[1].kind == "bar" and spec.columns[1] > 3)
    code = spec.code()
    (left, _), (stop, start) = spec.edges, spec.columns
    color = spec.panels[1].color
    assert panels.diagnosis(code, code) is None
    step = 1 if color[0] == panels.DIGITS[0] else -1
    red = panels.DIGITS[panels.DIGITS.index(color[0]) + step]
    head, tail = code.split("gs[1, ")
    wrong = f"{head}gs[1, {tail.replace(f'#{color}', f'#{red}{color[1:]}')}"
    assert panels.diagnosis(wrong, code) == f"Fix columns {stop} {start}, 2 red {-step:+}."
    assert panels.differences(wrong, code) == ["columns 0 0", f"2 red {-step:+}"]
    wrong = wrong.replace(f"[0, :{stop}]", f"[0, :{stop - 2}]").replace(spec.title, "KA KA")
    upper = f"{stop - 2}+2={stop}"
    found = f"Fix columns {upper} {start}, title, 2 red {-step:+}."
    assert panels.diagnosis(wrong, code) == found
    wrong = wrong.replace(f"[1, {start}:]", f"[1, {start - 3}:]")
    wrong = wrong.replace(f"left=0.{left:02d}", f"left=0.{left + 1:02d}")
    lower = f"{start - 3}+3={start}"
    found = f"Fix columns {upper} {lower}, title, left -1, 2 red {-step:+}."
    assert panels.diagnosis(wrong, code) == found
    assert panels.diagnosis(wrong.replace(".bar(", ".barh("), code) is None
    assert panels.diagnosis(wrong.replace("[0, :", "[0, "), code) is None
    for other in ("[3,,9]", "[3,9]", "3"):
        values = ",".join(map(str, spec.panels[1].values))
        assert panels.diagnosis(code.replace(f"[{values}]", other), code) is None
    every = re.sub(r"\[\d,[\d,]+\]", "[1,1,1]", code)
    assert panels.diagnosis(every, code) == "Redraw."


def test_dialogues_think_the_diagnosis(tmp_path, panels_pool):
    charts = build_synthetic(tmp_path / "train", "train", 8, 0, panels_pool, grammar="panels")
    drafts = list(synthetic_drafts(charts, 30, 0, panels.corrupt))
    dialogues = build_dialogues(
        *(tmp_path / "set", drafts, panels_pool, panels_pool, {}),
        *({"image": "signed", "render": "Improve it.", "error": "{error}"}, 0.0),
        diagnosis=panels.diagnosis,
    )
    thoughts = [think.split("</think>")[0] for think in (d.responses[1] for d in dialogues)]
    assert any("Fix columns " in t for t in thoughts), thoughts
    assert any("Fix error" in t for t in thoughts)
