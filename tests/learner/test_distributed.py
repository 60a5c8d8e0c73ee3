"""What hosts exchange: two processes find what one finds, and where one fails all of them end."""

import json
import signal
import socket
import sys

import pytest

from tests.learner.processes import ends, run


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What `exchange_main` found on one host, and on each of two; and where it wrote."""
    found = {}
    for hosts in (1, 2):
        out = tmp_path_factory.mktemp(f"exchange{hosts}")
        run([sys.executable, "-m", "tests.learner.exchange_main", str(out)], hosts)
        found[hosts] = [json.loads((out / f"{host}.json").read_text()) for host in range(hosts)]
        assert [part["hosts"] for part in found[hosts]] == [hosts] * hosts
        found[hosts, "files"] = out
    return found


def test_an_evaluation_is_shared_out_and_is_of_all_hosts(results):
    (one,) = results[1]
    for part in results[2]:
        assert part["rows"] == one["rows"]
        assert part["sizes"] == [2, 2], "each host asks half of a batch"
    assert one["sizes"] == [4, 4]
    assert [(row["charts"], row["refused"]) for row in one["rows"]] == [(7, 1)] * 2


def test_metrics_are_of_all_hosts(results):
    (one,) = results[1]
    assert all(part["metrics"] == one["metrics"] for part in results[2])
    assert one["metrics"]["silent_groups"] == 0.25  # one of four, which is host 1's alone
    assert one["metrics"]["advantage_max"] == 3.5
    assert one["metrics"]["env/executions"] == 8 and one["metrics"]["env_rate/tamper"] == 0.5


@pytest.mark.parametrize("name", ["evaluation/000000.jsonl", "trajectories/000007.jsonl"])
def test_trajectories_of_all_hosts_are_in_one_file_in_order(results, name):
    one, two = ((results[hosts, "files"] / name).read_text() for hosts in (1, 2))
    assert one == two
    numbers = [int(json.loads(line)["chart"]) for line in one.splitlines()]
    assert numbers == list(range(len(numbers))) != []


def test_shapes_and_denominators_are_those_of_all_hosts(results):
    (one,) = results[1]
    for part in results[2]:
        assert part["shapes"] == one["shapes"]
        assert part["weight"] == pytest.approx(1 / (3 + 17))
    assert one["shapes"]["tokens"] == [1, 1, 64] and one["shapes"]["rows"] == [1, 2, 32]
    assert one["shapes"]["patches"] == [1, 2, 4, 4, 3]


def test_what_is_gathered_is_exact(results):
    for part in results[2]:
        assert part["sum"] == 2.0**54 + 2  # in float32 the 2 would be lost
        assert part["texts"] == ["", "ä" * 5]
        assert part["ragged"] == [11, 0, 1]  # numbers 4 (of host 1), 5 (of host 0), 5 (of host 1)
        assert part["left out"] == [0, 0] and part["main"] is True


SLOW = pytest.mark.slow
FAIL = (sys.executable, "-m", "tests.learner.fail_main")


@pytest.mark.parametrize("host, hosts", [(0, 2), (1, 2), pytest.param(2, 4, marks=SLOW)])
def test_where_a_host_fails_all_end_with_its_message(host, hosts):
    found = ends([*FAIL, str(host)], hosts, 240)
    assert [status for status, _, _ in found] == [1] * hosts
    problems = [problem for _, _, problem in found]
    assert "error: row 7 is bad" in problems.pop(host)
    assert all(f"error: process {host} of {hosts}: row 7 is bad" in text for text in problems)
    assert not any("Check failure stack trace" in problem for problem in problems)


LOST = [
    pytest.param(how, host, hosts, where, marks=[] if (how, host) == ("SIGKILL", 1) else SLOW)
    for hosts in (2, 4)
    for how, host, where in [
        ("SIGKILL", hosts - 1, ""),  # the transport tells the others
        ("SIGKILL", hosts - 1, "alone"),
        ("SIGKILL", 0, ""),  # the one that JAX's coordinator dies with
        ("SIGKILL", 0, "alone"),
        ("SIGTERM", hosts - 1, ""),
        ("SIGSTOP", hosts - 1, ""),
        ("SIGSTOP", 0, "alone"),
    ]
]


@pytest.mark.parametrize("how, host, hosts, where", LOST)
def test_a_host_that_is_lost_ends_the_others_with_its_name(how, host, hosts, where):
    stopped = host if how == "SIGSTOP" else -1
    found = ends([*FAIL, str(host), how, "12", where], hosts, 240, stopped=stopped)
    if how != "SIGSTOP":
        assert found[host][0] == -signal.Signals[how]
    name = f"error: process {host} of {hosts} ({socket.gethostname()}) "
    for status, _, problem in found[:host] + found[host + 1 :]:
        lines = [line for line in problem.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and lines[0].startswith(name), problem
        assert lines[0].endswith("they go on from the last checkpoint") and status == 1
        if host:  # else JAX itself ends them from C++
            assert problem.strip().splitlines() == lines


@pytest.mark.parametrize(
    "host, hosts",
    [(1, 2), *(pytest.param(host, hosts, marks=SLOW) for host, hosts in [(0, 2), (0, 4), (2, 4)])],
)
def test_where_one_host_hears_sigterm_all_end_alike(host, hosts):
    found = ends([*FAIL, str(host), "SIGTERM", "60", "stage"], hosts, 240)
    said = "preempted: the same command goes on behind this stage\n"
    assert [(status, problem) for status, _, problem in found] == [(75, said)] * hosts


@pytest.mark.slow
@pytest.mark.parametrize("host, hosts", [(0, 2), (1, 2), (0, 4), (2, 4)])
def test_a_host_that_never_starts_is_named(host, hosts):
    program = [sys.executable, "-m", "tests.learner.join_main", "25"]
    for status, out, problem in ends(program, hosts, 240, missing=host):
        assert (status, out) == (1, "")
        assert problem.startswith(f"error: waited 25 s for process {host} of {hosts}, which ")
        assert len(problem.splitlines()) == 1
