"""Authors by what a user names; the policy in the box, on charts that it has not seen."""

import dataclasses
import json

import numpy as np
import pytest

from mmrecoder_jax import drawing
from mmrecoder_jax.config import SETTINGS_FILE, ConfigError, load, saved_field
from mmrecoder_jax.data.build import build_synthetic
from mmrecoder_jax.drawing.authors import NotShown, written
from mmrecoder_jax.drawing.open import (
    ASKED,
    BOXED,
    Who,
    author_config,
    keep_programs,
    open_author,
)
from mmrecoder_jax.env.chart_env import ChartEnv
from mmrecoder_jax.env.response import extract_code
from mmrecoder_jax.env.wire import Status
from mmrecoder_jax.stage import env_config


@pytest.fixture(scope="module")
def house():
    """Executors in the house style of the grammar that the policy in the box knows."""
    config = author_config(Who())
    config.env.workers = 2
    with ChartEnv(env_config(config)) as env:
        yield env


@pytest.fixture(scope="module")
def charts(house, tmp_path_factory):
    """Toy charts of its grammar, of the test split, with their records."""
    directory = str(tmp_path_factory.mktemp("charts") / "test")
    grammar = author_config(Who()).data.grammar
    made = build_synthetic(directory, "test", 8, 77, house, lambda done, total: None, grammar)
    return [made[number] for number in range(8)]


@pytest.fixture(scope="module")
def boxed(house):
    with open_author(Who(), env=house) as author:
        yield author


@pytest.fixture(scope="module")
def answers(boxed, charts):
    return {number: found for number, _, found in boxed.answer(charts, turns=2)}


def test_the_policy_in_the_box_draws_toy_charts(boxed, answers, charts):
    assert boxed.name == "the policy in the box" and sorted(answers) == list(range(8))
    first = [answers[number].turns[0] for number in range(8)]
    assert sum(turn.execution.ok for turn in first) >= 7
    # Its words depend on the release of Matplotlib (docs/results.md), kinds of charts do not.
    assert np.mean([turn.scores.type for turn in first]) > 0.8
    assert np.mean([turn.scores.overall for turn in first]) > 0.6
    assert all(found.chart is charts[number] for number, found in answers.items())


def test_answers_depend_on_the_chart_and_not_on_who_is_beside_it(boxed, answers, charts):
    again = list(boxed.answer(charts, turns=2, numbers=[5, 2, 0, 1, 3, 4, 6, 7]))
    assert {number for number, _, _ in again} == set(range(8))
    for number, _, found in again:
        assert [turn.text for turn in found.turns] == [turn.text for turn in answers[number].turns]


def test_a_chart_without_a_record_is_answered_alike_and_has_no_score(boxed, answers, charts):
    bare = [dataclasses.replace(chart, record=None, code="") for chart in charts]
    bare[3] = dataclasses.replace(bare[3], image=b"<html>")
    for number, _, found in boxed.answer(bare, turns=2):
        assert not any(turn.scores.known for turn in found.turns)
        if number == 3:
            assert [turn.execution.status for turn in found.turns] == [Status.REFUSED] * 2
        else:
            assert found.turns[0].text == answers[number].turns[0].text


def test_samples_differ_and_come_again(boxed, charts):
    def sampled():
        asked = boxed.answer(charts[:2], turns=2, samples=4, temperature=1.5, seed=3)
        return {(number, sample): found.turns[0].text for number, sample, found in asked}

    first = sampled()
    assert sorted(first) == [(number, sample) for number in (0, 1) for sample in range(4)]
    assert len(set(first.values())) > 2 and sampled() == first
    with pytest.raises(ConfigError, match="all samples would be equal"):
        next(boxed.answer(charts, turns=1, samples=2))


def test_the_box_says_how_it_wants_to_be_asked():
    config = author_config(Who())
    assert (config.size, config.data.kind) == ("tiny", "synthetic")
    assert config.data.instruction == "Redraw this chart as Matplotlib code."
    assert config.init_from == BOXED
    with open(f"{BOXED}/{SETTINGS_FILE}", encoding="utf-8") as file:
        said = json.load(file)
    assert set(said) - {"size"} <= set(ASKED)
    now = json.loads(config.to_json_best_effort())
    for name in ("data.grammar", "data.windows", "feedback.image", "rl.response_length"):
        assert saved_field(now, name) == said[name], name
    assert config.eval.remembered + 1 == said["rl.turns"] == 2


def test_a_work_directory_is_asked_as_it_was_trained(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    saved = {
        "size": "smoke",
        "stage": "stage2",
        "feedback": {"image": "both", "render": "Look.", "error": "{error}"},
        "data": {
            **{"kind": "directory", "windows": [6, 24], "instruction": "Draw."},
            "grammar": "panels",
        },
        "env": {"workers": 99, "dpi": 50},
    }
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert author_config(Who(str(tmp_path))).eval.remembered == 1
    (tmp_path / "config.json").write_text(json.dumps(saved | {"rl": {"turns": 1}}))
    assert author_config(Who(str(tmp_path))).eval.remembered == 1  # 0 would be all
    (tmp_path / "config.json").write_text(json.dumps(saved | {"rl": {"turns": 3}}))
    config = author_config(Who(str(tmp_path)))
    assert config.eval.remembered == 2
    assert (config.feedback.image, config.feedback.render) == ("both", "Look.")
    assert (config.data.kind, config.data.windows) == ("directory", (6, 24))
    assert config.data.grammar == "panels"
    assert (config.env.dpi, config.rl.response_length) == (50, 32)
    assert config.env.workers != 99  # this machine's, not that of the training
    assert config.init_from == str(tmp_path)


def test_what_was_saved_before_there_were_grammars_is_of_words(tmp_path, monkeypatch):
    """Also where the configuration of an evaluation has another by now."""

    def later(name, size):
        config = load(name, size)
        config.data.grammar = "panels"
        return config

    monkeypatch.setattr(drawing.open, "load", later)
    (tmp_path / "checkpoints").mkdir()
    for data, found in (
        ({"kind": "synthetic"}, "words"),
        ({"kind": "synthetic", "grammar": "panels"}, "panels"),
    ):
        saved = {"size": "smoke", "stage": "stage2", "data": data}
        (tmp_path / "config.json").write_text(json.dumps(saved))
        assert author_config(Who(str(tmp_path))).data.grammar == found


def test_a_directory_without_settings_is_asked_as_the_paper_asks(tmp_path):
    source = tmp_path / "model"
    source.mkdir()
    with open(f"{BOXED}/config.json", encoding="utf-8") as file:
        (source / "config.json").write_text(file.read())
    config = author_config(Who(str(source)))
    assert (config.size, config.feedback.image) == ("paper", "render")
    assert config.model.preset == "published"


@pytest.mark.parametrize(
    "made, said",
    [
        ((), "no such directory"),
        (("stage1/checkpoints", "stage2/checkpoints"), "several policies: give one, such as .*2"),
        (("other",), "no such file, a published model has one"),
    ],
)
def test_what_is_no_author_is_refused(tmp_path, made, said):
    for name in made:
        (tmp_path / "runs" / name).mkdir(parents=True)
    with pytest.raises(ConfigError, match=f"--checkpoint.*{said}"):
        author_config(Who(str(tmp_path / "runs")))
    with pytest.raises(ConfigError, match="--checkpoint='gs://b': name a folder in a bucket"):
        author_config(Who("gs://b"))


def test_a_conversation_goes_on_as_if_it_had_been_asked_at_once(boxed, answers, charts):
    whole = answers[1].turns
    told = []
    assert boxed.next(charts[1], [], told=told.append).text == whole[0].text
    assert all(whole[0].text.startswith(text) for text in told)
    assert 0 < len(told) == len(set(told)) and told[0] and told[-1] != whole[0].text
    following = boxed.next(charts[1], [whole[0]])
    assert following.text == whole[1].text
    assert following.scores == whole[1].scores


def test_a_turn_may_be_a_persons(boxed, charts, house):
    code = charts[1].code  # of another chart
    mine = written(code, house.submit(code).result(), charts[0])
    assert mine.execution.ok and extract_code(mine.text).strip() == code
    assert boxed.next(charts[0], [mine]).text
    long = written(code + "\n# word" * 99, mine.execution, charts[0])
    most = author_config(Who()).rl.response_length
    with pytest.raises(NotShown, match=rf"turn 1 has .* tokens, and this author reads {most}"):
        boxed.next(charts[0], [long])
    with pytest.raises(NotShown, match="cannot be read"):
        boxed.next(dataclasses.replace(charts[0], image=b"<html>"), [])


def test_programs_are_kept_in_the_cache_of_the_user_where_nobody_chose_a_place(
    monkeypatch, tmp_path
):
    found = {}
    monkeypatch.setattr("jax.config.update", found.__setitem__)
    keep_programs()
    assert found == {}  # the tests have chosen one
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_programs()
    assert found["jax_compilation_cache_dir"] == str(tmp_path / "mmrecoder_jax" / "programs")
