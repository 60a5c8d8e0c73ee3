"""Emptying folders that are hard to empty, and folders in memory."""

import os
import subprocess
import sys

import pytest

from mmrecoder_jax.env.sandbox import scratch


@pytest.fixture
def work(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def emptied(work) -> bool:
    trash = work.parent / "trash"
    scratch.empty(str(work), str(trash))
    return list(work.iterdir()) == [] and not trash.exists()


def test_folders_deeper_than_a_path_may_be_long(work, monkeypatch):
    monkeypatch.chdir(work)
    for _ in range(60):
        os.mkdir("d" * 200)
        os.chdir("d" * 200)
    os.chdir(work)
    assert emptied(work)


def test_folders_that_nobody_may_enter(work):
    (work / "a" / "b").mkdir(parents=True)
    (work / "a" / "b" / "f").touch()
    for name in ("a/b", "a", "."):
        (work / name).chmod(0)
    assert emptied(work)


@pytest.mark.parametrize("name", [b"\xff\xfe", b"\n", b"-rf", b"\x7f1", b"0", b"trash", b"*"])
def test_names_of_any_kind(work, name):
    os.makedirs(os.path.join(os.fsencode(work), name, name, name))
    assert emptied(work)


def test_what_an_earlier_cleaning_left(work):
    for name in ("0/0", "1/2", "0-0"):
        (work.parent / "trash" / name).mkdir(parents=True)
    for name in ("0/0/0", "1/1", "2"):
        (work / name).mkdir(parents=True)
    assert emptied(work)


def test_links_are_removed_and_not_followed(work, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "kept").touch()
    (work / "link").symlink_to(tmp_path / "other")
    assert emptied(work) and (tmp_path / "other" / "kept").exists()


def test_removing_raises_nothing(work):
    (work / "a" / "trash" / "b").mkdir(parents=True)
    scratch.remove(str(work))
    assert not work.exists()
    scratch.remove(str(work))  # it is not there


def test_a_folder_in_memory_is_seen_by_its_process_alone(work):
    program = f"""
import os
from mmrecoder_jax.env.sandbox import scratch
if not scratch.move_into_memory({str(work)!r}):
    raise SystemExit(9)
open({str(work / "f")!r}, "w").close()
assert os.path.ismount({str(work)!r}) and scratch.move_into_memory({str(work)!r})
assert os.statvfs({str(work)!r}).f_blocks * os.statvfs({str(work)!r}).f_frsize == 128 << 20
"""
    done = subprocess.run([sys.executable, "-c", program], check=False)
    if done.returncode == 9:
        pytest.skip("neither root nor user namespaces are allowed here")
    assert done.returncode == 0 and list(work.iterdir()) == []
