"""The scoring command and the self-test."""

import json
import os
import re
import subprocess
import sys
import time

import pytest

from mmrecoder_jax.benchmarks import score, selftest
from mmrecoder_jax.data.rows import JsonLines
from mmrecoder_jax.env.execution import EnvConfig
from mmrecoder_jax.env.pool import ExecutorPool
from mmrecoder_jax.env.pools import Pools

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


def rows_of(tmp_path, lines: list[bytes]) -> JsonLines:
    (tmp_path / "pairs.jsonl").write_bytes(b"\n".join(lines))
    return JsonLines(tmp_path / "pairs.jsonl", ("id", "gt_code", "gen_code"), unique=False)


@pytest.mark.parametrize("mode", ["training", "official"])
def test_rows_keep_their_order_and_bad_ones_are_reported(pools, tmp_path, mode):
    good = [json.dumps(row).encode() for row in ROWS]
    bad = {
        1: b"not json",
        7: b'{"id": 1}',
        8: json.dumps({"id": 2, "gt_code": 3, "gen_code": ""}).encode(),
        9: json.dumps({"id": 3, "gt_code": "nonsense", "gen_code": ""}).encode(),
        10: b'{"id": "\xff"}',
        11: json.dumps(ROWS[0] | {"id": True}).encode(),
        12: b"[" * 100_000,
        13: json.dumps(ROWS[0] | {"gen_code": ["x"]}).encode(),
        14: json.dumps(ROWS[0]).encode(),
        15: json.dumps({"id": 4, "gt_code": "```bash\nls\n```", "gen_code": ""}).encode(),
    }
    rows = rows_of(tmp_path, [bad[1], b"", *good, *(bad[line] for line in range(7, 16))])
    reported = {}
    scored = list(score.score_rows(pools, rows, score.Rule(mode=mode), reported.__setitem__))
    assert list(reported) == list(bad)
    assert "lacks gt_code, gen_code" in reported[7] and "gt_code is 3" in reported[8]
    assert "the reference script failed" in reported[9]
    assert '"same" was there before, in line 3' in reported[14]
    assert "holds no code" in reported[15]
    right = [row for row in scored if row is not None]
    assert [(row["id"], row["exec_ok"], row["text"], row["overall"]) for row in right] == EXPECTED
    assert len(scored) == len(rows)


def test_rows_that_are_scored_already_are_not_scored_again(pools, tmp_path):
    rows = rows_of(tmp_path, [json.dumps(row).encode() for row in ROWS])
    rule = score.Rule(mode="training")
    left = list(score.score_rows(pools, rows, rule, pytest.fail, {'"same"', "7"}))
    assert [row["id"] for row in left] == ["relabel", "silent"]


def test_an_answer_with_a_fence_is_scored_by_its_code(pools, tmp_path):
    answer = f"<think>a bar</think>\n```python\n{CHART}```"
    pairs = [{"id": "a", "gt_code": CHART, "gen_code": answer}]
    pairs += [{"id": "b", "gt_code": "\ufeff" + answer, "gen_code": "\ufeff" + CHART}]
    rows = rows_of(tmp_path, [json.dumps(pair).encode() for pair in pairs])
    scored = score.score_rows(pools, rows, score.Rule(mode="training"), pytest.fail)
    assert [row and row["overall"] for row in scored] == [1, 1]


class Asked(ExecutorPool):
    """A pool that notes what it is asked to run, and has it run by another."""

    def __init__(self, pool):  # starts nothing
        self.pool, self.config, self.codes = pool, pool.config, []

    def submit(self, code, *kind):
        self.codes.append(code)
        return self.pool.submit(code, *kind)


@pytest.mark.parametrize(
    "rule",
    [
        score.Rule(mode="training"),
        score.Rule(mode="official", keep="no_filter"),
        score.Rule(metric="plot2code"),
    ],
    ids=str,
)
@pytest.mark.parametrize("crash", [False, True])
def test_references_and_answers_run_apart(pool, tmp_path, rule, crash):
    """An executor that has run a reference may still hold its text."""
    row = {
        "id": "a",
        "gt_code": "# of the reference\n" + CHART,
        "gen_code": "# of the answer\n" + ("boom\n" if crash else "") + CHART,
    }
    pools = Pools(references=Asked(pool), answers=Asked(pool))
    rows = rows_of(tmp_path, [json.dumps(row).encode()])
    (scored,) = score.score_rows(pools, rows, rule, pytest.fail)
    assert scored["exec_ok"] is not crash
    assert pools.references.codes and pools.answers.codes
    assert all("of the reference" in code for code in pools.references.codes)
    assert all("of the answer" in code for code in pools.answers.codes)


@pytest.mark.parametrize("mode", ["training", "official"])
def test_code_that_is_no_text_scores_zero(pools, tmp_path, mode):
    strange = ["\ud800", "a\0b", "\u2028", "x" * 100_000]
    lines = [
        json.dumps({"id": i, "gt_code": CHART, "gen_code": code}).encode()
        for i, code in enumerate(strange)
    ]
    rows = rows_of(tmp_path, lines)
    scored = list(score.score_rows(pools, rows, score.Rule(mode=mode), pytest.fail))
    assert [(row["exec_ok"], row["overall"]) for row in scored] == [(False, 0)] * 4


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
    assert "pairs.jsonl:3: is not JSON" in printed.err
    assert "2 pairs (training" in printed.out
    assert "2/3" in printed.err and "3/3" in printed.err


@pytest.mark.slow
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


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--pairs", "pairs.jsonl"], "give --pairs and --out"),
        (["--pairs", "none.jsonl", "--out", "o"], "--pairs=none.jsonl: no such file"),
        (["--pairs", ".", "--out", "o"], "--pairs=.: a directory"),
        (["--pairs", "gs://b/p.jsonl", "--out", "o"], "a local path is needed"),
        (["--pairs", "pairs.jsonl", "--out", "s3://b/o"], "a local path is needed"),
        (["--pairs", "pairs.jsonl", "--out", "."], "--out=.: no file"),
        (["--pairs", "pairs.jsonl", "--out", "pairs.jsonl"], "is the input itself"),
        (["--pairs", "pairs.jsonl", "--out", "link"], "is the input itself"),
        (["--pairs", "empty.jsonl", "--out", "o"], "there is no row in it"),
        (["--pairs", "list.jsonl", "--out", "o"], "begins a JSON list, but one object per line"),
        (["--pairs", "wide.jsonl", "--out", "o"], "save it as UTF-8"),
        (["--pairs", "pairs.jsonl", "--out", "pairs.jsonl/o"], "is no directory"),
        (["--workers", "0", "--selftest"], "--workers=0: use 1 or more"),
        (["--python", "none", "--selftest"], "--python='none' does not exist"),
        (["--mode", "odd"], "--mode: invalid choice: 'odd'"),
        (["--paris", "pairs.jsonl"], "unrecognized arguments: --paris"),
    ],
)
def test_what_cannot_be_scored_is_one_line(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    row = json.dumps(ROWS[0])
    contents = {"pairs": row, "empty": "\n \n", "list": f"[{row}]"}
    for name, content in contents.items():
        (tmp_path / f"{name}.jsonl").write_text(content)
    (tmp_path / "wide.jsonl").write_text(row, encoding="utf-16")
    (tmp_path / "link").symlink_to("pairs.jsonl")
    with pytest.raises(SystemExit, match=f"^error: .*{re.escape(said)}"):
        score.main(arguments)
    assert (tmp_path / "pairs.jsonl").read_text() == row


def test_a_killed_command_goes_on_and_ends_as_if_it_had_never_stopped(tmp_path):
    """Killed while it scores; what is there stays, and the rest follows in order."""
    slow = "import time\ntime.sleep(0.4)\n" + CHART
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"id": i, "gt_code": CHART, "gen_code": f"{slow}# {i}\n"} for i in range(8)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def start(out) -> subprocess.Popen[bytes]:
        words = ["--pairs", str(pairs), "--out", str(out), "--mode", "training", "--workers", "1"]
        command = [sys.executable, "-m", "mmrecoder_jax.env.score", *words]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def lines(out) -> list[str]:
        return out.read_text().splitlines() if out.exists() else []

    out = tmp_path / "scores.jsonl"
    process = start(out)
    while len(lines(out)) < 3 and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    before = lines(out)
    assert 3 <= len(before) < 8
    out.write_text(out.read_text() + '{"id": 9')  # as a kill within a write leaves it
    printed, said = start(out).communicate()
    assert f"{len(before)} rows of {out} are scored already".encode() in said
    assert lines(out)[: len(before)] == before
    other = tmp_path / "other.jsonl"
    printed_at_once, _ = start(other).communicate()
    assert out.read_text() == other.read_text() and printed == printed_at_once


def test_selftest(pool, capsys):
    assert selftest.selftest(pool)
    table = capsys.readouterr().out
    assert "WRONG" not in table
    assert table.count("itself") == 3
