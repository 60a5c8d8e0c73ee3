"""What the pipeline does about real charts: there, gathered, or missing. A policy starts on charts
of its own grammar.
"""

import json
import os

import pytest

from mmrecoder_jax import evaluate, pipeline, preflight, prepare
from mmrecoder_jax.config import ConfigError, load
from mmrecoder_jax.data import panels, sdists, synthetic
from mmrecoder_jax.data.sources import ChartDirectory


def of_gallery(gallery: str, sample: int):
    config = load("pipeline", "tiny")
    config.data.gallery, config.data.gallery_sample, config.env.workers = gallery, sample, 1
    return config


def test_a_gallery_that_is_there_is_taken(tmp_path):
    assert prepare.ensure_gallery(of_gallery(str(tmp_path), 5), str(tmp_path / "work")) == str(
        tmp_path
    )


def test_a_missing_gallery_is_sampled_once(tmp_path, index, monkeypatch, capsys):
    monkeypatch.setattr(sdists, "INDEX", index[0])
    config = of_gallery(str(tmp_path / "none"), 5)
    directory = prepare.ensure_gallery(config, str(tmp_path))
    assert directory == os.path.join(str(tmp_path), "data", "gallery")
    assert len(ChartDirectory(directory)) == 2
    assert "mmrecoder_jax.build_gallery" in capsys.readouterr().out
    monkeypatch.setattr(sdists, "INDEX", "http://127.0.0.1:9")
    assert prepare.ensure_gallery(config, str(tmp_path)) == directory


def test_no_index_ends_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sdists, "INDEX", "http://127.0.0.1:9")
    assert prepare.ensure_gallery(of_gallery(str(tmp_path / "none"), 5), str(tmp_path)) == ""
    assert "cannot get matplotlib-3.8.4.tar.gz" in capsys.readouterr().out
    assert prepare.ensure_gallery(of_gallery("", 5), str(tmp_path)) == ""


def directory(where, **said):
    """A directory of ours that says this of its policy, by the file that says it."""
    where.mkdir()
    if "config" in said:
        (where / "checkpoints").mkdir()
    for name, content in said.items():
        (where / f"{name}.json").write_text(json.dumps(content))
    return str(where)


def asked(name: str, source: str, grammar: str, kind: str = "synthetic"):
    config = load(name, "smoke")
    config.data.grammar, config.data.kind, config.init_from = grammar, kind, source
    return config


SYNTHETIC = {"kind": "synthetic"}
WORDS, PANELS = (SYNTHETIC | {"grammar": name} for name in ("words", "panels"))


@pytest.mark.parametrize(
    "said, grammar, theirs",
    [
        ({"config": {"data": WORDS}}, "panels", "words"),
        ({"config": {"data": PANELS}}, "words", "panels"),
        ({"config": {"data": SYNTHETIC}}, "panels", "words"),  # of a version with one grammar
        ({"mmrecoder": {"data.kind": "synthetic", "data.grammar": "panels"}}, "words", "panels"),
        ({"mmrecoder": {"data.kind": "synthetic"}}, "panels", "words"),
        ({"training_config": {"data": PANELS}}, "words", "panels"),
    ],
)
def test_a_policy_of_another_grammar_is_refused(tmp_path, said, grammar, theirs):
    source = directory(tmp_path / "source", **said)
    message = (
        f"^data.grammar='{grammar}', but the policy of init_from='{source}' .* '{theirs}': set "
        f"--config.data.grammar={theirs}, or"
    )
    for config in (asked("stage2", source, grammar), asked("evaluate", source, grammar)):
        with pytest.raises(ConfigError, match=message):
            prepare.find_source(config)
        config.data.grammar = theirs
        prepare.check_grammar(config)


def test_every_command_refuses_it_before_it_makes_anything(tmp_path, capsys):
    source = directory(tmp_path / "source", config={"data": WORDS})
    work = tmp_path / "work"
    for run, name in (
        (pipeline.run_stage, "sft_chart2code"),
        (pipeline.run_stage, "stage2"),
        (pipeline.run_pipeline, "pipeline"),
        (evaluate.main, "evaluate"),
    ):
        with pytest.raises(ConfigError, match=r"--config\.data\.grammar=words"):
            run(asked(name, source, "panels"), str(work))
        assert not work.exists()
    assert not preflight.preflight(asked("stage2", source, "panels"), str(work), {})
    assert "sources: FAILED: data.grammar='panels'" in capsys.readouterr().out


@pytest.mark.parametrize(
    "said, kind",
    [
        ({"config": {"data": WORDS}}, "directory"),  # charts of no grammar
        ({"config": {"data": WORDS | {"kind": "directory"}}}, "synthetic"),  # a policy of none
        ({}, "synthetic"),  # a published directory
    ],
)
def test_what_has_no_grammar_may_meet_any(tmp_path, said, kind):
    source = directory(tmp_path / "source", **said)
    prepare.check_grammar(asked("stage2", source, "panels", kind))
    prepare.check_grammar(asked("stage2", "", "panels", kind))


def test_settings_that_cannot_be_read_are_named(tmp_path):
    source = directory(tmp_path / "source", mmrecoder=[])
    with pytest.raises(ValueError, match=r"mmrecoder\.json is not a JSON object"):
        prepare.check_grammar(asked("stage2", source, "panels"))


def test_charts_of_another_grammar_are_refused(tmp_path):
    meta = tmp_path / "data" / "train" / "meta.json"
    meta.parent.mkdir(parents=True)
    for split in ("val", "test"):  # of charts that nobody knows: they may be any
        (tmp_path / "data" / split).mkdir()
    config = asked("stage2", "", "words")
    config.data.dir = str(tmp_path / "data")
    for name, style in (("panels", panels.RC_PARAMS), ("words", synthetic.RC_PARAMS), ("", {})):
        meta.write_text(json.dumps({"rc_params": style}))
        if name == "panels":
            with pytest.raises(ConfigError, match=r"holds .* 'panels': set .*grammar=panels, or"):
                prepare.ensure_charts(config, str(tmp_path))
        else:
            prepare.ensure_charts(config, str(tmp_path))
    config.data.kind = "directory"
    meta.write_text(json.dumps({"rc_params": panels.RC_PARAMS}))
    prepare.ensure_charts(config, str(tmp_path))


@pytest.mark.parametrize(
    "meta, field",
    [
        ({"feedback": "difference", "grammar": "panels"}, "feedback.image=difference"),
        ({"feedback": "signed", "grammar": "words"}, "data.grammar=words"),
        ({"feedback": "signed", "grammar": "panels"}, ""),
        ({"licence": "none"}, ""),  # of others: it does not say
        (None, ""),
    ],
)
def test_given_dialogues_are_about_what_the_stage_learns(tmp_path, meta, field):
    config = load("sft_self_correction", "tiny")
    if meta is not None:
        (tmp_path / "meta.json").write_text(json.dumps(meta))
    if not field:
        prepare.check_dialogues(config, str(tmp_path))
        return
    with pytest.raises(ConfigError, match=f"give --config.{field}, or other dialogues"):
        prepare.check_dialogues(config, str(tmp_path))
    config.data.kind = "directory"  # its charts are of no grammar
    if field.startswith("data"):
        prepare.check_dialogues(config, str(tmp_path))
