"""The configurations: they load in every size, hold the paper's values, share what they share, and
answer a wrong field.
"""

import ast
import re
from pathlib import Path

import pytest

from mmrecoder_jax.config import (
    SHARED,
    STAGES,
    ConfigError,
    check_choice,
    config_file,
    field_names,
    load,
    model_config,
    set_fields,
    suggest,
)
from mmrecoder_jax.env.execution import EnvConfig

CONFIGS = Path(__file__).parents[1] / "configs"
OWN_FILES = ("sft_chart2code", "sft_self_correction", "stage2", "evaluate")  # show every field
ALL = (*STAGES, "evaluate", "pipeline")


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", ["paper", "tiny", "smoke"])
def test_every_configuration_loads(name, size):
    config = load(name, size)
    assert config.stage == name and config.size == size


def test_paper_values():
    for name in ("stage1", "stage2"):
        config = load(name, None)
        assert (config.rl.group, config.train.batch_size, config.optim.lr) == (8, 128, 1e-6)
        assert (config.rl.response_length, config.train.epochs) == (4096, 1.0)
        assert (config.reward.gamma, config.reward.eta) == (0.0, 0.0)
    first, second = load("sft_chart2code", None), load("sft_self_correction", None)
    assert (first.train.batch_size, first.optim.lr, first.train.epochs) == (128, 1e-5, 1.0)
    assert (second.train.epochs, second.dialogues.min_gain) == (2.0, 0.02)


@pytest.mark.parametrize("name", OWN_FILES)
def test_a_file_shows_every_field_with_a_comment(name):
    """Each field is a key of the literal in the file. It, its section or a neighbour above says
    what it is for.
    """
    source = (CONFIGS / f"{name}.py").read_text()
    tree = ast.parse(source)
    (call,) = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", "") == "ConfigDict"
        and node.args
        and isinstance(node.args[0], ast.Dict)
        and node.args[0].keys
    )
    shown = set()

    def collect(literal: ast.Dict, prefix: str) -> None:
        for key, value in zip(literal.keys, literal.values, strict=True):
            shown.add(prefix + key.value)
            if isinstance(value, ast.Dict):
                collect(value, f"{prefix}{key.value}.")

    collect(call.args[0], "")
    assert shown == set(field_names(load(name, None)))
    lines = source.splitlines()[call.lineno : call.end_lineno]
    fields = [line for line in lines if re.match(r'\s+"\w+": [^{]', line)]
    commented = [line for line in fields if "  # " in line]
    assert len(commented) > 0.7 * len(fields)


@pytest.mark.parametrize("name", ALL)
def test_a_file_gives_its_command_and_the_expected_time(name):
    doc = ast.get_docstring(ast.parse((CONFIGS / f"{name}.py").read_text()))
    command = "evaluate" if name == "evaluate" else "train"
    assert f"python -m mmrecoder_jax.{command} --config=configs/{name}.py:tiny" in doc
    assert re.search(r"Expected time: .*\d", doc)


@pytest.mark.parametrize("size", ["paper", "tiny", "smoke"])
def test_stages_agree_on_what_they_share(size):
    """The pipeline sets these sections once; each file shows them."""
    parts = {name: load(name, size) for name in (*STAGES, "evaluate")}
    seen: dict[str, object] = {}
    for part in parts.values():
        for section in SHARED:
            for field in part.get(section, ()):
                name = f"{section}.{field}"
                # evaluation's charts are of another data set, and all its drawings are replayed
                if name not in ("data.dir", "env.replay_share"):
                    assert seen.setdefault(name, part[section][field]) == part[section][field], name


@pytest.mark.parametrize("size", ["paper", "tiny", "smoke"])
def test_the_rl_stages_differ_in_length_alone(size):
    first, second = load("stage1", size).to_dict(), load("stage2", size).to_dict()
    for config in (first, second):
        del config["stage"], config["train"]["steps"], config["checkpoint"]["every"]
    assert first == second


def test_environment_defaults_stand_once():
    """`config.env` shows the values of `EnvConfig` for the reader; they are the same."""
    default, shown = EnvConfig(), load("stage2", None).env
    for field in shown:
        assert shown[field] == getattr(default, field), field


@pytest.mark.parametrize("name", ALL)
def test_unknown_size_names_the_sizes(name):
    with pytest.raises(ValueError, match=r"no size 'huge'.*paper, tiny, smoke"):
        load(name, "huge")


def test_a_missing_configuration_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match=r"no configuration 'evalute'; did you mean .*evaluate\?"):
        load("evalute", None)
    with pytest.raises(ConfigError, match=r"no configuration 'x'; give a file, or one of evaluate"):
        load("x", None)


@pytest.mark.parametrize(
    "given, hint",
    [
        ("stag2", r"did you mean --config=stage2 or --config=stage1\?"),
        ("configs/stage2.py", r"did you mean --config=stage2 "),
        ("sft", r"give a file, or one of evaluate, pipeline, sft_chart2code"),
        ("tiny", r"one of .* with :tiny or :smoke behind it"),
    ],
)
def test_a_file_that_is_not_there_is_answered_with_the_nearest(given, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"--config={given}: no such file; .*{hint}"):
        config_file(given)


def test_a_name_is_ours_and_a_path_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_file("stage2") == str(CONFIGS / "stage2.py")
    own = tmp_path / "stage2.py"
    own.write_text("")
    assert config_file("stage2.py") == "stage2.py" and config_file(str(own)) == str(own)
    assert config_file("stage2") == str(CONFIGS / "stage2.py")
    with pytest.raises(ConfigError, match="a local path is needed"):
        config_file("gs://bucket/stage2.py")


def test_nearest_names():
    config = load("stage2", "tiny")
    assert "optim.lr" in suggest("optim.lrr", config)
    assert "rl.temperature" in suggest("temprature", config)
    assert suggest("rl.eta", config).endswith("did you mean reward.eta?")
    assert "did you mean reward.eta," in suggest("rl.eata", config)


@pytest.mark.parametrize(
    "stage, field, users",
    [
        ("sft_chart2code", "rl.group", "stage1, stage2"),
        ("evaluate", "optim.lr", "sft_chart2code, sft_self_correction, stage1, stage2"),
        ("stage2", "dialogues.policy", "sft_self_correction"),
        ("stage1", "eval.turns", "evaluate, pipeline"),
    ],
)
def test_a_field_of_another_stage_is_answered_with_the_stages_that_use_it(stage, field, users):
    assert f"{stage} does not use config.{field}; used by: {users}" == suggest(
        field, load(stage, None)
    )


def test_fields_are_set_by_dotted_names():
    config = load("stage2", "smoke")
    set_fields(config, {"optim.lr": 0.5, "seed": 3})
    assert (config.optim.lr, config.seed) == (0.5, 3)
    with pytest.raises(KeyError, match=r"optim\.lrr"):
        set_fields(config, {"optim.lrr": 0.5})


def test_choices():
    check_choice("rl.truncated", "mask", ("train", "mask"))
    with pytest.raises(ConfigError, match=r"rl\.truncated='no': use one of train, mask"):
        check_choice("rl.truncated", "no", ("train", "mask"))


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("model.preset", "70b", "70b"),
        ("model.remat", "half", "half"),
        ("model.attention", "flash", "flash"),
        ("lora.rank", -1, "lora.rank=-1"),
        ("lora.targets", ("head",), "head"),
    ],
)
def test_a_model_that_does_not_exist_is_refused(field, value, message):
    config = load("stage2", "smoke")
    set_fields(config, {field: value})
    with pytest.raises(ConfigError, match=message):
        model_config(config)
