"""The scoring command and the self-test."""

import json
import os
import subprocess
import sys

import pytest

from mmrecoder_jax.benchmarks import score, selftest
from mmrecoder_jax.env.execution import EnvConfig
from mmrecoder_jax.env.pool import ExecutorPool

CHART = """\
import matplotlib.pyplot as plt
fig, ax = plt.subplots()
ax.bar([1, 2], [1, 2], color='red')
ax.set_title('T')
"""
ROWS = [
    {"id": "same", "gt_code": CHART, "gen_code": CHART},
    {"id": "relabel", "gt_code": CHART, "gen_code": CHART.replace("'T'", "'U'")},
    {"id": 7, "gt_code": CHART, "gen_code": "import matplotlib.pyplot as plt\nboom"},
    {"id": "silent", "gt_code": CHART, "gen_code": None},
]
EXPECTED = [
    ("same", True, 1, 1),
    ("relabel", True, 0, 0.75),
    (7, False, 0, 0),
    ("silent", False, 0, 0),
]


@pytest.fixture(scope="module")
def pool():
    with ExecutorPool(
        EnvConfig(workers=2, preload=("numpy", "matplotlib"), wall_seconds=120)
    ) as pool:
        yield pool


@pytest.mark.parametrize("mode", ["training", "official"])
def test_rows_keep_their_order_and_bad_ones_are_reported(pool, mode):
    good = [json.dumps(row).encode() for row in ROWS]
    bad = [
        b"not json",
        b'{"id": 1}',
        json.dumps({"id": 2, "gt_code": 3, "gen_code": ""}).encode(),
        json.dumps(ROWS[0] | {"gt_code": "nonsense"}).encode(),
        b'{"id": "\xff"}',
        json.dumps(ROWS[0] | {"id": True}).encode(),
        b"[" * 100_000,
    ]
    lines = [bad[0], b"\n", *good, *bad[1:]]
    reported = {}
    rows = list(score.score_lines(pool, lines, score.Rule(mode=mode), reported.__setitem__))
    assert list(reported) == [1, 7, 8, 9, 10, 11, 12]
    assert "the reference script failed" in reported[9]
    scored = [row for row in rows if row is not None]
    assert [(row["id"], row["exec_ok"], row["text"], row["overall"]) for row in scored] == EXPECTED
    assert len(rows) == len(lines) - 1


@pytest.mark.parametrize("mode", ["training", "official"])
def test_code_that_is_no_text_scores_zero(pool, mode):
    strange = ["\ud800", "a\0b", "\u2028", "x" * 100_000]
    lines = [
        json.dumps({"id": i, "gt_code": CHART, "gen_code": code}).encode()
        for i, code in enumerate(strange)
    ]
    rows = list(
        score.score_lines(
            pool, lines, score.Rule(mode=mode), lambda number, problem: pytest.fail(problem)
        )
    )
    assert [(row["exec_ok"], row["overall"]) for row in rows] == [(False, 0)] * 4


def test_a_summary_names_what_it_means():
    row = {
        "id": "a",
        "exec_ok": True,
        "text": 1.0,
        "layout": 1.0,
        "type": 0.5,
        "color": 0.5,
        "overall": 0.75,
    }
    line = score.summary(
        [row, {**dict.fromkeys(row, 0.0), "exec_ok": False}], score.Rule(keep="no_filter")
    )
    assert "2 pairs (official, no_filter)" in line
    assert "overall 37.50" in line
    assert "executed 50.0 %" in line


def test_the_command(tmp_path, capsys):
    pairs, out = tmp_path / "pairs.jsonl", tmp_path / "scores.jsonl"
    separator = {"id": "odd", "gt_code": CHART, "gen_code": CHART.replace("'T'", "'\u2028T'")}
    pairs.write_text(
        "\n".join([json.dumps(ROWS[0]), "", "{", json.dumps(separator, ensure_ascii=False), ""]),
        encoding="utf-8",
    )
    assert (
        score.main(
            ["--pairs", str(pairs), "--out", str(out), "--mode", "training", "--workers", "1"]
        )
        == 0
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [list(row) for row in rows] == [
        ["id", "exec_ok", "text", "layout", "type", "color", "overall"]
    ] * 2
    assert [row["overall"] for row in rows] == [1.0, 0.75]
    printed = capsys.readouterr()
    assert "pairs.jsonl:3: not JSON" in printed.err
    assert "2 pairs (training" in printed.out
    assert "2/3" in printed.err and "3/3" in printed.err


def test_scores_depend_on_neither_hash_seed_nor_path(tmp_path):
    """Both modes, from interpreters with other hash seeds, working and temporary directories."""
    charts = list(selftest.charts().values())[:2]
    pairs = [
        {"id": f"{i}-{j}", "gt_code": a, "gen_code": b}
        for i, a in enumerate(charts)
        for j, b in enumerate(charts)
    ]
    for mode in ("training", "official"):
        results = []
        for seed in ("1", "2"):
            place = tmp_path / f"{mode} {seed}" / ("deep" * int(seed))
            place.mkdir(parents=True)
            (place / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
            command = [
                sys.executable,
                "-m",
                "mmrecoder_jax.env.score",
                "--pairs",
                "pairs.jsonl",
                "--out",
                "out.jsonl",
                "--mode",
                mode,
            ]
            own = {"PYTHONHASHSEED": seed, "TMPDIR": str(place), "PYTHONPATH": os.getcwd()}
            subprocess.run(
                command, cwd=place, env=os.environ | own, check=True, capture_output=True
            )
            results.append((place / "out.jsonl").read_text())
        assert results[0] == results[1] and results[0].count("\n") == len(pairs)


def test_the_command_needs_files():
    with pytest.raises(SystemExit):
        score.main(["--pairs", "only.jsonl"])


def test_selftest(pool, capsys):
    assert selftest.selftest(pool)
    table = capsys.readouterr().out
    assert "WRONG" not in table
    assert table.count("itself") == 3
