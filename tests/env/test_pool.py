"""The pool: statuses, limits, caching, and executors that die, hang or are shut down."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from mmrecoder_jax.env import EnvConfig, ExecutorPool, Status, local, wire
from mmrecoder_jax.env import pool as pools
from mmrecoder_jax.env.local import ExecutorError
from mmrecoder_jax.env.sandbox import bubblewrap
from tests.env import attacks

BAR = """\
import matplotlib.pyplot as plt
fig, ax = plt.subplots(figsize=(2, 1))
ax.bar(['a', 'b'], [1, {}], color='red')
"""
SMALL = EnvConfig(workers=1, preload=("numpy", "matplotlib"), wall_seconds=20)


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_statuses_come_back_in_order(pool):
    codes = [
        BAR.format(2),
        "x = 1",
        "raise ValueError('no')",
        None,
        "import os\nos._exit(0)",
        "import sys\n" + BAR.format(3) + "sys.exit(0)",
    ]
    results = pool.run(codes)
    assert [r.status for r in results] == ["ok", "no_figure", "error", "no_code", "killed", "ok"]
    assert results[0].image.shape == (100, 200, 3) and results[0].image.dtype == np.uint8
    assert not results[0].image.flags.writeable
    assert [r.error == "" for r in results] == [True, False, False, False, False, True]
    assert results[0].record.types == {"bar": 1}


def test_an_endless_script_is_killed_and_the_next_one_runs(pool):
    slow, fast = pool.run(["import time\ntime.sleep(100)", BAR.format(4)])
    assert (
        slow.status == Status.TIMEOUT
        and slow.error == "The script was stopped: it ran longer than 6 seconds."
    )
    assert fast.ok


def test_a_busy_script_is_stopped_by_its_cpu_limit(pool):
    (busy,) = pool.run(
        ["import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"]
    )
    assert busy.status == Status.TIMEOUT


def test_memory_limit(pool):
    (hungry,) = pool.run(["x = bytearray(3 << 30)"])
    assert (
        hungry.status == Status.KILLED
        and hungry.error == "The script was stopped: it needed more than 1024 MB of memory."
    )


def test_disk_limit(pool):
    code = """
import time
for i in range(8):
    open(f'f{i}', 'wb').write(b'x' * (10 << 20))
time.sleep(9)
"""
    (hoarder,) = pool.run([code])
    assert hoarder.status == Status.KILLED and "files" in hoarder.error


def test_no_state_passes_between_scripts(pool):
    plain = pool.run([BAR.format(5)])[0]
    spoil = textwrap.dedent("""
        import matplotlib, matplotlib.pyplot as plt, numpy as np, random, os
        matplotlib.rcParams['axes.facecolor'] = 'black'
        plt.subplots = None
        np.random.seed(3)
        open('left', 'w').write('x')
        matplotlib.axes.Axes.bar = lambda *a, **k: None
    """)
    assert pool.run([spoil])[0].status == Status.NO_FIGURE
    after = pool.run([BAR.format(5) + "import os\nassert os.listdir() == ['script.py']\n"])[0]
    assert after.ok and np.array_equal(plain.image, after.image)


def test_identical_code_is_run_once(pool):
    before = pool.stats()["executions"]
    first, again = pool.run([BAR.format(6)] * 2)
    assert first is again and pool.run([BAR.format(6)])[0] is first
    assert pool.stats()["executions"] == before + 1


def test_cache_is_bounded_by_entries_and_by_bytes():
    codes = [f"x = {i}" for i in range(10)]
    # 600 x 500 pixels of three bytes: a megabyte has room for one
    charts = [BAR.format(i).replace("(2, 1)", "(6, 5)") for i in range(4)]
    with ExecutorPool(EnvConfig(workers=1, preload=(), cache_size=3, cache_mb=1)) as pool:

        def executed(codes):
            before = pool.stats()["executions"]
            pool.run(codes)
            return pool.stats()["executions"] - before

        assert executed(codes) == 10
        assert executed(codes[-3:]) == 0
        assert executed(codes[-4:-3]) == 1
        assert executed(charts) == 4
        assert executed(charts[-1:]) == 0
        assert executed(charts[-2:-1]) == 1


def test_stream_yields_results_as_they_finish(styled_pool):
    order = [
        index
        for index, _ in styled_pool.stream(["import time\ntime.sleep(1.5)", "x = 1", None, "x = 2"])
    ]
    assert sorted(order) == [0, 1, 2, 3] and order[-1] == 0


@pytest.mark.parametrize("outer", [True, False])
def test_a_killed_zygote_is_replaced_and_its_script_run_again(outer):
    if outer and not bubblewrap.program():
        pytest.skip("bubblewrap does not work here")
    with ExecutorPool(dataclasses.replace(SMALL, bubblewrap=outer)) as pool:
        (pid,) = pool.pids()
        future = pool.submit("import time\ntime.sleep(1)\n" + BAR.format(8))
        time.sleep(0.5)
        os.killpg(pid, signal.SIGKILL)
        assert future.result(60).ok
        assert pool.stats()["retries"] == pool.stats()["respawns"] == 1
        assert pool.pids() != [pid]


def test_a_stopped_zygote_is_replaced(monkeypatch):
    monkeypatch.setattr(local, "GRACE_SECONDS", 1.0)
    with ExecutorPool(EnvConfig(workers=1, preload=(), wall_seconds=1)) as pool:
        os.killpg(pool.pids()[0], signal.SIGSTOP)
        result = pool.submit("x = 1").result(60)
        assert result.status == Status.NO_FIGURE, result
        assert pool.stats()["respawns"] == 1


def test_close_ends_processes_and_removes_files(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    pool = ExecutorPool(SMALL)
    (pid,) = pool.pids()
    assert list(tmp_path.iterdir()) != []
    future = pool.submit("while True: pass")
    time.sleep(0.3)
    pool.close()
    assert future.result(1).status == Status.KILLED
    assert not _running(pid) and list(tmp_path.iterdir()) == []
    with pytest.raises(ExecutorError, match="closed"):
        pool.submit("x = 1")


def test_zygotes_end_with_their_trainer(tmp_path):
    program = textwrap.dedent("""
        import os, sys
        from mmrecoder_jax.env import EnvConfig, ExecutorPool
        pool = ExecutorPool(EnvConfig(workers=1, preload=()))
        pool.submit('while True: pass')
        print(pool.pids()[0], *os.listdir(os.environ['TMPDIR']), flush=True)
        os.kill(os.getpid(), 9)
    """)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    pid, directory = done.stdout.split()
    deadline = time.monotonic() + 10
    while _running(int(pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _running(int(pid)) and not (tmp_path / directory).exists()


@pytest.mark.parametrize("seconds", [0.2, 0.8])
def test_zygotes_end_with_a_trainer_that_dies_while_they_start(tmp_path, seconds):
    program = textwrap.dedent("""
        import glob, os, sys, threading, time
        from mmrecoder_jax.env import EnvConfig, ExecutorPool
        def die():
            while not glob.glob(os.environ['TMPDIR'] + '/*/0-1'): time.sleep(0.01)
            time.sleep(float(sys.argv[1]))
            os.kill(os.getpid(), 9)
        threading.Thread(target=die).start()
        ExecutorPool(EnvConfig(workers=2, preload=()))
    """)
    subprocess.run(
        [sys.executable, "-c", program, str(seconds)],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        timeout=60,
        check=False,
    )
    deadline = time.monotonic() + 10
    while (left := _left(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []


def _left(folder: Path) -> list[str]:
    """The files in `folder`, and the processes that have it in their environment."""
    return [*map(str, folder.iterdir()), *["process"] * attacks.processes_of(str(folder))]


def test_executors_that_die_over_and_over_are_no_fault_of_a_script():
    with ExecutorPool(dataclasses.replace(SMALL, preload=(), bubblewrap=False)) as pool:
        over = threading.Event()

        def fire():
            while not over.wait(0.2):
                with contextlib.suppress(OSError, RuntimeError):
                    os.killpg(pool.pids()[0], signal.SIGKILL)

        thread = threading.Thread(target=fire)
        thread.start()
        try:
            future = pool.submit("x = 1")
            time.sleep(3)  # none lives for so long as it takes to start
        finally:
            over.set()
            thread.join()
        assert future.result(60).status == Status.NO_FIGURE


def test_a_script_that_somebody_else_killed_is_run_again():
    with ExecutorPool(dataclasses.replace(SMALL, preload=(), bubblewrap=False)) as pool:
        (pid,) = pool.pids()
        future = pool.submit("import time\ntime.sleep(2)")
        child = None
        while not child:
            child = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        time.sleep(0.5)  # it has read its code
        os.kill(int(child[0]), signal.SIGKILL)
        assert future.result(60).status == Status.NO_FIGURE
        assert pool.stats()["retries"] == 1


def test_an_executor_whose_folder_is_gone_is_replaced():
    with ExecutorPool(dataclasses.replace(SMALL, preload=(), bubblewrap=False)) as pool:
        (pid,) = pool.pids()
        work = Path(f"/proc/{pid}/root{attacks.directory_of(pool)}/0-1/work")
        work.rename(work.parent / "elsewhere")
        assert pool.submit("x = 1").result(60).status == Status.NO_FIGURE
        assert pool.stats()["respawns"] == 1


def test_a_script_is_given_up_where_its_executors_never_live(monkeypatch):
    monkeypatch.setattr(local.Executor, "execute", _never)
    with ExecutorPool(dataclasses.replace(SMALL, preload=(), bubblewrap=False)) as pool:
        monkeypatch.setattr(pools, "MAX_LOST", 2)
        result = pool.submit("x = 1").result(60)
        assert result.status == Status.KILLED and "brought its executor down" in result.error


def _never(*_: object) -> None:
    raise EOFError


def test_executors_that_do_not_start_again_are_an_error(tmp_path, monkeypatch):
    with ExecutorPool(dataclasses.replace(SMALL, preload=(), bubblewrap=False)) as pool:
        monkeypatch.setattr(local, "START_SECONDS", 1.0)
        monkeypatch.setattr(local, "_ZYGOTE", tmp_path / "no such program")
        os.killpg(pool.pids()[0], signal.SIGKILL)
        with pytest.raises(ExecutorError, match="no such program"):
            pool.submit("x = 1").result(60)


def test_a_stopped_executor_costs_its_script_no_time():
    config = dataclasses.replace(SMALL, preload=(), wall_seconds=2, bubblewrap=False)
    with ExecutorPool(config) as pool:
        (pid,) = pool.pids()
        future = pool.submit("import time\ntime.sleep(0.7)\nopen('f', 'w').write('x')\nx = 1")
        time.sleep(0.3)
        os.killpg(pid, signal.SIGSTOP)
        time.sleep(3)  # meanwhile the script waits for its writing to be counted
        os.killpg(pid, signal.SIGCONT)
        assert future.result(60).status == Status.NO_FIGURE
        assert pool.stats()["retries"] == 0


def test_code_over_the_limit_is_refused_and_nothing_breaks(pool):
    codes = ["x = 1 #" + "\ud800" * wire.MAX_CODE_CHARACTERS, "#" * (50 << 20), "y = 1"]
    results = pool.run(codes)
    assert [result.status for result in results] == ["error", "error", "no_figure"]
    assert "524295 characters" in results[0].error and "524288" in results[0].error
    longest = pool.run(["#" + "\U0001f600" * (wire.MAX_CODE_CHARACTERS - 1)])[0]
    assert longest.status == Status.NO_FIGURE
    assert pool.stats()["respawns"] == 0


def test_modules_are_preloaded_where_they_are_installed():
    pytest.importorskip("networkx")
    with ExecutorPool(EnvConfig(workers=1, preload=("networkx", "no_such_module"))) as pool:
        code = "import sys\nassert 'networkx' in sys.modules and 'pandas' not in sys.modules"
        assert pool.run([code])[0].status == Status.NO_FIGURE


def test_a_zygote_that_cannot_start_says_why():
    with pytest.raises(ExecutorError, match="not_a_setting"):
        ExecutorPool(EnvConfig(workers=1, preload=(), rc_params={"not_a_setting": 1}))


def test_environment_of_the_trainer_does_not_reach_a_script(styled_pool):
    (result,) = styled_pool.run(["import os\nraise ValueError(sorted(os.environ))"])
    assert (
        "HF_TOKEN" in os.environ
        and "PYTHONHASHSEED" in result.error
        and "TOKEN" not in result.error
    )


def test_house_style_and_dpi(styled_pool):
    (result,) = styled_pool.run([BAR.format(2)])
    assert result.image.shape == (50, 100, 3) and (result.image[0, 0] == 0).all()


def test_importing_the_environment_starts_no_jax():
    program = "import sys\nfrom mmrecoder_jax.env import ChartEnv\n"
    program += "assert not {'jax', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.slow
def test_under_fire_nothing_is_lost_or_wrong_or_left():
    script = Path(__file__).parents[2] / "scripts" / "fire_env.py"
    command = [sys.executable, str(script), "--count", "100", "--every", "1.5"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "lost 0, wrong 0, left 0 []", done.stdout


@pytest.mark.slow
def test_nothing_leaks_over_two_thousand_executions(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kinds = [
        "x = {}",
        "raise ValueError({})",
        "import os\nos._exit({} % 3)",
        "open('f{}', 'w').write('x' * 1000)",
        BAR,
    ]
    with ExecutorPool(
        EnvConfig(workers=1, preload=("numpy", "matplotlib"), cache_size=10, bubblewrap=False)
    ) as pool:
        pool.run([kind.format(i) for i in range(40) for kind in kinds])
        (pid,) = pool.pids()
        before = _held(pid)
        pool.run([kind.format(i) for i in range(40, 440) for kind in kinds])
        after = _held(pid)
        assert pool.pids() == [pid] and pool.stats()["executions"] == 2200
        assert attacks.left_behind(pool) == []
    assert after["descriptors"] == before["descriptors"] and after["children"] == 0
    assert after["megabytes"] < before["megabytes"] + 10


def _held(pid: int) -> dict[str, float]:
    status = Path(f"/proc/{pid}/status").read_text()
    return {
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "children": len(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()),
        "megabytes": int(status.split("VmRSS:")[1].split()[0]) / 1024,
    }
