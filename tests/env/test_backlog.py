"""Who gets which script, and that no executor waits beside one that could be run."""

import threading
import time
from concurrent.futures import Future

import pytest

from mmrecoder_jax.env.backlog import Backlog, Job
from mmrecoder_jax.env.wire import RecordKind, Request


def job(name: str = "x") -> Job:
    return Job(Request(name, RecordKind.TRAINING), False, name, Future())


def codes(jobs: list[Job]) -> list[str]:
    return [each.request.code for each in jobs]


def test_lost_scripts_come_first_and_some_stay_here():
    backlog = Backlog()
    for name in "abc":
        backlog.put(job(name))
    backlog.put_back(job("lost"), here=False)
    backlog.put_back(job("ours"), here=True)
    assert len(backlog) == 5 and backlog.shortage == 4
    assert backlog.take().request.code == "lost"
    assert backlog.get().request.code == "ours"
    assert [backlog.take().request.code for _ in range(3)] == ["a", "b", "c"]
    assert backlog.take() is None
    backlog.put_back(job("ours"), here=True)
    assert backlog.take() is None and len(backlog) == 1


def test_a_script_that_a_host_is_doubted_for_is_left_to_others():
    backlog = Backlog()
    doubted = job("doubted")
    doubted.doubted = "one"
    backlog.put(doubted)
    backlog.put(job("next"))
    assert backlog.take("one").request.code == "next" and backlog.take("one") is None
    assert backlog.take("two") is doubted


def test_one_connection_comes_for_each_script():
    backlog = Backlog()
    assert not backlog.come(0.0)
    backlog.put(job())
    assert backlog.come(0.0) and not backlog.come(0.01)
    backlog.stay_away()
    assert backlog.come(0.0), "who waits for room leaves the script to others"


def test_every_script_wakes_one_who_waits():
    backlog = Backlog()
    got = []
    done = threading.Semaphore(0)

    def local():
        while (found := backlog.get()) is not None:
            got.append(found.request.code)
            done.release()

    def remote():
        while not over.is_set():
            if backlog.come(30.0):
                found = backlog.take()
                backlog.stay_away()
                if found is not None:
                    got.append(found.request.code)
                    done.release()

    over = threading.Event()
    threads = [threading.Thread(target=work) for work in (local, local, remote, remote, remote)]
    for thread in threads:
        thread.start()
    for burst in range(50):
        for number in range(1 + burst % 7):
            backlog.put(job(f"{burst}-{number}"))
        for _ in range(1 + burst % 7):
            assert done.acquire(timeout=10), "a script waits beside executors that do"
    over.set()
    assert backlog.close() == []
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert len(got) == len(set(got)) == sum(1 + burst % 7 for burst in range(50))


def test_a_closed_backlog_gives_nothing_and_returns_what_is_left():
    backlog = Backlog()
    backlog.put(job("a"))
    backlog.put_back(job("b"), here=True)
    assert codes(backlog.close()) == ["b", "a"]
    backlog.put(job("late"))
    assert backlog.get() is None and backlog.take() is None and not backlog.come(5.0)
    assert codes(backlog.empty()) == ["late"] and len(backlog) == 0


@pytest.mark.parametrize("here", [True, False])
def test_a_waiting_executor_is_woken_by_what_was_lost(here):
    backlog = Backlog()
    found = []
    thread = threading.Thread(target=lambda: found.append(backlog.get()))
    thread.start()
    lost = job()
    backlog.put_back(lost, here)
    thread.join(10)
    assert found == [lost]


def test_what_an_executor_here_was_not_woken_for_wakes_a_connection():
    backlog = Backlog()
    came = []
    threads = [
        threading.Thread(target=backlog.get),
        threading.Thread(target=lambda: came.append(backlog.come(30.0))),
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.1)  # both wait
    backlog.put(job("a"))
    backlog.put(job("b"))
    for thread in threads:
        thread.join(5)
    assert came == [True] and len(backlog) == 1
