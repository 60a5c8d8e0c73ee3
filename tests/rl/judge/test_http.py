"""The judge behind a server, against a server that is slow, wrong, overloaded, silent or gone."""

import base64
import time

import numpy as np
import pytest

from mmrecoder_jax.data.sources import png_bytes
from mmrecoder_jax.rl.judge.base import JudgeDown, VerdictCache
from mmrecoder_jax.rl.judge.http import HttpJudge, Server
from tests.rl.judge.server import GOOD, FakeServer, chat

TARGET = png_bytes(np.zeros((8, 8, 3), np.uint8))
ANSWER = (200, {}, chat(GOOD), 0.0)


def render(value):
    return np.full((8, 8, 3), value, np.uint8)


def judge(server, max_failures=100, **changes):
    settings = {
        "model": "m",
        "key_variable": "MMRECODER_JUDGE_KEY",
        "in_flight": 8,
        "timeout_seconds": 5.0,
        "retries": 3,
        "max_tokens": 512,
        "pause_seconds": 0.01,
    } | changes
    return HttpJudge(Server(server.url, **settings), VerdictCache(), max_failures)


def ask(server, count=1, **changes):
    with judge(server, **changes) as asked:
        found = [
            future.result() for future in [asked.submit(TARGET, render(i)) for i in range(count)]
        ]
        return found, asked.stats()


def test_a_question_is_two_images_and_our_words(monkeypatch):
    monkeypatch.setenv("MMRECODER_JUDGE_KEY", "secret-7")
    with FakeServer() as server:
        (found,), stats = ask(server)
    assert found.score == pytest.approx(0.8)
    assert found.points == {
        "type": 18,
        "layout": 10,
        "text": 16,
        "data": 14,
        "style": 12,
        "clarity": 10,
    }
    (path, question), headers = server.questions[0], server.headers[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret-7"
    assert question["model"] == "m" and question["temperature"] == 0
    urls = [
        part["image_url"]["url"]
        for part in question["messages"][0]["content"]
        if part["type"] == "image_url"
    ]
    assert [base64.b64decode(url.removeprefix("data:image/png;base64,")) for url in urls] == [
        TARGET,
        png_bytes(render(0)),
    ]
    assert stats["scored"] == 1 and stats["latency_max"] > 0


def test_no_key_no_header(monkeypatch):
    monkeypatch.delenv("MMRECODER_JUDGE_KEY", raising=False)
    with FakeServer() as server:
        ask(server)
    assert "Authorization" not in server.headers[0]


def test_many_questions_are_in_flight():
    with FakeServer(lambda number: (200, {}, chat(GOOD), 0.2)) as server:
        start = time.monotonic()
        found, _ = ask(server, count=16)
        wall = time.monotonic() - start
    assert all(v.score for v in found)
    assert server.most_at_once > 4
    assert wall < 16 * 0.2


FAULTS = {
    "500": (500, {}, b"oops", 0.0),
    "overloaded": (429, {"Retry-After": "0.05"}, b"slow down", 0.0),
    "overloaded with a date": (503, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, b"", 0.0),
    "not JSON": (200, {}, b"<html>", 0.0),
    "wrong schema": (200, {}, b'{"choices": []}', 0.0),
    "no text": (200, {}, chat(None), 0.0),
    "hang": (200, {}, None, 0.0),
    "cut short": (200, {"Content-Length": "1000"}, b"{", 0.0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_retried(fault):
    with FakeServer(lambda number: FAULTS[fault] if number == 0 else ANSWER) as server:
        (found,), stats = ask(server, timeout_seconds=0.5)
    assert found.score == pytest.approx(0.8)
    assert stats["retries"] == 1 and len(server.questions) == 2


def test_retry_after_is_obeyed():
    with FakeServer(
        lambda number: (429, {"Retry-After": "0.6"}, b"", 0.0) if number == 0 else ANSWER
    ) as server:
        (found,), _ = ask(server)
    assert found.seconds >= 0.6


@pytest.mark.parametrize("fault", ["500", "not JSON", "hang"])
def test_what_is_never_answered_is_unscorable_not_zero(fault):
    with FakeServer(lambda number: FAULTS[fault]) as server:
        (found,), stats = ask(server, timeout_seconds=0.2, retries=1)
    assert found.score is None and "(2 attempts)" in found.problem
    assert stats["unscorable"] == 1 and len(server.questions) == 2


def test_an_answer_that_cannot_be_read_is_unscorable():
    with FakeServer(lambda number: (200, {}, chat("Lovely charts!"), 0.0)) as server:
        (found,), _ = ask(server)
    assert found.score is None and "unreadable answer" in found.problem


def test_one_bad_picture_fails_alone():
    with FakeServer(
        lambda number: (400, {}, b"image too large", 0.0) if number == 0 else ANSWER
    ) as server:
        found, _ = ask(server, count=3, in_flight=1)
    assert [v.score is None for v in found] == [True, False, False]
    assert "HTTP 400: image too large" in found[0].problem


def test_a_refused_key_ends_the_run_and_is_not_shown(monkeypatch):
    monkeypatch.setenv("MMRECODER_JUDGE_KEY", "secret-7")
    with (
        FakeServer(lambda number: (401, {}, b"bad key secret-7", 0.0)) as server,
        pytest.raises(JudgeDown) as caught,
    ):
        ask(server)
    assert "HTTP 401: bad key ***" in str(caught.value) and "judge.url" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert len(server.questions) == 1


def test_a_server_that_is_gone_ends_the_run():
    with FakeServer() as server:
        url = server.url
    server.url = url
    with pytest.raises(JudgeDown, match="3 pairs in a row"):
        ask(server, count=4, in_flight=1, retries=0, max_failures=3)


def test_an_idle_connection_that_the_server_closed_costs_no_attempt():
    with FakeServer(lambda number: (200, {"Connection": "close"}, chat(GOOD), 0.0)) as server:
        _, stats = ask(server, count=3, in_flight=1)
    assert stats["retries"] == 0 and stats["scored"] == 3


def test_closing_does_not_wait_for_a_silent_server():
    with FakeServer(lambda number: FAULTS["hang"]) as server:
        asked = judge(server, timeout_seconds=60.0)
        future = asked.submit(TARGET, render(0))
        while not server.questions:
            time.sleep(0.01)
        start = time.monotonic()
        asked.close()
        assert time.monotonic() - start < 10
    assert future.result().score is None


def test_an_address_that_is_none():
    server = Server(
        "localhost:8000", "m", "", in_flight=1, timeout_seconds=1, retries=0, max_tokens=8
    )
    with pytest.raises(ValueError, match=r"judge.url='localhost:8000'"):
        HttpJudge(server, VerdictCache(), 1)


def test_pixels_that_are_none_get_an_answer():
    with FakeServer() as server, judge(server) as asked:
        broken = np.zeros((0, 8, 3), np.uint8)
        found = asked.submit(TARGET, broken).result(timeout=30)
    assert found.score is None and found.problem and not server.questions
