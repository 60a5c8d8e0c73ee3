"""What each field may be: values that cannot work are refused with field, value and remedy."""

import math

import pytest

from mmrecoder_jax import fields
from mmrecoder_jax.config import SIZES, STAGES, ConfigError, field_names, load, set_fields
from mmrecoder_jax.fields import FIELDS, check_fields, expected

CONFIGURATIONS = (*STAGES, "evaluate", "pipeline")


def check(stage: str, **changes) -> None:
    config = load(stage, "smoke")
    with config.ignore_type():
        set_fields(config, {name.replace("__", "."): value for name, value in changes.items()})
    check_fields(config)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stage", CONFIGURATIONS)
def test_the_configurations_themselves_are_fine(stage, size):
    check_fields(load(stage, size))


def test_every_field_has_a_check():
    sections = {field.rsplit(".", 1)[0] for field in FIELDS}
    for stage in (*STAGES, "evaluate"):
        missing = set(field_names(load(stage, None))) - set(FIELDS) - sections
        assert not missing, f"say in mmrecoder_jax/fields.py what these may be: {missing}"


NUMBERS = [field for field, wanted in FIELDS.items() if isinstance(wanted, fields.Range)]


def stage_with(field: str) -> str:
    return next(stage for stage in CONFIGURATIONS if field in field_names(load(stage, None)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "3", None, (1,)])
@pytest.mark.parametrize("field", NUMBERS)
def test_no_number_is_one_of_these(field, value):
    with pytest.raises(ConfigError, match=f"^{field}=.*: use a (whole )?number"):
        check(stage_with(field), **{field.replace(".", "__"): value})


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("rl.group", True, "a whole number"),
        ("optim.lr", -1e-5, "0 or more"),
        ("optim.b1", 1.0, "less than 1"),
        ("optim.b1", -0.1, "0 or more"),
        ("optim.b2", 1.5, "less than 1"),
        ("optim.weight_decay", -0.1, "0 or more"),
        ("optim.clip", 0.0, "above 0"),
        ("optim.warmup_steps", -1, "0 or more"),
        ("optim.warmup_steps", 2.5, "a whole number"),
        ("optim.max_skipped", 0, "1 or more"),
        ("optim.schedule", "step", "constant, cosine, linear, wsd"),
        ("train.batch_size", 0, "1 or more"),
        ("train.micro_batch_size", -8, "1 or more"),
        ("train.log_every", 0, "1 or more"),
        ("train.steps", -1, "0 or more"),
        ("train.epochs", 0.0, "above 0"),
        ("rl.temperature", 0.0, "above 0"),
        ("rl.group", 1, "2 or more"),
        ("rl.turns", 0, "1 or more"),
        ("rl.std_ddof", 2, "1 or less"),
        ("rl.clip_low", 1.5, "1 or less"),
        ("rl.decode_chunk", 0, "1 or more"),
        ("rl.aggregation", "mean", "token_mean"),
        ("reward.alpha", 1.5, "1 or less"),
        ("reward.judge", "gpt", "http"),
        ("judge.question", "grade", "points, differences"),
        ("judge.url", "localhost:8000", "give an address like"),
        ("judge.url", "", "give an address like"),
        ("engine.kind", "tgi", "sampler, sglang, vllm"),
        ("engine.url", "localhost:30000", "give an address like http://localhost:30000"),
        ("engine.in_flight", 0, "1 or more"),
        ("engine.timeout_seconds", 0.0, "above 0"),
        ("engine.retries", -1, "0 or more"),
        ("model.preset", "9b", "7b"),
        ("model.dtype", "int8", "bfloat16"),
        ("lora.targets", (), "q_proj"),
        ("lora.targets", ("q",), "q_proj"),
        ("data.kind", "folder", "directory"),
        ("data.lengths", (), "sizes that grow"),
        ("data.lengths", (208, 112), "sizes that grow"),
        ("data.lengths", (112, 112), "sizes that grow"),
        ("data.windows", (0, 12), "sizes that grow"),
        ("data.windows", (6.0,), "sizes that grow"),
        ("data.windows", 12, "sizes that grow"),
        ("data.instruction", "  ", "must not be empty"),
        ("data.dir", "s3://bucket/charts", "gs://BUCKET/PATH, or a local path"),
        ("data.dir", "gs://bucket", "name a folder in a bucket"),
        ("init_from", "gs:///a", "name a folder in a bucket"),
        ("init_from", "s3://bucket/run", "gs://BUCKET/PATH, or a local path"),
        ("init_from", "~/run", "HOME"),
        ("mesh.tensor", -2, "-1 or more"),
        ("env.sandbox", "off", "unsafe"),
        ("env.workers", -1, "0 or more"),
        ("env.hosts", "10.0.0.5:7435", "use words, such as \\('10.0.0.5:7435',\\)"),
        ("env.hosts", ("10.0.0.5",), "use NAME:PORT"),
        ("env.hosts", (7435,), "use words"),
        ("env.secret", "none/secret", "cannot be read"),
        ("env.secret", "gs://bucket/secret", "a local path is needed"),
        ("env.wall_seconds", 0.0, "above 0"),
        ("env.python", "none/python", "does not exist"),
        ("env.python", "gs://bucket/python", "a local path is needed"),
        ("env.replay_share", 1.1, "1 or less"),
        ("env.preload", "numpy", "words"),
        ("env.bubblewrap", 1, "true or false"),
        ("checkpoint.every", 0, "1 or more"),
        ("seed", -1, "0 or more"),
    ],
)
def test_values_that_cannot_work(field, value, message):
    with pytest.raises(ConfigError, match=f"^{field}=.*{message}"):
        check("stage2", **{field.replace(".", "__"): value})


@pytest.mark.parametrize(
    "field, value",
    [
        ("judge.key_variable", "sk-secret-7"),
        ("engine.key_variable", "sk-secret-7"),
        ("engine.url", "http://me:sk-secret-7@host"),
        ("judge.url", "http://me:sk-secret-7@host/v1"),
        ("judge.url", "http://host/v1?api-key=sk-secret-7"),
    ],
)
def test_a_value_that_may_be_a_secret_is_refused_and_not_shown(field, value):
    with pytest.raises(ConfigError, match=f"^{field}: ") as caught:
        check("stage2", **{field.replace(".", "__"): value})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("stage", ["stage1", "evaluate", "pipeline"])
def test_a_key_that_cannot_be_sent_is_refused_before_anything_heavy(monkeypatch, stage):
    monkeypatch.setenv("MMRECODER_JUDGE_KEY", "sk-secret-7\n")
    judge = "stages__stage2__reward__judge" if stage == "pipeline" else "reward__judge"
    with pytest.raises(ConfigError, match=r"^judge\.key_variable=.* a line end") as caught:
        check(stage, **{judge: "http"})
    assert "secret" not in str(caught.value)
    check("evaluate", reward__judge="visual")  # which sends no key


@pytest.mark.parametrize("stage", ["stage2", "evaluate", "pipeline"])
def test_hosts_that_cannot_be_used(stage, tmp_path):
    with pytest.raises(ConfigError, match=r"^env\.workers=0 and no env\.hosts"):
        check(stage, env__workers=0)
    with pytest.raises(ConfigError, match=r"^env\.hosts: '10\.0\.0\.5:1' .* needs env\.secret"):
        check(stage, env__hosts=("10.0.0.5:1",))
    check(stage, env__workers=0, env__hosts=("127.0.0.1:1",))
    (tmp_path / "secret").write_text("0123456789abcdef")
    check(stage, env__hosts=("10.0.0.5:1",), env__secret=str(tmp_path / "secret"))


@pytest.mark.parametrize("stage", ["stage1", "pipeline"])
def test_the_key_of_a_server_of_rollouts_too(monkeypatch, stage):
    monkeypatch.setenv("MMRECODER_ENGINE_KEY", "sk-secret-7\n")
    before = "stages__stage2__" if stage == "pipeline" else ""
    field = before.replace("__", r"\.") + r"engine\.key_variable"
    with pytest.raises(ConfigError, match=f"^{field}=.* a line end") as caught:
        check(stage, **{f"{before}engine__kind": "vllm"})
    assert "secret" not in str(caught.value)
    check(stage)  # our sampler sends no key


@pytest.mark.parametrize(
    "field, value",
    [("optim.lr", 0.0), ("optim.lr", 1), ("optim.b1", 0.0), ("rl.clip_low", 1), ("mesh.fsdp", -1)],
)
def test_values_at_the_edge_are_allowed(field, value):
    check("stage2", **{field.replace(".", "__"): value})


def test_stages_of_a_pipeline_are_checked_by_their_full_names():
    with pytest.raises(ConfigError, match=r"^stages\.stage1\.rl\.group=1: use a whole number"):
        check("pipeline", stages__stage1__rl__group=1)


def test_a_configuration_of_someones_own_has_the_stages_fields():
    config = load("stage2", "smoke")
    with config.unlocked():
        del config.rl.group
    with pytest.raises(ConfigError, match=r"lacks rl\.group: take configs/stage2\.py"):
        check_fields(config)
    config = load("stage2", "smoke")
    with config.unlocked():
        config.rl.gruop = 4
    with pytest.raises(ConfigError, match=r"nothing reads rl\.gruop in stage2"):
        check_fields(config)


def test_what_a_field_may_be_in_words():
    assert expected("train.steps") == "a whole number, 0 or more"
    assert expected("stages.stage1.rl.temperature") == "a number, above 0"
    assert expected("log.tensorboard") == "true or false"
    assert expected("init_from") is None and expected("optim.lrr") is None
