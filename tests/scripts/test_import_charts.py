"""Importing a published data set, from end to end on a folder of two charts."""

import json

import numpy as np
from PIL import Image

from mmrecoder_jax.data.sources import ChartDirectory
from tests.scripts.run import run_script

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
    done = run_script(
        "import_charts", "--kind=plot2code", f"--path={tmp_path}", f"--out={out}", "--workers=1"
    )
    assert done.returncode == 0, done.stderr
    assert f"1 charts in {out}, 1 bad rows" in done.stdout
    assert [chart.record.texts for chart in ChartDirectory(out)] == [("Rain",)]
    reasons = [json.loads(line)["reason"] for line in (out / "skipped.jsonl").open()]
    assert any(reason.startswith("error: ZeroDivisionError") for reason in reasons)
    assert any("c.png is not there" in reason for reason in reasons)


def test_a_folder_without_charts_is_named(tmp_path):
    done = run_script(
        "import_charts", "--kind=chartmimic", f"--path={tmp_path}", f"--out={tmp_path / 'out'}"
    )
    assert done.returncode == 1
    assert "pass a folder of ChartMimic v2" in done.stderr and "Traceback" not in done.stderr
