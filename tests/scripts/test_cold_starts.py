"""The experiment about cold starts: what it runs, from what, in which order; what it compares."""

import json
import shlex
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.scripts.run import ROOT, run_script

XLA = "--xla_cpu_max_isa=SSE4_2"


def commands(tmp_path, *flags: str) -> list[tuple[dict[str, str], dict[str, str]]]:
    """(variables, flags) of every command that is left."""
    done = run_script("cold_starts", f"--workdir={tmp_path}", "--dry_run", *flags)
    assert done.returncode == 0, done.stderr
    found = []
    for line in done.stdout.splitlines():
        words = shlex.split(line)
        plain = [word for word in words if not word.startswith("-") and "=" in word]
        pairs = (word[2:].partition("=")[::2] for word in words if word.startswith("--"))
        found.append((dict(word.partition("=")[::2] for word in plain), dict(pairs)))
    return found


def test_seeds_and_roundings_first_then_one_change_at_a_time(tmp_path, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    found = commands(tmp_path, "--seeds=3,4", "--config.optim.lr=1e-3")
    trained = [(env, f) for env, f in found if not f["config"].startswith("evaluate")]
    assert len(found) == 2 * len(trained)  # each is evaluated
    names = [f["workdir"].removeprefix(f"{tmp_path}/") for _, f in trained]
    assert names == [
        f"{rounding}/seed-{seed}/{policy}"
        for seed in (3, 4)
        for rounding in ("host", "sse")
        for policy in ("sft_chart2code", "as_it_is")
    ] + [
        f"host/seed-3/{name}"
        for name in (
            "half",
            "no_policy",
            "fewer_policy",
            "no_right",
            "more_right",
            "render",
            "difference",
        )
    ]
    for (env, flags), name in zip(trained, names, strict=True):
        rounding, seed, policy = name.split("/")
        assert env == ({} if rounding == "host" else {"XLA_FLAGS": XLA})
        assert flags["config.seed"] == seed[-1] and flags["config.optim.lr"] == "1e-3"
        assert flags["config.data.dir"] == f"{tmp_path}/data"
        if policy != "sft_chart2code":
            assert flags["config.init_from"] == f"{tmp_path}/{rounding}/{seed}/sft_chart2code"
            assert flags["config.train.steps"] == ("1200" if policy == "as_it_is" else "600")
    of = {name.split("/")[-1]: flags for (_, flags), name in zip(trained, names, strict=True)}
    assert of["half"]["config.data.dialogues"] == f"{tmp_path}/host/seed-3/as_it_is/dialogues"
    drafts = [
        [of[name][f"config.dialogues.{kind}"] for kind in ("policy", "synthetic")]
        for name in ("no_policy", "fewer_policy")
    ]
    assert drafts == [["0", "7500"], ["2500", "5000"]]  # as many as there are as it is
    assert [of[n]["config.dialogues.right"] for n in ("no_right", "more_right")] == ["0.0", "0.4"]


def test_a_policy_is_asked_with_the_pictures_it_was_taught_with(tmp_path):
    found = commands(tmp_path, "--seeds=0")
    evaluated = {f["workdir"].split("/")[-1]: f for _, f in found if "evaluate" in f["config"]}
    shown = {name: f.get("config.feedback.image") for name, f in evaluated.items()}
    assert {name: image for name, image in shown.items() if image} == {
        "render-evaluation": "render",
        "difference-evaluation": "difference",
    }
    turns = {name: f["config.eval.turns"] for name, f in evaluated.items()}
    assert turns.pop("sft_chart2code-evaluation") == "1" and set(turns.values()) == {"2"}


def test_xla_flags_of_the_caller_stay(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
    found = commands(tmp_path, "--seeds=0")
    of = {flags["workdir"].split("/")[-3]: env for env, flags in found}
    assert of["host"] == {}  # it has them from its parent
    assert of["sse"] == {"XLA_FLAGS": f"--xla_force_host_platform_device_count=1 {XLA}"}


def row(policy: str, seed: int, low: list, decoding: str = "greedy") -> str:
    turns = len(low[0])
    return json.dumps(
        {
            **{"policy": policy, "seed": seed, "decoding": decoding, "low": low},
            "ok": [[score > 0 for score in scores] for scores in low],
            "judge": [[None] * turns] * len(low),
            "repeat": [False] * len(low) if turns > 1 else [],
        }
    )


def test_the_tables_compare_with_the_one_that_nothing_was_changed_in(tmp_path):
    half = "cold start 2 half as long"
    rows = [
        row("cold start 1", 0, [[0.5], [0.7]]),
        row("cold start 2 as it is", 0, [[0.5, 0.9], [0.7, 0.9]]),
        row(half, 0, [[0.5, 0.6], [0.0, 0.8]]),
        row(f"{half}, plain render", 0, [[0.5, 0.5], [0.5, 0.5]]),
        row(f"{half}, plain render", 1, [[0.1, 0.1], [0.1, 0.1]]),  # of no seed of the other
    ]
    (tmp_path / "cold_starts.jsonl").write_text("\n".join(rows) + "\n")
    done = run_script("cold_starts", f"--workdir={tmp_path}", "--table")
    assert done.returncode == 0, done.stderr
    tables = [part.splitlines() for part in done.stdout.split("\n\n")]
    cells = {}
    for head, _, *lines in (table for table in tables if len(table) > 2):
        names = [cell.strip() for cell in head.split("|")[1:-1]]
        for line in lines:
            values = [cell.strip() for cell in line.split("|")[1:-1]]
            cells[names[0], values[0]] = dict(zip(names[1:], values[1:], strict=True))
    assert cells["policy", "cold start 1"]["turn 1"].startswith("60.00 {")
    assert cells["policy", "cold start 1"]["turn 2"] == ""
    assert cells["policy", half]["improvement"].startswith("+10.00 {")  # of the one that runs
    against = cells[f"against {half}", f"{half}, plain render"]
    assert against["seeds"] == "1"
    assert against["turn 1"].startswith("+25.00 {") and against["turn 2"].startswith("-20.00 {")
    assert against["improvement"].startswith("-10.00 {")
    longer = cells[f"against {half}", "cold start 2 as it is"]
    assert longer["turn 2"].startswith("+20.00 {+10.00, +30.00}")


def test_the_picture_has_arrows_of_every_seed_whole(tmp_path):
    rows = [
        row("cold start 1", 0, [[0.5], [0.7]]),
        row("cold start 2 as it is", 0, [[0.6, 0.9], [0.6, 0.7]]),  # from 60 to 80
        row("cold start 2 as it is", 1, [[0.6, 0.3], [0.6, 0.5]]),  # to 40, left of all dots
        row("cold start 2 as it is", 1, [[0.6, 0.3], [0.6, 0.5]], "sampled"),
    ]
    (tmp_path / "cold_starts.jsonl").write_text("\n".join(rows) + "\n")
    assert run_script("cold_starts", f"--workdir={tmp_path}", "--table").returncode == 0
    pixels = np.asarray(Image.open(tmp_path / "cold_starts.png").convert("RGB")).astype(int)
    greedy, sampled = np.split(pixels[60:], [530], axis=1)  # below the legend

    def columns(panel: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
        return np.flatnonzero((abs(panel - color) < 40).all(axis=2).any(axis=0))

    blue, orange = (31, 119, 180), (255, 127, 14)
    first, second = columns(greedy, blue), columns(greedy, orange)
    assert second.min() < first.min() < second.max() < first.max()
    for found in (first, second):  # up for seed 0, as far down for seed 1
        assert np.ptp(found) > 80
    assert not columns(sampled, blue).size and columns(sampled, orange).size


def test_columns_of_first_turns_that_run_say_nothing_where_none_runs(tmp_path):
    rows = [
        row("cold start 2 half as long", 0, [[0.0, 0.5], [0.0, 0.5]]),
        row("cold start 2 as it is", 0, [[0.5, 0.75], [0.0, 0.5]]),  # one of two runs
    ]
    (tmp_path / "cold_starts.jsonl").write_text("\n".join(rows) + "\n")
    done = run_script("cold_starts", f"--workdir={tmp_path}", "--table")
    assert done.returncode == 0 and "nan" not in done.stdout, done.stdout
    head, _, half, whole = done.stdout.split("\n\n")[1].splitlines()
    column = head.split("|").index(" improvement ")
    assert half.split("|")[column] == " - "
    assert whole.split("|")[column] == " +25.00 {+25.00, +25.00} "


def test_a_piece_that_knows_no_sigterm_ends_with_the_time(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from experiment import Piece, run\n"
        "pieces = [Piece('an evaluation', ('sleep', '60'), False)]\n"
        "print('whole:', run(pieces, 0.01, lambda: None))\n"
    )
    command = [sys.executable, "-c", code, str(ROOT / "scripts")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "the time is over; 1 pieces are left\nwhole: False" in done.stdout


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--seeds=one",), "--seeds=one: give numbers"),
        (("--charts=0",), "--charts=0: use 2 or more"),
        (("--config.rl.credit=turn",), "no stage has this field"),
        (("--table",), "no cold_starts.jsonl in it"),
    ],
)
def test_wrong_flags_end_in_one_line(tmp_path, flags, said):
    done = run_script("cold_starts", f"--workdir={tmp_path}", *flags)
    assert done.returncode != 0 and said in done.stderr
    assert "Traceback" not in done.stderr
