"""The attack corpus against the default sandbox, and what it does to less than that.

Less is an older Landlock and, as a control, one layer alone. It also runs as an ordinary user.
"""

import json
import os
import pwd
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmrecoder_jax.env import ExecutorPool
from mmrecoder_jax.env.sandbox import bubblewrap, confinement, quota
from tests.env import attacks

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def achieved():
    return attacks.achieved(attacks.QUIET)


@pytest.mark.parametrize("name", attacks.QUIET)
def test_contained(achieved, name):
    assert achieved[name] == []


@pytest.fixture(scope="module")
def heavy():
    with ExecutorPool(attacks.config(workers=2)) as pool:
        results, shared = attacks.limited(pool), attacks.directory_of(pool)
        left, processes = attacks.left_behind(pool), attacks.processes_of(str(shared))
        yield results, pool.stats(), left, processes


@pytest.mark.parametrize("name", attacks.HEAVY)
def test_ended_by_a_limit(heavy, name):
    result = heavy[0][name]
    assert result.status in attacks.HEAVY[name][1].split(), result
    assert result.ok == (result.image is not None)
    assert len(result.error) <= 1200
    assert result.error.isprintable() or "\n" in result.error


def test_executors_outlive_every_attack(heavy):
    _, stats, left, processes = heavy
    assert stats["respawns"] == 0 and left == [] and processes == 2


@pytest.mark.parametrize("name", attacks.HOARDERS)
def test_no_more_than_the_limit_is_ever_on_the_disk(hoard, name):
    pool, folder = hoard
    future, most = pool.submit(attacks.HOARDERS[name]), 0
    while not future.done():
        disk = os.statvfs(folder)
        most = max(most, (disk.f_blocks - disk.f_bfree) * disk.f_frsize)
        time.sleep(0.005)
    assert most <= (quota.DISK_MB << 20) + (1 << 20)
    assert "too many or too large files" in future.result().error


@pytest.fixture(scope="module")
def hoard():
    """A pool, and the folder of its executor as that sees it."""
    with ExecutorPool(attacks.config()) as pool:
        folder = Path(f"/proc/{pool.pids()[0]}/root{attacks.directory_of(pool)}/0-1")
        if not folder.is_mount():
            pytest.skip("the folder is on a disk that others use too")
        yield pool, folder


@pytest.mark.parametrize("abi", [1, 2])
def test_contained_with_an_older_landlock(abi):
    if confinement.landlock_abi() < abi:
        pytest.skip("this kernel's Landlock is older")
    achieved = attacks.achieved(attacks.OLD_LANDLOCK.split(), abi=abi)
    assert {name: won for name, won in achieved.items() if won} == {}


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "abi"), attacks.CONTROLS)
def test_with_a_layer_off_the_attack_succeeds(layers, abi):
    won = attacks.achieved(attacks.CONTROLS[layers, abi].split(), layers, abi)
    assert [name for name, what in won.items() if not what] == []


@pytest.mark.skipif(not bubblewrap.program(), reason="bubblewrap does not work here")
def test_contained_and_hidden_inside_bubblewrap(tmp_path):
    names = [name for name in attacks.OLD_LANDLOCK.split() if name in attacks.QUIET]
    achieved = attacks.achieved(names, bubblewrap=True)
    assert {name: won for name, won in achieved.items() if won} == {}
    (tmp_path / "secret").write_text("x")
    paths = ["/etc/passwd", f"{tmp_path}/secret", "/proc/self"]
    look = f"import os\nraise ValueError([*map(os.path.exists, {paths})], os.getppid())"
    with (
        ExecutorPool(attacks.config(bubblewrap=True)) as inside,
        ExecutorPool(attacks.config()) as outside,
    ):
        assert "([False, False, False], " in inside.submit(look).result().error
        assert "([True, True, True], " in outside.submit(look).result().error


@pytest.fixture
def user():
    """(uid, gid) of a user made for the test."""
    if os.geteuid() != 0:
        pytest.skip("the corpus already ran as an ordinary user")
    if not (shutil.which("useradd") and shutil.which("unshare")):
        pytest.skip("no useradd or unshare here")
    name = f"mmrecoder-{os.getpid()}"
    subprocess.run(
        ["useradd", "--no-create-home", "--home-dir", "/", "--shell", "/bin/false", name],
        check=True,
    )
    known = pwd.getpwnam(name)
    yield known.pw_uid, known.pw_gid
    subprocess.run(["userdel", name], check=True)


# Root's own interpreter may be in a folder that only root may enter: in a mount namespace of its
# own, that folder is replaced by one with nothing in it but the interpreter.
AS_USER = """
import os, subprocess, sys
prefix, closed, uid, gid, program = *sys.argv[1:3], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:]
if closed:
    run = lambda *command: subprocess.run(command, check=True)
    os.makedirs("/tmp/mmrecoder-prefix", exist_ok=True)
    run("mount", "--bind", prefix, "/tmp/mmrecoder-prefix")
    run("mount", "-t", "tmpfs", "-o", "mode=755", "none", closed)
    os.makedirs(prefix)
    run("mount", "--move", "/tmp/mmrecoder-prefix", prefix)
os.setgroups([])
os.setgid(gid)
os.setuid(uid)
os.chdir("/")
environment = {"PYTHONPATH": os.environ["PYTHONPATH"], "HOME": "/", "PATH": os.defpath}
os.execve(sys.executable, [sys.executable, *program], environment)
"""


def barred(path: Path) -> str:
    """The outermost folder on the way to `path` that only its owner may enter, or ""."""
    folders = [*reversed(path.parents), path]
    return next((str(folder) for folder in folders if not folder.stat().st_mode & 0o001), "")


def as_user(user, corpus: str) -> dict:
    """What `attacks.py` prints when that user runs it; skips the test where the user cannot."""
    prefix = Path(sys.base_prefix).resolve()
    closed = barred(prefix)
    for needed in (ROOT, Path(sys.prefix)):
        if needed != prefix and barred(needed):
            pytest.skip(f"an ordinary user cannot enter {barred(needed)}, and needs {needed}")
    arguments = [str(prefix), closed, *map(str, user), str(ROOT / "tests/env/attacks.py"), corpus]
    unshare = ["unshare", "--mount", "--propagation", "private"]
    command = [*unshare, sys.executable, "-c", AS_USER, *arguments]
    environment = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, timeout=600, check=True)
    answer = json.loads(done.stdout)
    assert answer["uid"] == user[0]
    return answer


def test_contained_as_an_ordinary_user(user):
    achieved = as_user(user, "quiet")["achieved"]
    assert len(achieved) == len(attacks.QUIET)
    assert {name: won for name, won in achieved.items() if won} == {}


@pytest.mark.slow
def test_ended_by_a_limit_as_an_ordinary_user(user):
    answer = as_user(user, "heavy")
    assert len(answer["statuses"]) == len(attacks.HEAVY) and answer["respawns"] == 0
    assert {
        name: status
        for name, status in answer["statuses"].items()
        if status not in attacks.HEAVY[name][1].split()
    } == {}
