"""Visits: turns of the author and of a person, in the sandbox, beside each other."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from mmrecoder_jax.drawing import studio
from mmrecoder_jax.drawing.studio import NotNow, Studio
from mmrecoder_jax.env.wire import Status
from mmrecoder_jax.images import BadImage
from tests.drawing.scripted import chart, turn

DRAWS = "import matplotlib.pyplot as plt\nplt.bar([1], [2])\nplt.show()"


class Scripted:
    """Draws bars of 5, 10, ... pixels; says how many ask it at one time."""

    name = "scripted"

    def __init__(self):
        self.asked, self.most, self._now = [], 0, 0
        self._lock = threading.Lock()

    def answer(self, charts, **options):
        return iter(())

    def next(self, chart, before, *, temperature=0.0, seed=0, told=None):
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
            self.asked.append((chart, [one.text for one in before]))
        for length in range(1, 4):
            if told is not None:
                told("abc"[:length])
            threading.Event().wait(0.02)
        with self._lock:
            self._now -= 1
        return turn(5 * (len(before) + 1)) if len(before) < 3 else turn(error="NameError")


@pytest.fixture
def author():
    return Scripted()


@pytest.fixture
def open_studio(author, pool):
    return Studio(author, pool, "Redraw.")


def test_turns_of_the_author_and_of_a_visitor(open_studio, author):
    begun = open_studio.open(chart().image)
    assert begun.chart.instruction == "Redraw." and begun.steps == ()
    visit = begun
    for _ in range(4):
        visit = open_studio.next(visit)
    assert [step.likeness is None for step in visit.steps] == [False, False, False, True]
    assert visit.steps[3].likeness is None and visit.steps[3].line == "scripted: error"
    # the chart has a bar of 20 pixels, turn 1 one of 5: what lies between is not white
    difference = visit.steps[0].difference
    assert (difference[:20] == 255).all() and (difference[20:35, 20:40] < 255).any()
    mine = open_studio.run(visit, DRAWS)
    assert mine.steps[4].by == "you" and mine.steps[4].code.strip() == DRAWS
    assert mine.steps[4].turn.execution.ok and len(visit.steps) == 4
    open_studio.next(mine)
    _, before = author.asked[-1]
    assert len(before) == 5 and DRAWS in before[4]


def test_a_hostile_script_is_contained(open_studio, tmp_path):
    visit = open_studio.open(chart().image)
    secret = tmp_path / "secret"
    secret.write_text("s")
    for code in (
        f"open({str(secret)!r}, 'w').write('gone')",
        "import socket; socket.create_connection(('127.0.0.1', 1))",
        "import os; os.kill(os.getppid(), 9)",
        "import os; os.fork(); os._exit(0)",
    ):
        step = open_studio.run(visit, code).steps[0]
        assert step.turn.execution.status != Status.OK and step.difference is None
    assert secret.read_text() == "s"
    assert open_studio.run(visit, DRAWS).steps[0].turn.execution.ok


def test_visitors_at_once_wait_for_the_author_and_share_nothing(open_studio, author):
    def visit(height):
        found = open_studio.open(chart(height=height).image)
        for _ in range(2):
            found = open_studio.next(found)
        return found

    with ThreadPoolExecutor(4) as threads:
        visits = list(threads.map(visit, (8, 12, 16, 20)))
    assert author.most == 1
    assert [len(one.steps) for one in visits] == [2, 2, 2, 2]
    assert len({one.chart.image for one in visits}) == 4


def test_what_cannot_be_done_is_said(open_studio, monkeypatch):
    with pytest.raises(BadImage, match="this picture cannot be read"):
        open_studio.open(b"<html>")
    visit = open_studio.open(chart().image)
    with pytest.raises(NotNow, match="no code"):
        open_studio.run(visit, " \n")
    with pytest.raises(NotNow, match="20000 are the most"):
        open_studio.run(visit, "#" * 20_001)
    monkeypatch.setattr(studio, "MOST_TURNS", 1)
    visit = open_studio.next(visit)
    for ask in (open_studio.next, lambda one: open_studio.run(one, DRAWS)):
        with pytest.raises(NotNow, match="1 turns are the most"):
            ask(visit)


def test_a_turn_is_followed_while_it_is_written(open_studio, author):
    *texts, visit = open_studio.follow(open_studio.open(chart().image))
    assert texts == ["a", "ab", "abc"] and len(visit.steps) == 1
    slow = open_studio.follow(visit)
    assert next(slow) == "a"
    threading.Event().wait(0.2)
    (visit,) = slow  # what lies between is missed
    assert len(visit.steps) == 2


def test_who_follows_hears_what_went_wrong(open_studio, author, monkeypatch):
    def fails(*args, **options):
        raise NotNow("no")

    monkeypatch.setattr(author, "next", fails)
    with pytest.raises(NotNow, match="no"):
        list(open_studio.follow(open_studio.open(chart().image)))


def test_a_turn_is_finished_also_where_nobody_follows_it(open_studio, author):
    visit = open_studio.open(chart().image)
    left = open_studio.follow(visit)
    assert next(left) == "a"
    left.close()
    assert len(open_studio.next(visit).steps) == 1 and author.most == 1
