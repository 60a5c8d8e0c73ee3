"""The command that serves the page of a run that goes."""

import re
import signal
import subprocess
import sys
import urllib.request

import pytest

from tests.reporting.fake_run import fake_run

COMMAND = [sys.executable, "-m", "mmrecoder_jax.watch"]


def test_it_says_where_answers_and_ends_with_ctrl_c(tmp_path):
    run = fake_run(tmp_path / "run", steps=1)
    process = subprocess.Popen(
        [*COMMAND, f"--workdir={run}", "--port=0"], stdout=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        url = re.fullmatch(rf"watching {re.escape(str(run))} at (\S+) \(Ctrl-C ends it\)\n", line)[
            1
        ]
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=60) as answer:
            assert b"In short" in answer.read()
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        process.stdout.close()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--workdir=nowhere"], "error: --workdir='nowhere': no such directory"),
        (["--workdir=.", "--port=99999"], "error: --port=99999: use 1 to 65535"),
        ([], "error: the following arguments are required: --workdir"),
    ],
)
def test_what_cannot_be_is_one_line(arguments, said):
    done = subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1 and said in done.stderr and len(done.stderr.splitlines()) == 1
