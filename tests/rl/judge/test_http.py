"""The judge behind a server, against a server that is slow, wrong, overloaded, silent or gone."""

import base64
import json
import socket
import threading
import time
import traceback
from types import SimpleNamespace

import numpy as np
import pytest

from mmrecoder_jax.config import ConfigError
from mmrecoder_jax.data.sources import png_bytes
from mmrecoder_jax.rl import web
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


def test_a_time_out_is_said_alike_whichever_clock_is_first(monkeypatch):
    """The connection's own clock and the watchdog's run beside each other."""
    monkeypatch.setattr(web.threading, "Timer", lambda *args: SimpleNamespace(**NEVER))
    with FakeServer(lambda number: FAULTS["hang"]) as server:
        (found,), _ = ask(server, timeout_seconds=0.2, retries=0)
    assert "no answer within 0.2 seconds (1 attempts)" in found.problem


NEVER = {"start": lambda: None, "cancel": lambda: None, "daemon": True}


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


KEY = "sk-Q7w9e2R4t6y8U1i3"


@pytest.mark.parametrize(
    "said",
    [
        f"bad key {KEY}",
        f"{KEY}" * 30,  # the end of what is shown is in a key
        "x" * 195 + KEY,
        f"bad key {KEY[:9]}\n{KEY[9:]}",
        f"\x1b[31mbad\x00 key {KEY.upper()}",
        f'{{"error": "Authorization: Bearer {KEY} is unknown"}}',
    ],
)
@pytest.mark.parametrize("status", [200, 400, 401, 500])
def test_no_message_shows_the_key_that_a_server_quotes(monkeypatch, status, said):
    monkeypatch.setenv("MMRECODER_JUDGE_KEY", KEY)
    bodies = [said.encode(), chat(said), chat({"said": said})]
    for body in bodies:
        with FakeServer(lambda number, body=body: (status, {}, body, 0.0)) as server:
            try:
                (found,), _ = ask(server, retries=0)
                problem = found.problem
            except JudgeDown as error:
                problem = str(error)
        assert problem and problem.isprintable()
        shown = problem.casefold()
        assert not any(KEY[i : i + 6].casefold() in shown for i in range(len(KEY) - 5))


def test_no_message_shows_the_key_in_a_line_that_is_no_http(monkeypatch):
    monkeypatch.setenv("MMRECODER_JUDGE_KEY", KEY)
    listener = socket.create_server(("127.0.0.1", 0))

    def answer():
        connection, _ = listener.accept()
        connection.recv(1 << 16)
        connection.sendall(f"proxy: {KEY} is unknown\r\n\r\n".encode())
        connection.close()

    thread = threading.Thread(target=answer)
    thread.start()
    server = SimpleNamespace(url=f"http://127.0.0.1:{listener.getsockname()[1]}/v1")
    (found,), _ = ask(server, retries=0)
    thread.join()
    listener.close()
    assert "proxy" in found.problem and KEY[:6] not in found.problem


@pytest.mark.parametrize(
    ("key", "what"),
    [
        (f"{KEY}\n", "character 20 is a line end"),
        (f"{KEY}\r\n", "a line end"),
        (f"{KEY[:5]}\n{KEY[5:]}", "character 6 is a line end"),
        (f" {KEY}", "character 1 is a space"),
        (f"{KEY} ", "a space"),
        (f"{KEY}\x7f", "no ASCII sign"),
        (f"{KEY}\xe9", "no ASCII sign"),
        (f"{KEY}\u20ac", "no ASCII sign"),
        (f"{KEY}\udcff", "no ASCII sign"),  # a byte that is no UTF-8
        (" ", "a space"),
    ],
)
def test_a_key_that_no_header_can_hold_is_refused_at_the_start(monkeypatch, key, what):
    monkeypatch.setenv("MMRECODER_JUDGE_KEY", key)
    with pytest.raises(
        ConfigError, match=f"^judge.key_variable='MMRECODER_JUDGE_KEY'.*{what}"
    ) as e:
        judge(SimpleNamespace(url="http://localhost:1/v1"))
    text = "".join(traceback.format_exception(e.value))
    assert KEY[:5] not in text and KEY[-5:] not in text


@pytest.mark.parametrize("name", [KEY, "$MMRECODER_JUDGE_KEY", "a b", "1KEY", "K\u00c9Y", "K=V"])
def test_a_key_in_place_of_its_variable_is_not_shown(name):
    with pytest.raises(ConfigError, match=r"^judge\.key_variable: the name of an") as caught:
        judge(SimpleNamespace(url="http://localhost:1/v1"), key_variable=name)
    assert name not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        *("http://me:pass-7@host/v1", "me:pass-7@host:80/v1", "http://pass-7@host/v1"),
        *("http://host/v1?key=pass-7", "http://host/v1#pass-7"),
    ],
)
def test_an_address_with_a_secret_is_refused_and_not_shown(url):
    with pytest.raises(ConfigError, match=r"^judge\.url: ") as caught:
        judge(SimpleNamespace(url=url))
    assert "pass-7" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        *("localhost:8000", "ftp://host/v1", "http://", "http:///v1", "http://host:port/v1"),
        *("http://host:99999/v1", "http://host:0/v1", "http://[::1/v1", "http://ho st/v1"),
        *("http://host/v1\n", "http://h\u00f6st/v1", "http://host/\u00e4"),
    ],
)
def test_an_address_that_is_none(url):
    with pytest.raises(ConfigError, match=r"^judge.url='.*give an address like"):
        judge(SimpleNamespace(url=url))


@pytest.mark.parametrize("url", ["http://[::1]/v1", "https://h.example:8443/a/v1/", "http://h"])
def test_addresses_that_servers_have(url):
    judge(SimpleNamespace(url=url)).close()


PARTS = [
    [{"type": "text", "text": GOOD}],
    [{"type": "text", "text": GOOD[:20]}, {"type": "text", "text": GOOD[20:]}],
    [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": GOOD}],
    [{"type": "reasoning", "text": GOOD.replace("18", "3")}, {"type": "output_text", "text": GOOD}],
    [GOOD],
]


@pytest.mark.parametrize("content", PARTS)
def test_content_may_be_a_list_of_parts(content):
    with FakeServer(lambda number: (200, {}, chat(content), 0.0)) as server:
        (found,), _ = ask(server)
    assert found.score == pytest.approx(0.8)


def message(finish_reason="stop", **fields):
    choice = {"message": {"role": "assistant", **fields}, "finish_reason": finish_reason}
    return json.dumps({"choices": [choice]}).encode()


@pytest.mark.parametrize(
    ("body", "questions", "problem"),
    [
        (message(content=None, refusal="I will not."), 1, "the judge refuses: I will not."),
        (message("length", content=GOOD), 1, "it was cut at judge.max_tokens=512"),
        (message("length", content=None, reasoning_content="hm"), 1, "it was cut at"),
        (message(content=None), 2, "an answer without text"),
        (message("tool_calls", tool_calls=[{"function": {"name": "f"}}]), 2, "without text"),
        (message(content=[{"type": "image_url", "image_url": {}}]), 2, "without text"),
        (message(content=[3]), 2, "not an answer of"),
        (message(content=7), 2, "not an answer of"),
        (message(content=[{"type": "text", "text": None}]), 2, "not an answer of"),
        (b"[" * 100_000, 2, "not an answer of"),
        (b'{"choices": [null]}', 2, "not an answer of"),
        (b'"\xff"', 2, "not an answer of"),
    ],
)
def test_what_is_no_whole_answer_has_no_score(body, questions, problem):
    with FakeServer(lambda number: (200, {}, body, 0.0)) as server:
        (found,), _ = ask(server, retries=1)
    assert found.score is None and problem in found.problem
    assert len(server.questions) == questions


@pytest.mark.parametrize("after", ["nan", "-5", "soon", "Wed, 21 Oct 99999 07:28:00 GMT", "1e-9"])
def test_a_strange_retry_after_is_no_reason_to_fail(after):
    with FakeServer(
        lambda number: (429, {"Retry-After": after}, b"", 0.0) if number == 0 else ANSWER
    ) as server:
        (found,), _ = ask(server)
    assert found.score == pytest.approx(0.8)


def test_pixels_that_are_none_get_an_answer():
    with FakeServer() as server, judge(server) as asked:
        broken = np.zeros((0, 8, 3), np.uint8)
        found = asked.submit(TARGET, broken).result(timeout=30)
    assert found.score is None and found.problem and not server.questions
