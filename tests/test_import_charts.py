"""Importing a published data set, from end to end on a folder of two charts."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from mmrecoder_jax.data.sources import ChartDirectory
from tests.commands import ENVIRONMENT, run_command

CODE = "import matplotlib.pyplot as plt\nplt.bar([1, 2], [3, 4])\nplt.title('Rain')\nplt.show()"


def test_what_draws_is_imported_and_the_rest_is_listed(tmp_path):
    rows = [
        {"file_name": "a.png", "code": CODE, "instruction": "a bar chart"},
        {"file_name": "b.png", "code": "1 / 0", "instruction": "nothing"},
        {"file_name": "c.png", "code": CODE, "instruction": "its image is missing"},
    ]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("a.png", "b.png"):
        Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / name)
    out = tmp_path / "out"
    done = run_command(
        "import_charts", "--kind=plot2code", f"--path={tmp_path}", f"--out={out}", "--workers=1"
    )
    assert done.returncode == 0, done.stderr
    assert f"1 charts in {out}, 1 bad rows" in done.stdout
    assert [chart.record.texts for chart in ChartDirectory(out)] == [("Rain",)]
    reasons = [json.loads(line)["reason"] for line in (out / "skipped.jsonl").open()]
    assert any(reason.startswith("error: ZeroDivisionError") for reason in reasons)
    assert any("c.png is not there" in reason for reason in reasons)


def test_a_folder_without_charts_is_named(tmp_path):
    done = run_command(
        "import_charts", "--kind=chartmimic", f"--path={tmp_path}", f"--out={tmp_path / 'out'}"
    )
    assert done.returncode == 1
    assert "pass a folder of ChartMimic v2" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("out", ["direct_600", "link"])
def test_the_input_is_never_the_output(tmp_path, out):
    folder = tmp_path / "direct_600"
    folder.mkdir()
    (folder / "bar_1.py").write_text(CODE)
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(folder / "bar_1.png")
    (tmp_path / "link").symlink_to(folder)
    done = run_command(
        "import_charts", "--kind=chartmimic", f"--path={folder}", f"--out={tmp_path / out}"
    )
    assert done.returncode == 1 and done.stderr.endswith(
        "is the input itself: name a directory that is not there\n"
    )
    assert sorted(path.name for path in folder.iterdir()) == ["bar_1.png", "bar_1.py"]


@pytest.mark.parametrize(
    "flag, said",
    [
        ("--path=gs://bucket/direct_600", "a local path is needed"),
        ("--out=gs://bucket/charts", "a local path is needed"),
        ("--path=nowhere", "nowhere holds no .py files"),
        ("--kind=chartmimik", "chartmimic"),
        ("--workers=0", "workers"),
        ("--wrokers=1", "workers"),
        ("words", "unexpected argument 'words'"),
    ],
)
def test_what_cannot_be_imported_is_one_line(tmp_path, flag, said):
    flags = {"--kind": "chartmimic", "--path": str(tmp_path), "--out": str(tmp_path / "out")}
    flags[flag.partition("=")[0]] = flag.partition("=")[2]
    words = [f"{name}={value}" if value else name for name, value in flags.items()]
    done = run_command("import_charts", *words)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert said in done.stderr


def test_a_killed_import_ends_as_if_it_had_never_stopped(tmp_path):
    slow = "import time\ntime.sleep(0.3)\n"
    rows = [
        {"file_name": f"{i}.png", "code": f"{slow}{CODE}\n# {i}" if i % 3 else "1 / 0"}
        for i in range(9)
    ]
    source = tmp_path / "source"
    source.mkdir()
    (source / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(source / row["file_name"])

    def flags(out):
        return ["--kind=plot2code", f"--path={source}", f"--out={tmp_path / out}", "--workers=1"]

    command = [sys.executable, "-m", "mmrecoder_jax.import_charts", *flags("killed")]
    environment = os.environ | ENVIRONMENT
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    journal = tmp_path / "killed.partial" / "journal.jsonl"
    while process.poll() is None and (not journal.exists() or journal.read_text().count("\n") < 4):
        time.sleep(0.02)
    process.kill()
    process.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in journal.parent.glob("images/*.png")}
    assert len(kept) >= 3 and not (tmp_path / "killed").exists()
    for out in ("killed", "at_once"):
        done = run_command("import_charts", *flags(out))
        assert done.returncode == 0, done.stderr
    written = {
        path.name: path.stat().st_mtime_ns for path in (tmp_path / "killed/images").iterdir()
    }
    assert kept.items() <= written.items()  # what was there was not made again
    for path in sorted((tmp_path / "at_once").rglob("*")):
        other = tmp_path / "killed" / path.relative_to(tmp_path / "at_once")
        assert path.is_dir() or other.read_bytes() == path.read_bytes(), path
    assert len(list((tmp_path / "killed").rglob("*"))) == len(
        list((tmp_path / "at_once").rglob("*"))
    )
