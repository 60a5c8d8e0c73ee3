"""The gallery command from end to end, with a package index on this machine."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmrecoder_jax.data.sources import ChartDirectory
from tests.commands import ENVIRONMENT, run_command
from tests.package_index import write_sdist


def build(tmp_path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return run_command(
        "build_gallery", f"--out={tmp_path / 'out'}", f"--cache={tmp_path / 'cache'}", *flags
    )


def test_build(tmp_path, index):
    done = build(tmp_path, f"--index={index[0]}", "--workers=1")
    assert done.returncode == 0, done.stderr
    assert "2 charts in" in done.stdout
    charts = ChartDirectory(tmp_path / "out")
    assert [chart.source for chart in charts] == [
        f"matplotlib-3.8.4/galleries/examples/lines/a.py#{i}" for i in (1, 2)
    ]
    assert charts[0].record.types == {"bar": 1}
    assert charts[1].record.types == {"pie": 1}
    assert charts[0].licence == "Matplotlib licence (PSF-based)"
    assert "A demo" not in charts[0].code
    assert (tmp_path / "out/LICENSE.matplotlib").read_text() == "Matplotlib's licence."
    skipped = {
        row["source"]: row["reason"]
        for row in map(json.loads, (tmp_path / "out/skipped.jsonl").read_text().splitlines())
    }
    assert skipped["matplotlib-3.8.4/galleries/examples/lines/b.py"] == "is an animation"
    assert (
        skipped["matplotlib-3.8.4/galleries/plot_types/c.py#1"]
        == "same image as matplotlib-3.8.4/galleries/examples/lines/a.py#1"
    )
    assert skipped["matplotlib-3.8.4/galleries/tutorials/d.py#1"].startswith(
        "error: NameError: name 'undefined'"
    )
    again = build(tmp_path)
    assert again.returncode != 0
    assert "is there already" in again.stderr


def test_wrong_file_is_refused(tmp_path, index):
    url, folder = index
    write_sdist(folder / "matplotlib" / "matplotlib-3.8.4.tar.gz", "seaborn-0.13.2")
    done = build(tmp_path, f"--index={url}", "--workers=1")
    assert "has SHA-256" in done.stderr
    assert not (tmp_path / "out").exists()


def test_unreachable_index_says_what_to_do(tmp_path):
    done = build(tmp_path, "--index=http://127.0.0.1:9/simple", "--workers=1")
    assert "cannot get matplotlib-3.8.4.tar.gz" in done.stderr
    assert "--sdists=" in done.stderr


@pytest.mark.parametrize(
    "flag, said",
    [
        ("--sdists=other.tar.gz", "no charts are taken of it; use matplotlib-3.8.4.tar.gz"),
        ("--sdists=matplotlib-3.8.4.tar.gz", "no such file"),
        ("--cache=s3://bucket/sdists", "a local path is needed"),
        ("--sample=-1", "sample"),
    ],
)
def test_what_cannot_be_built_is_one_line(tmp_path, flag, said):
    done = build(tmp_path, flag)
    assert done.returncode == 1 and done.stderr.startswith("error: ")
    assert said in done.stderr and done.stderr.count("\n") == 1


def test_a_file_that_is_no_archive_is_named(tmp_path):
    sdist = tmp_path / "matplotlib-3.8.4.tar.gz"
    sdist.write_text("<html>")
    done = build(tmp_path, f"--sdists={sdist}", "--workers=1")
    assert done.returncode == 1 and "is no whole archive" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_killed_build_goes_on(tmp_path, index):
    """Killed after its first chart; that one is kept, and the end is that of a build at once."""
    flags = [f"--index={index[0]}", "--workers=1", f"--cache={tmp_path / 'cache'}"]
    command = [sys.executable, "-m", "mmrecoder_jax.build_gallery", *flags]
    environment = os.environ | ENVIRONMENT
    process = subprocess.Popen(
        [*command, f"--out={tmp_path / 'out'}"], env=environment, stdout=subprocess.DEVNULL
    )
    journal = tmp_path / "out.partial" / "journal.jsonl"
    while process.poll() is None and (not journal.exists() or journal.read_text().count("\n") < 2):
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (tmp_path / "out").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in journal.parent.glob("images/*.png")}
    assert kept
    assert build(tmp_path, *flags[:2]).returncode == 0
    at_once = run_command("build_gallery", *flags, f"--out={tmp_path / 'at_once'}")
    assert at_once.returncode == 0
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out/images").iterdir()}
    assert kept.items() & written.items()
    for name in ("charts.jsonl", "skipped.jsonl", "meta.json"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "at_once" / name).read_text()
