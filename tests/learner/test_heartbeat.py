"""Who is lost, with a store in this process; real processes are killed in `test_distributed`."""

import json
import re
import threading
import time

import pytest

from mmrecoder_jax.learner.heartbeat import Heartbeat

SECONDS = 1.2  # beats are a sixth of it


class Store:
    """The store of all processes, which can be made to hang or to refuse."""

    def __init__(self):
        self.values, self.hangs, self.refuses = {}, threading.Event(), False
        self.hangs.set()  # cleared: a call waits

    def _call(self):
        self.hangs.wait()
        if self.refuses:
            raise RuntimeError("UNAVAILABLE")

    def key_value_set(self, key, value, allow_overwrite):
        self._call()
        self.values[key] = value

    def key_value_dir_get(self, key):
        self._call()
        return [pair for pair in self.values.items() if pair[0].startswith(key)]

    def leaving(self):
        """What each process says of its end, by number."""
        pairs = sorted(self.values.items())
        return [json.loads(value)["leaving"] for _, value in pairs]


@pytest.fixture
def run():
    """Makes processes of one run; gives what each ended with."""
    made = []

    def start(count, store, seconds=SECONDS):
        ended = [[] for _ in range(count)]
        beats = [Heartbeat(store, i, count, seconds, ended[i].append) for i in range(count)]
        made.extend(beats)
        return beats, ended

    yield start
    for beat in made:
        beat.stop()


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_hosts_have_names_before_anything_is_done_with_them(run):
    """Process 0 is lost soon after the beginning, when beats are seconds apart."""
    store = Store()
    beats, _ = run(2, store, 60.0)
    began = time.monotonic()
    for beat in beats:
        beat.meet()
    assert time.monotonic() - began < beats[0].every / 2
    store.refuses = True
    assert re.match(r"process 0 of 2 \(\S+\) cannot be reached", beats[1].who_is_lost())


def test_one_that_is_never_heard_is_not_waited_for_longer_than_one_that_is_lost():
    ended = []
    beat = Heartbeat(Store(), 0, 2, SECONDS, ended.append)
    began = time.monotonic()
    beat.meet()
    assert SECONDS / 2 < time.monotonic() - began < 5 * SECONDS
    until(lambda: ended)
    assert ended[0].startswith("process 1 of 2 (host unknown) has given no sign of life")


def test_nobody_is_lost_while_all_beat(run):
    _, ended = run(3, Store())
    time.sleep(3 * SECONDS)
    assert ended == [[], [], []]


def test_a_silent_process_is_named_by_all_others(run):
    beats, ended = run(3, Store())
    time.sleep(SECONDS)
    began = time.monotonic()
    beats[2].stop()  # as if killed: no last words
    until(lambda: ended[0] and ended[1])
    assert time.monotonic() - began > SECONDS / 2
    for (words,) in ended[:2]:
        assert re.match(r"process 2 of 3 \(\S+\) has given no sign of life for \d+ s: ", words)
        assert words.endswith("they go on from the last checkpoint")


@pytest.mark.parametrize("how", ["hangs", "refuses"])
def test_without_the_store_process_0_is_lost(run, how):
    store = Store()
    beats, ended = run(3, store)
    time.sleep(SECONDS)
    beats[0].stop()
    if how == "hangs":
        store.hangs.clear()
    else:
        store.refuses = True
    until(lambda: ended[1] and ended[2])
    said = "has given no sign of life" if how == "hangs" else "cannot be reached"
    assert all(re.match(rf"process 0 of 3 \(\S+\) {said}", words) for (words,) in ended[1:])
    assert ended[0] == []
    store.hangs.set()


def test_last_words_are_handed_on_and_so_is_whom_they_blame(run):
    store = Store()
    beats, ended = run(3, store)
    time.sleep(SECONDS)
    beats[1].leave("row 7 is bad")
    until(lambda: ended[0] and ended[2])
    assert re.fullmatch(r"process 1 of 3 \(\S+\) has ended: row 7 is bad", ended[0][0])
    assert ended[0] == ended[2], "and not the one that ended because of it"
    assert store.leaving()[1] == "row 7 is bad"


def test_a_process_that_ends_as_all_do_is_not_lost(run):
    beats, ended = run(2, Store())
    time.sleep(SECONDS)
    beats[1].leave("")
    time.sleep(3 * SECONDS)
    assert ended == [[], []]


def test_who_asks_is_told_sooner_and_ends_by_itself(run):
    store = Store()
    beats, ended = run(2, store)
    assert beats[0].who_is_lost() == "", "nobody is"
    beats[1].stop()
    began = time.monotonic()
    assert beats[0].who_is_lost().startswith("process 1 of 2 (")
    assert time.monotonic() - began < SECONDS and ended == [[], []]


def test_process_0_goes_last(run):
    beats, _ = run(2, Store())
    time.sleep(SECONDS)
    other = threading.Timer(0.3, beats[1].leave, [""])
    other.start()
    began = time.monotonic()
    beats[0].leave("")
    assert time.monotonic() - began > 0.2
    other.join()
