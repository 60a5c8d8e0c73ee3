"""ChartX's GPT-score against a fake judge."""

import json

import pytest

from mmrecoder_jax.benchmarks import chartx
from tests.rl.judge.server import FakeServer, chat

ROW = {
    "id": "bar_1",
    "chart_type": "bar",
    "title": "Sales",
    "csv": "year \\t tons\\n2020 \\t 3",
    "gen_code": "plt.bar([2020], [3])",
}


@pytest.mark.parametrize(
    ("answer", "rating"),
    [
        ("4", 4),
        ("Rating: 3 out of 5", 3),
        ("**5**", 5),
        ("0", 0),
        ("9 or 8", None),
        ("good", None),
        ("10", 1),
    ],
)
def test_the_first_digit_from_0_to_5_counts(answer, rating):
    assert chartx.read_rating(answer) == rating


def test_the_table_is_shown_with_real_tabs_and_lines():
    asked = chartx.question(ROW)
    assert "year \t tons\n2020 \t 3" in asked
    assert asked.endswith("Script:\nplt.bar([2020], [3])")


def test_means_per_type_leave_out_what_was_not_rated():
    ratings = [("bar", 4), ("bar", 1), ("pie", None), ("line", 5)]
    lines = chartx.summary(
        [{"chart_type": kind, "rating": rating} for kind, rating in ratings], "m"
    ).splitlines()
    assert lines[0] == "ChartX GPT-score by m, 1 of 4 not rated"
    assert [line.split()[:2] for line in lines[1:]] == [
        ["bar", "2.50"],
        ["line", "5.00"],
        ["all", "3.33"],
    ]


def test_the_command(tmp_path, capsys):
    rows = [ROW, ROW | {"id": "none", "gen_code": None}, ROW | {"id": "pie_2", "chart_type": "pie"}]
    source, out = tmp_path / "rows.jsonl", tmp_path / "ratings.jsonl"
    source.write_text("\n".join(json.dumps(row) for row in rows))
    with FakeServer(lambda number: (200, {}, chat("4"), 0.0)) as server:
        assert (
            chartx.main(
                [
                    "--rows",
                    str(source),
                    "--out",
                    str(out),
                    "--url",
                    server.url,
                    "--model",
                    "m",
                    "--in-flight",
                    "2",
                ]
            )
            == 0
        )
    assert [json.loads(line)["rating"] for line in out.read_text().splitlines()] == [4, 0, 4]
    assert len(server.questions) == 2
    assert "all                       2.67  of 5, 3 charts" in capsys.readouterr().out


def test_bad_rows_and_refusals_are_said(tmp_path):
    source, out = tmp_path / "rows.jsonl", tmp_path / "ratings.jsonl"
    source.write_text(json.dumps(ROW) + "\n\n{}\n")
    with pytest.raises(SystemExit, match=r"^error: .*rows.jsonl line 3 lacks id"):
        chartx.main(
            [
                "--rows",
                str(source),
                "--out",
                str(out),
                "--url",
                "http://127.0.0.1:1/v1",
                "--model",
                "m",
            ]
        )
    source.write_text(json.dumps(ROW))
    with (
        FakeServer(lambda number: (404, {}, b"no such model", 0.0)) as server,
        pytest.raises(SystemExit, match="HTTP 404: no such model"),
    ):
        chartx.main(["--rows", str(source), "--out", str(out), "--url", server.url, "--model", "m"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--url", "localhost:8000"), "--url='localhost:8000': give an address"),
        (("--url", "http://me:secret-7@host/v1"), "--url: a user name"),
        (("--url", "http://host/v1", "--key-variable", "sk-secret-7"), "--key-variable: the name"),
    ],
)
def test_what_no_server_has_is_refused_and_no_secret_shown(tmp_path, flags, message):
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps(ROW))
    paths = ["--rows", str(source), "--out", str(tmp_path / "out.jsonl")]
    with pytest.raises(SystemExit, match=f"^error: {message}") as caught:
        chartx.main([*paths, "--model", "m", *flags])
    assert "secret" not in str(caught.value)
