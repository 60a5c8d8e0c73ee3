"""Choosing the judge of a configuration: by name, with what it needs, and its settings reach it."""

import dataclasses
import json

import numpy as np
import pytest

from mmrecoder_jax.config import ConfigError, load
from mmrecoder_jax.data import synthetic
from mmrecoder_jax.data.sources import png_bytes
from mmrecoder_jax.models.config import preset
from mmrecoder_jax.models.published import published_config
from mmrecoder_jax.models.sharding import make_mesh
from mmrecoder_jax.models.tokenizer import train_sentencepiece
from mmrecoder_jax.rl.judge.base import JudgeDown
from mmrecoder_jax.rl.judge.differences import DIFFERENCES
from mmrecoder_jax.rl.judge.make import make_judge
from tests.rl.judge.server import GOOD, FakeServer, chat

PIXELS = np.zeros((8, 8, 3), np.uint8)
TARGET = png_bytes(PIXELS)


def make(workdir, back_end, **settings):
    config = load("stage1", "smoke")
    config.reward.judge = back_end
    config.judge.update(settings)
    return make_judge(config, str(workdir), make_mesh())


def test_back_ends_are_chosen_by_name(tmp_path):
    assert make(tmp_path, "none") is None
    for name in ("visual", "http"):
        with make(tmp_path, name) as judge:
            assert judge.name == name


@pytest.mark.parametrize(
    ("back_end", "settings", "message"),
    [
        ("oracle", {}, "reward.judge='oracle': use one of none, http, local, visual"),
        ("local", {"path": ""}, "judge.path='': reward.judge='local' needs a directory"),
        ("local", {"path": "nowhere"}, "judge.path: nowhere: no such directory"),
        ("http", {"url": "elsewhere"}, "judge.url='elsewhere'"),
        ("http", {"question": "grade"}, "judge.question='grade': use one of points, differences"),
    ],
)
def test_what_is_missing_is_said(tmp_path, back_end, settings, message):
    with pytest.raises(ConfigError, match=message):
        make(tmp_path, back_end, **settings)


def test_a_local_judges_tokenizer_must_fit_its_table(tmp_path):
    """Said before its weights are read: here there are none."""
    sizes = dataclasses.replace(preset("tiny"), vocab_size=500)
    (tmp_path / "config.json").write_text(json.dumps(published_config(sizes, "float32")))
    texts = synthetic.tokenizer_texts(200, seed=0)
    train_sentencepiece(texts, 512, synthetic.words()).save(tmp_path)
    with pytest.raises(ConfigError, match=r"^judge.path: .* has 512 ids, .* has 500 rows"):
        make(tmp_path / "work", "local", path=str(tmp_path))


def test_scores_are_kept_in_the_work_directory(tmp_path):
    with make(tmp_path, "visual") as judge:
        judge.submit(TARGET, PIXELS).result()
    assert list((tmp_path / "judge").glob("verdicts-0.jsonl"))


def test_settings_reach_the_server(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    settings = {"model": "m-7", "max_tokens": 33, "key_variable": "MY_KEY"}
    with FakeServer() as server, make(tmp_path, "http", url=server.url, **settings) as judge:
        judge.submit(TARGET, PIXELS).result()
    (_, asked), headers = server.questions[0], server.headers[0]
    assert (asked["model"], asked["max_tokens"]) == ("m-7", 33)
    assert headers["Authorization"] == "Bearer secret"


def test_a_server_may_be_asked_for_differences(tmp_path):
    listed = '{"errors": [{"category": "data_error", "severity": 1}]}'
    with FakeServer(lambda number: (200, {}, chat(listed), 0.0)) as server:
        settings = {"url": server.url, "question": "differences"}
        with make(tmp_path, "http", **settings) as judge:
            assert judge.name == "http differences"
            assert judge.submit(TARGET, PIXELS).result().score == pytest.approx(0.98)
        with make(tmp_path, "http", **settings) as judge:
            assert judge.submit(TARGET, PIXELS).result().points["data"] == 1  # from the cache
    assert len(server.questions) == 1
    words = [p["text"] for p in server.questions[0][1]["messages"][0]["content"] if "text" in p]
    assert words == [DIFFERENCES.before, DIFFERENCES.between, DIFFERENCES.after]


def test_in_flight_limits_the_questions_at_one_time(tmp_path):
    with (
        FakeServer(lambda number: (200, {}, chat(GOOD), 0.1)) as server,
        make(tmp_path, "http", url=server.url, in_flight=2) as judge,
    ):
        for future in [judge.submit(TARGET, np.full_like(PIXELS, i)) for i in range(6)]:
            future.result()
    assert server.most_at_once == 2


def test_retries_timeouts_and_failures_are_those_of_the_configuration(tmp_path):
    settings = {"retries": 0, "timeout_seconds": 0.2, "max_failures": 2, "in_flight": 1}
    with (
        FakeServer(lambda number: (200, {}, None, 0.0)) as server,  # never answers
        make(tmp_path, "http", url=server.url, **settings) as judge,
    ):
        first, second = (judge.submit(TARGET, np.full_like(PIXELS, i)) for i in range(2))
        assert "no answer within 0.2 seconds (1 attempts)" in first.result().problem
        with pytest.raises(JudgeDown, match="2 pairs in a row"):
            second.result()
    assert len(server.questions) == 2
