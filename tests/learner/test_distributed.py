"""What hosts exchange: two processes find what one finds, and where one fails all of them end."""

import json
import signal
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


@pytest.mark.parametrize("host", [0, 1])
def test_where_a_host_fails_all_end_with_its_message(host):
    program = [sys.executable, "-m", "tests.learner.fail_main", str(host)]
    found = ends(program, 2, 120)
    assert [status for status, _, _ in found] == [1, 1]
    problems = [problem for _, _, problem in found]
    assert "error: row 7 is bad" in problems[host]
    assert f"error: process {host} of 2: row 7 is bad" in problems[1 - host]
    assert not any("Check failure stack trace" in problem for problem in problems)


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM"])
def test_a_host_that_is_gone_does_not_keep_the_others(how):
    left, gone = ends([sys.executable, "-m", "tests.learner.fail_main", "1", how], 2, 120)
    assert gone[0] == -signal.Signals[how] and left[0] == 1
    assert "error: process 0 of 2 waited for another one that has ended" in left[2]
