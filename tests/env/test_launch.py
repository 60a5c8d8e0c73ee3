"""Launchers that give a trainer less than usual: executors work, or one line says what is missing.

Each runs a program of its own, which takes things away from itself first.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, resource, signal, sys
def limit(name, value): resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
{less}
from mmrecoder_jax.env import EnvConfig, ExecutorPool
from mmrecoder_jax.env.local import ExecutorError
CODE = "import os, matplotlib.pyplot as plt; plt.plot([1]); open('f', 'w').write('x'); os.stat('f')"
try:
    with ExecutorPool(EnvConfig(workers=2, preload=(), wall_seconds=60)) as pool:
        results = pool.run([CODE, CODE + "#", "raise ValueError(__file__)"])
    answer = "\\n".join(result.status + result.error for result in results)
except ExecutorError as error:
    answer = f"{{type(error).__name__}}: {{error}}"
os.umask(0o022)
open({answer!r}, "w").write(answer)
"""
WORKING = """\
ok
ok
errorline 1, in <module>: raise ValueError(__file__)
ValueError: script.py"""
LESS = {
    "ignored_children": "signal.signal(signal.SIGCHLD, signal.SIG_IGN)",
    "blocked_signals": "signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))",
    "closed_input_and_output": "os.closerange(0, 3)",
    "closed_output": "os.closerange(1, 2)",
    "200_files": "limit('NOFILE', 200)",
    "few_soft_limits": (
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.getrlimit(1)[1]))\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (48, resource.getrlimit(7)[1]))"
    ),
    "umask": "os.umask(0o777)",
    "no_such_tmpdir": "os.environ['TMPDIR'] = '/no/such/folder'",
    "tmpdir_is_a_file": "os.environ['TMPDIR'] = '/etc/passwd'",
    "tmpdir_with_spaces": "os.environ['TMPDIR'] = {spaces!r}",
}
TOO_LITTLE = {
    "ulimit -n": "limit('NOFILE', 40)",
    "ulimit -f": "limit('FSIZE', 1 << 20)",
    "ulimit -v": "limit('AS', 1 << 30)",
    "ulimit -d": "limit('DATA', 1 << 30)",
    "ulimit -t": "limit('CPU', 10)",
    "TMPDIR": "import tempfile; tempfile.tempdir = '/no/such/folder'",
}


def answer(folder: Path, less: str) -> str:
    """What the program writes that runs a pool with less."""
    spaces = folder / "a folder's name"
    spaces.mkdir()
    less = less.replace("{spaces!r}", repr(str(spaces)))
    program = PROGRAM.format(less=less, answer=str(folder / "answer"))
    environment = os.environ | {"TMPDIR": str(folder)}
    subprocess.run([sys.executable, "-c", program], env=environment, timeout=120, check=False)
    assert list(spaces.iterdir()) == []
    text = (folder / "answer").read_text()
    assert {path.name for path in folder.iterdir()} == {"answer", spaces.name}
    return text


def test_executors_work_with_the_least(tmp_path):
    assert answer(tmp_path, "\n".join(LESS.values())) == WORKING


@pytest.mark.slow
@pytest.mark.parametrize("name", LESS)
def test_executors_work_with_less(tmp_path, name):
    assert answer(tmp_path, LESS[name]) == WORKING


@pytest.mark.parametrize("remedy", TOO_LITTLE)
def test_what_is_too_little_is_named_with_the_remedy(tmp_path, remedy):
    text = answer(tmp_path, TOO_LITTLE[remedy])
    assert text.startswith("ExecutorError: ") and remedy in text and "\n" not in text
