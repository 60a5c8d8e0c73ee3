"""A model behind a server as an author, against a server on the loopback interface."""

import base64
import dataclasses
import json

import numpy as np
import pytest

from mmrecoder_jax.config import ConfigError
from mmrecoder_jax.data.sources import png_bytes
from mmrecoder_jax.drawing.authors import written
from mmrecoder_jax.drawing.open import Who
from mmrecoder_jax.drawing.server import FORM, KEY_VARIABLE, ServerAuthor
from mmrecoder_jax.env.response import response_text
from mmrecoder_jax.env.wire import Status
from mmrecoder_jax.images import decode
from mmrecoder_jax.rl.judge.base import VerdictCache
from mmrecoder_jax.rl.judge.http import Server
from mmrecoder_jax.rl.judge.visual import VisualJudge
from mmrecoder_jax.rl.web import ServerDown
from tests.drawing.scripted import bars, chart
from tests.rl.judge.server import FakeServer, chat, events

FEEDBACK = {"image": "render", "render": "Improve it.", "error": "It failed:\n{error}\nFix it."}
CRASHES = "Here it is.\n```python\nimport matplotlib.pyplot as plt\nraise KeyError('bars')\n```"
DRAWS = response_text("a bar", "import matplotlib.pyplot as plt\nplt.bar([1], [2])\nplt.show()")


def answers(*texts):
    """Turn after turn of every conversation is answered with these: which turn it is says the
    number of messages.
    """

    def behaviour(number):
        turn = len(server.questions[number][1]["messages"]) // 2
        return (200, {}, chat(texts[turn]), 0.0)

    server = FakeServer()
    server.behaviour = behaviour
    return server


def author(server, pool, judge=None, **changes):
    settings = {
        "model": "m",
        "key_variable": KEY_VARIABLE,
        "in_flight": 3,
        "timeout_seconds": 5.0,
        "retries": 1,
        "max_tokens": 99,
        "pause_seconds": 0.01,
    } | changes
    return ServerAuthor(Server(server.url, **settings), pool, FEEDBACK, "training", judge)


def test_a_conversation_is_one_of_messages(pool, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "secret-9")
    with answers(CRASHES, DRAWS, DRAWS) as server, author(server, pool) as asked:
        ((number, sample, found),) = asked.answer([chart()], turns=3)
    assert (number, sample) == (0, 0)
    assert [turn.execution.status for turn in found.turns] == [Status.ERROR, Status.OK, Status.OK]
    assert [turn.format for turn in found.turns] == [0.0, 1.0, 1.0]
    assert not any(turn.scores.known for turn in found.turns)  # nobody knows the chart's code
    assert found.turns[1].execution.image is not None and not found.pieces
    (_, question), headers = server.questions[-1], server.headers[-1]
    assert headers["Authorization"] == "Bearer secret-9"
    assert question["temperature"] == 0 and "seed" not in question
    first, crashed, told, drew, shown = question["messages"]
    assert [one["role"] for one in (first, crashed, told)] == ["user", "assistant", "user"]
    assert crashed["content"] == CRASHES and drew["content"] == DRAWS
    assert [part["type"] for part in first["content"]] == ["image_url", "text"]
    assert first["content"][1]["text"] == f"Redraw this chart.\n{FORM}"
    assert np.array_equal(pixels(first), bars(20))
    (text,) = told["content"]
    assert "KeyError: 'bars'" in text["text"] and text["text"].startswith("It failed:")
    assert np.array_equal(pixels(shown), found.turns[1].execution.image)
    assert shown["content"][1]["text"] == "Improve it."


def test_a_question_of_two_charts_sends_both(pool):
    two = dataclasses.replace(chart(), more_images=(png_bytes(bars(90)),))
    with answers(DRAWS) as server, author(server, pool) as asked:
        list(asked.answer([two], turns=1))
    ((_, question),) = server.questions
    (first,) = question["messages"]
    assert [part["type"] for part in first["content"]] == ["image_url", "image_url", "text"]
    assert np.array_equal(pixels(first), bars(20))
    assert np.array_equal(pixels({"content": first["content"][1:]}), bars(90))


def pixels(message):
    url = message["content"][0]["image_url"]["url"]
    return np.asarray(decode(base64.b64decode(url.removeprefix("data:image/png;base64,"))))


def test_a_conversation_goes_on_from_turns_of_a_person(pool):
    code = "import matplotlib.pyplot as plt\nplt.bar([1], [5])\nplt.show()"
    mine = written(code, pool.submit(code).result(), chart())
    with answers("never", DRAWS) as server, author(server, pool) as asked:
        turn = asked.next(chart(), [mine])
    assert turn.execution.ok
    (_, question) = server.questions[0]
    _, answered, told = question["messages"]
    assert code in answered["content"] and np.array_equal(pixels(told), mine.execution.image)
    with (
        FakeServer(lambda number: (400, {}, b"no", 0.0)) as server,
        author(server, pool) as asked,
        pytest.raises(ServerDown, match="m does not answer: HTTP 400"),
    ):
        asked.next(chart(), [])


def test_samples_of_charts_with_seeds_of_their_own(pool):
    charts = [chart(f"c{number}", 5 + number) for number in range(3)]
    with answers(DRAWS) as server, author(server, pool) as asked:
        found = list(asked.answer(charts, turns=1, samples=2, temperature=0.7, numbers=[2, 0]))
    assert sorted((number, sample) for number, sample, _ in found) == [
        (0, 0),
        (0, 1),
        (2, 0),
        (2, 1),
    ]
    assert {number: one.chart.id for number, _, one in found} == {0: "c0", 2: "c2"}
    asked_for = [question for _, question in server.questions]
    assert len({question["seed"] for question in asked_for}) == 4
    assert {question["temperature"] for question in asked_for} == {0.7}
    assert server.most_at_once <= 3
    with pytest.raises(ConfigError, match="all samples would be equal"):
        next(author(server, pool).answer(charts, turns=1, samples=2))


def test_a_judge_sees_what_was_drawn(pool):
    with (
        VisualJudge(VerdictCache()) as judge,
        answers(CRASHES, DRAWS) as server,
        author(server, pool, judge) as asked,
    ):
        ((_, _, found),) = asked.answer([chart()], turns=2)
    assert found.turns[0].verdict is None
    assert 0 <= found.turns[1].judge_score <= 1


def test_a_chart_that_is_no_image_is_refused_and_asked_nobody(pool):
    broken = dataclasses.replace(chart(), image=b"<html>")
    with answers(DRAWS) as server, author(server, pool) as asked:
        ((_, _, found),) = asked.answer([broken], turns=2)
    assert [turn.execution.status for turn in found.turns] == [Status.REFUSED] * 2
    assert "cannot be read" in found.turns[0].execution.error and not server.questions


def test_an_answer_that_was_cut_is_said_to_be(pool):
    cut = json.dumps(
        {"choices": [{"finish_reason": "length", "message": {"content": DRAWS[:40]}}]}
    ).encode()
    with FakeServer(lambda number: (200, {}, cut, 0.0)) as server, author(server, pool) as asked:
        ((_, _, found),) = asked.answer([chart()], turns=1)
    assert not found.turns[0].finished and found.turns[0].execution.status == Status.NO_CODE


def test_other_charts_go_on_where_one_gets_no_answer(pool):
    def behaviour(number):
        text = server.questions[number][1]["messages"][0]["content"][1]["text"]
        return (400, {}, b"too odd", 0.0) if "odd" in text else (200, {}, chat(DRAWS), 0.0)

    odd = dataclasses.replace(chart("odd"), instruction="Redraw this odd chart.")
    found = []
    with FakeServer() as server, author(server, pool) as asked:
        server.behaviour = behaviour
        with pytest.raises(ServerDown, match=r"1 conversations with m .*chart odd: HTTP 400"):
            for number, _, _ in asked.answer([odd, chart("a"), chart("b")], turns=1):
                found.append(number)
    assert sorted(found) == [1, 2]


def test_a_server_that_refuses_ends_it_at_once(pool):
    with FakeServer(lambda number: (401, {}, b"no key", 0.0)) as server:
        with author(server, pool) as asked, pytest.raises(ServerDown, match=r"HTTP 401.*no key"):
            list(asked.answer([chart(str(i)) for i in range(50)], turns=1))
        assert len(server.questions) <= 6


def test_a_server_that_fails_on_and_on_is_down(pool):
    with FakeServer(lambda number: (503, {}, b"busy", 0.0)) as server:
        with author(server, pool) as asked, pytest.raises(ServerDown, match="does not answer"):
            list(asked.answer([chart(str(i)) for i in range(50)], turns=1))
        assert len(server.questions) < 50


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"server": "http://localhost:1/v1"}, "needs --model=NAME"),
        ({"model": "m"}, "needs --server=URL"),
        ({"server": "http://h:1", "model": "m", "checkpoint": "runs"}, "give one of them"),
        ({"server": "localhost:1", "model": "m"}, "--server='localhost:1'"),
        ({"server": "http://u:p@h:1/v1", "model": "m"}, "name that in --key-variable"),
    ],
)
def test_who_cannot_be_asked_is_refused(fields, said):
    with pytest.raises(ConfigError, match=said) as caught:
        Who(**fields)
    assert "u:p" not in str(caught.value)


def streaming(*answers):
    """Attempt after attempt is answered with these bodies."""
    return FakeServer(lambda number: (200, {}, answers[number], 0.0))


def test_a_turn_is_told_while_it_comes(pool):
    pieces = [DRAWS[i : i + 20] for i in range(0, len(DRAWS), 20)]
    told = []
    with streaming(events(*pieces)) as server, author(server, pool) as asked:
        turn = asked.next(chart(), [], told=told.append)
    assert server.questions[0][1]["stream"] is True
    assert told == [DRAWS[: 20 * (i + 1)] for i in range(len(pieces))]
    assert turn.text == DRAWS and turn.execution.ok and turn.finished


@pytest.mark.parametrize(
    "body",
    [
        chat(DRAWS),  # no stream at all
        b"".join(events(DRAWS, end="", done=True)),  # no reason of its end
        b"".join(events(DRAWS, done=False)),
        b"".join(events(DRAWS)).replace(b"\n", b"\r\n"),
        b": keep-alive\n\nevent: message\n" + b"".join(events(DRAWS)),
        b'data: {"choices": [], "usage": {"total_tokens": 3}}\n\n' + b"".join(events(DRAWS)),
    ],
)
def test_streams_of_other_servers_are_read(pool, body):
    with streaming(body) as server, author(server, pool) as asked:
        turn = asked.next(chart(), [], told=lambda text: None)
    assert turn.text == DRAWS and turn.finished


@pytest.mark.parametrize(
    "broken",
    [
        events("half of", end="", done=False),
        [b"data: {]\n\n"],
        [b'data: {"error": {"message": "overloaded"}}\n\n'],
        [b'data: {"choices": [{"delta": {"content": 5}}]}\n\n'],
        [b"data: [1]\n\n"],
        [b"\n"],
    ],
)
def test_a_stream_that_breaks_is_asked_for_again_and_told_anew(pool, broken):
    told = []
    with streaming(broken, events(CRASHES)) as server, author(server, pool) as asked:
        turn = asked.next(chart(), [], told=told.append)
    assert turn.text == CRASHES and told[-1] == CRASHES
    assert set(told) <= {"half of", CRASHES}


def test_a_stream_that_the_limit_ends_is_cut(pool):
    body = events("```python\nimport", end="length")
    with streaming(body) as server, author(server, pool) as asked:
        turn = asked.next(chart(), [], told=lambda text: None)
    assert not turn.finished and turn.execution.status == Status.NO_CODE


def test_a_stream_that_stays_broken_is_no_answer(pool):
    refuses = [b'data: {"choices": [{"delta": {"refusal": "no"}, "finish_reason": "stop"}]}\n\n']
    for body, said in ((events("x", end="", done=False), "not an answer"), (refuses, "no")):
        with (
            streaming(body, body) as server,
            author(server, pool) as asked,
            pytest.raises(ServerDown, match=said),
        ):
            asked.next(chart(), [], told=lambda text: None)
