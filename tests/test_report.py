"""The command that makes a report anew."""

import subprocess
import sys

import pytest

from tests.reporting.fake_run import fake_run


def report(*arguments):
    command = [sys.executable, "-m", "mmrecoder_jax.report", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_page_and_a_page_of_one_file(tmp_path):
    run = fake_run(tmp_path / "run", steps=1)
    done = report(f"--workdir={run}", "--trajectories=20")
    assert (done.returncode, done.stdout) == (0, f"report: {run / 'report.html'}\n"), done.stderr
    assert len(list((run / "report").rglob("list.js"))) == 2  # 12 + 8
    done = report(f"--workdir={run}", f"--one_file={tmp_path / 'mail.html'}")
    assert done.stdout == f"report: {tmp_path / 'mail.html'}\n", done.stderr
    assert (tmp_path / "mail.html").stat().st_size > 50_000


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--workdir=nowhere"], "error: --workdir='nowhere': no run has written there"),
        (["--workdir=.", "--trajectories=-1"], "error: --trajectories=-1: use 0 or more"),
        (["--workdir=s3://a"], "gs://BUCKET/PATH, or a local path"),
        ([], "error: the following arguments are required: --workdir"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, arguments, said):
    done = report(*arguments)
    assert done.returncode == 1 and said in done.stderr and len(done.stderr.splitlines()) == 1
