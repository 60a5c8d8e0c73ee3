"""Errors that a user can cause are one line; bugs keep their traceback."""

import errno
import os
import subprocess
import sys

import pytest

from mmrecoder_jax.command import Parser, ending_in_one_line, explain
from mmrecoder_jax.config import ConfigError, check_local_path, check_output, check_output_dir
from mmrecoder_jax.data.rows import RowError
from mmrecoder_jax.env.interpreter import InterpreterError
from mmrecoder_jax.env.sandbox.confinement import SandboxUnavailable
from mmrecoder_jax.images import BadImage
from mmrecoder_jax.models.files import CheckpointError
from mmrecoder_jax.rl.judge.base import JudgeDown
from mmrecoder_jax.rl.web import ServerDown

KNOWN = (
    *(ConfigError, CheckpointError, RowError, BadImage, SandboxUnavailable, JudgeDown),
    *(InterpreterError, ServerDown),
)


@pytest.mark.parametrize("kind", KNOWN)
def test_messages_that_are_written_for_users_stay_as_they_are(kind):
    assert explain(kind("field=3: use 4")) == "field=3: use 4"


@pytest.mark.parametrize(
    "code, said",
    [
        (errno.ENOENT, "a/b: No such file or directory: check the path"),
        (errno.EACCES, "a/b: Permission denied: name a place that this user may use"),
        (errno.EROFS, "a/b: Read-only file system: name a place"),
        (errno.ENOSPC, "a/b: No space left on device: free space"),
        (errno.EISDIR, "a/b: Is a directory: name another path"),
        (errno.EEXIST, "a/b: File exists: name another path"),
        (errno.EIO, "a/b: Input/output error"),
    ],
)
def test_errors_of_the_system_name_the_path_and_a_remedy(code, said):
    assert (explain(OSError(code, os.strerror(code), "a/b")) or "").startswith(said)


@pytest.mark.parametrize(
    "words, named",
    [
        (["--config=x", "--workdir=runs/a"], "--workdir=runs/a: "),
        (["--workdir", "runs/a"], "--workdir=runs/a: "),
        (["-workdir=runs/a"], "--workdir=runs/a: "),
        (["--out=b.jsonl", "--limit=3"], "--out=b.jsonl: "),
        (["--config=x"], ""),
        (["workdir", "out"], ""),
    ],
)
def test_a_full_disk_without_a_file_is_named_by_where_the_command_writes(words, named, monkeypatch):
    """A write that fails does not know the name of its file."""
    monkeypatch.setattr(sys, "argv", ["train", *words])
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert (explain(full) or "").startswith(f"{named}No space left on device: free space")
    busy = OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    assert (explain(busy) or "").startswith("Address already in use")


def test_a_busy_port_and_an_error_in_words():
    busy = OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    assert "choose another port" in (explain(busy) or "")
    assert explain(FileNotFoundError("no weights in x")) == "no weights in x"


@pytest.mark.parametrize("bug", [ValueError("x"), KeyError("x"), AssertionError(), TypeError()])
def test_bugs_are_not_explained(bug):
    assert explain(bug) is None


def test_the_reason_of_an_error_counts_and_lines_become_one():
    error = RuntimeError("a worker failed")
    error.__cause__ = RowError("charts.jsonl line 3\n\n  is not JSON")
    assert explain(error) == "charts.jsonl line 3; is not JSON"


def test_a_device_without_memory_is_named():
    class JaxRuntimeError(RuntimeError):
        pass

    said = explain(JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"))
    assert said is not None and "train.micro_batch_size" in said
    assert explain(JaxRuntimeError("INTERNAL: a bug")) is None


def test_errors_of_a_checkpoint_are_told_by_who_raised_them(tmp_path):
    from etils import epath
    from orbax import checkpoint as ocp

    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "_METADATA").write_text("cut")
    with ocp.StandardCheckpointer() as checkpointer, pytest.raises(Exception) as caught:
        checkpointer.restore(epath.Path(tmp_path) / "1")
    assert (explain(caught.value) or "").startswith("a checkpoint cannot be read or written")


def test_the_process_ends_with_the_line(capsys):
    with pytest.raises(SystemExit, match=r"^error: a=1: use 2$"), ending_in_one_line():
        raise ConfigError("a=1: use 2")
    with pytest.raises(ConfigError), ending_in_one_line(show_traceback=True):
        raise ConfigError("a=1: use 2")
    with pytest.raises(ZeroDivisionError), ending_in_one_line():
        _ = 1 / 0
    with pytest.raises(SystemExit) as ended, ending_in_one_line():
        raise KeyboardInterrupt
    assert ended.value.code == 130 and "error: interrupted" in capsys.readouterr().err


def test_mistyped_words_of_a_parser_are_one_line():
    parser = Parser(prog="score")
    parser.add_argument("--pairs")
    said = r"^error: unrecognized arguments: --pair=x; did you mean --pairs\?; --help lists"
    with pytest.raises(SystemExit, match=said):
        parser.parse_args(["--pair=x"])
    with pytest.raises(SystemExit, match=r"^error: unrecognized arguments: word; --help"):
        parser.parse_args(["word"])
    assert parser.parse_args(["--traceback"]).traceback


@pytest.mark.parametrize(
    "path", ["gs://b/x", "s3://b", "https://h/x", "file:///x", "gs:/b/x", "hf://Qwen/x"]
)
def test_an_address_is_no_path(path):
    with pytest.raises(ConfigError, match=r"^--out='.*': a local path is needed.*mount"):
        check_local_path("--out", path)


@pytest.mark.parametrize("path", ["", "runs/x", "/a:/b", "a b/c:d", "C", "x:y", "Qwen/Qwen2.5-VL"])
def test_odd_names_are_paths(path):
    check_local_path("--out", path)


def test_places_where_nothing_can_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    check_output("--out", str(tmp_path / "a" / "b"))
    check_output("--out", str(tmp_path / "file"))
    check_output_dir("--workdir", str(tmp_path))
    check_output_dir("--workdir", str(tmp_path / "new"))
    with pytest.raises(ConfigError, match="file is no directory"):
        check_output("--out", str(tmp_path / "file" / "a" / "b"))
    with pytest.raises(ConfigError, match="file is no directory"):
        check_output_dir("--workdir", str(tmp_path / "file"))
    monkeypatch.setattr(os, "access", lambda path, rights: False)  # root may write anywhere
    with pytest.raises(ConfigError, match="cannot be written to"):
        check_output("--out", str(tmp_path / "new"))


def test_no_jax_is_started():
    code = "import sys, mmrecoder_jax.command as _; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_home_that_no_shell_replaced_is_no_path():
    with pytest.raises(ConfigError, match=r"^--out='~/runs': no shell has replaced '~'"):
        check_local_path("--out", "~/runs")


UNCATCHABLE = """
import gc
from mmrecoder_jax.command import quiet
quiet()

class Bad:
    def __del__(self):
        raise ValueError("ours")

async def reads():
    try:
        yields = await Never()
    except GeneratorExit:
        raise RuntimeError("of an array that was given up")

class Never:
    def __await__(self):
        yield

begun = reads()
begun.send(None)
del begun
Bad()
gc.collect()
"""


def test_what_a_library_gives_up_is_not_shown_and_errors_of_ours_are():
    said = subprocess.run([sys.executable, "-c", UNCATCHABLE], capture_output=True, text=True)
    assert "ValueError: ours" in said.stderr and "given up" not in said.stderr
