"""The scoring command and the self-test."""

import json

import pytest

from mmrecoder_jax.env import score, selftest
from mmrecoder_jax.env.execution import EnvConfig
from mmrecoder_jax.env.pool import ExecutorPool

CHART = "import matplotlib.pyplot as plt\nfig, ax = plt.subplots()\nax.bar([1, 2], [1, 2], color='red')\nax.set_title('T')\n"
ROWS = [
    {"id": "same", "gt_code": CHART, "gen_code": CHART},
    {"id": "relabel", "gt_code": CHART, "gen_code": CHART.replace("'T'", "'U'")},
    {"id": 7, "gt_code": CHART, "gen_code": "import matplotlib.pyplot as plt\nboom"},
    {"id": "silent", "gt_code": CHART, "gen_code": None},
]
EXPECTED = [("same", True, 1, 1), ("relabel", True, 0, 0.75), (7, False, 0, 0), ("silent", False, 0, 0)]


@pytest.fixture(scope="module")
def pool():
    with ExecutorPool(EnvConfig(workers=2, preload=("numpy", "matplotlib"), wall_seconds=120)) as pool:
        yield pool


@pytest.mark.parametrize("mode", ["training", "official"])
def test_rows_keep_their_order_and_bad_ones_are_reported(pool, mode):
    bad = ["not json", '{"id": 1}', json.dumps({"id": 2, "gt_code": 3, "gen_code": ""}), json.dumps(ROWS[0] | {"gt_code": "nonsense"})]
    lines = [bad[0], *(json.dumps(row) for row in ROWS), *bad[1:]]
    reported = []
    rows = list(score.score_lines(pool, iter(lines), mode, "code_pass", lambda number, problem: reported.append(number)))
    assert reported == [1, 6, 7, 8]
    scored = [row for row in rows if row is not None]
    assert [(row["id"], row["exec_ok"], row["text"], row["overall"]) for row in scored] == EXPECTED
    assert len(rows) == len(lines)


def test_a_summary_names_what_it_means():
    row = {"id": "a", "exec_ok": True, "text": 1.0, "layout": 1.0, "type": 0.5, "color": 0.5, "overall": 0.75}
    line = score.summary([row, {**dict.fromkeys(row, 0.0), "exec_ok": False}], "official", "no_filter")
    assert "2 pairs (official, no_filter)" in line
    assert "overall 37.50" in line
    assert "executed 50.0 %" in line


def test_the_command(tmp_path, capsys):
    pairs, out = tmp_path / "pairs.jsonl", tmp_path / "scores.jsonl"
    pairs.write_text("\n".join([json.dumps(ROWS[0]), "{", ""]))
    assert score.main(["--pairs", str(pairs), "--out", str(out), "--mode", "training", "--workers", "1"]) == 0
    assert [json.loads(line)["overall"] for line in out.read_text().splitlines()] == [1.0]
    printed = capsys.readouterr()
    assert "pairs.jsonl:2: not JSON" in printed.err
    assert "1 pairs (training" in printed.out


def test_the_command_needs_files():
    with pytest.raises(SystemExit):
        score.main(["--pairs", "only.jsonl"])


def test_selftest(pool, capsys):
    assert selftest.selftest(pool)
    table = capsys.readouterr().out
    assert "WRONG" not in table
    assert table.count("itself") == 3
