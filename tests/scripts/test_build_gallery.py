"""The gallery script from end to end, with a package index on this machine."""

import json
import subprocess
from pathlib import Path

from mmrecoder_jax.data.sources import ChartDirectory
from tests.package_index import write_sdist
from tests.scripts.run import run_script


def build(tmp_path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return run_script(
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
