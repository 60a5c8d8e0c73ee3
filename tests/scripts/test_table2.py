"""The miniature of Table 2: what it runs, in which order, and what its numbers are."""

import contextlib
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.scripts.run import run_script

COLD = "cold start 2"


def dry_run(tmp_path, *flags: str) -> list[dict[str, str]]:
    """The flags of the commands that are left, by their names."""
    done = run_script("table2", f"--workdir={tmp_path}", "--dry_run", *flags)
    assert done.returncode == 0, done.stderr
    commands = [shlex.split(line) for line in done.stdout.splitlines() if line[0] != "#"]
    return [
        dict(word[2:].partition("=")[::2] for word in words if word.startswith("--"))
        for words in commands
    ]


def test_the_arms_take_equal_steps_and_nearly_equal_executions(tmp_path):
    found = dry_run(tmp_path, "--seeds=3", "--steps=40", "--config.optim.lr=1e-4")
    sweeps = [flags for flags in found if "sweep" in flags]
    of = {flags["workdir"].removeprefix(str(tmp_path)): flags for flags in sweeps}
    assert set(of) == {"/shared", "/shared_full/from-3", "/full", "/full_eta"}
    assert all(flags["sweep"] == "config.seed=3" for flags in sweeps)
    steps = {name: int(flags["config.train.steps"]) for name, flags in of.items()}
    assert steps == {"/shared": 40, "/full": 40, "/full_eta": 40, "/shared_full/from-3": 20}
    start = f"{tmp_path}/cold/sft_self_correction"
    assert [flags["config.init_from"] for flags in sweeps] == [
        *(start, f"{tmp_path}/shared/seed-3@20", start, start),
    ]
    assert of["/shared"]["config.checkpoint.keep_every"] == "20"
    executions = {
        name: int(flags["config.train.batch_size"]) * (9 if "stage1" in flags["config"] else 16)
        for name, flags in of.items()
    }
    assert max(executions.values()) < 1.02 * min(executions.values())
    for flags in sweeps:  # a step falls into micro-batches of whole groups
        prompts = int(flags["config.train.batch_size"])
        rows = int(flags["config.train.micro_batch_size"])
        assert prompts * 8 % rows == rows % 8 == 0 and 32 <= rows <= 64
    assert [f.get("config.reward.eta") for f in sweeps] == [None, None, None, "0.1"]
    # flags go where there is such a field: an evaluation has no optimizer
    with_rate = ["config.optim.lr" in flags for flags in found]
    assert with_rate == [True, True, False, *[True, False] * 4]


def test_flags_arrive_in_whatever_order_they_are_given(tmp_path):
    given = ("rl.response_length=90", "reward.alpha=0.6", "feedback.image=both", "data.seed=3")
    for order in (given, given[::-1]):
        found = dry_run(tmp_path, "--seeds=0", "--steps=4", *(f"--config.{f}" for f in order))
        *_, last = [flags for flags in found if "sweep" in flags]
        assert all(last[f"config.{name}"] == value for name, value in (f.split("=") for f in given))


def test_what_the_paper_left_open(tmp_path):
    found = dry_run(tmp_path, "--seeds=0", "--arms=full_three,full_turn,full,full_ahead")
    arms = {f["workdir"].split("/")[-1]: f for f in found if "sweep" in f}
    assert list(arms) == ["full", "full_turn", "full_ahead", "full_three"]
    fields = ("config.rl.credit", "config.rl.ahead", "config.rl.turns")
    set_ = {name: [flags.get(field) for field in fields] for name, flags in arms.items()}
    assert set_ == {
        "full": [None, None, None],
        "full_turn": ["turn", None, None],
        "full_ahead": [None, "1", None],
        "full_three": [None, None, "3"],
    }
    # a policy sees as many turns in its evaluation as in its training, and so does the cold start
    asked = {
        f["workdir"].removeprefix(f"{tmp_path}/"): (
            f["config.eval.turns"],
            f["config.eval.remembered"],
        )
        for f in found
        if f["config"].startswith("evaluate")
    }
    assert asked == {
        "cold-0": ("2", "1"),
        "cold-3-turns-0": ("3", "2"),
        **{f"{name}/evaluation-0": ("2", "1") for name in ("full", "full_turn", "full_ahead")},
        "full_three/evaluation-0": ("3", "2"),
    }


def test_a_seed_is_finished_before_the_next(tmp_path):
    found = dry_run(tmp_path, "--seeds=0,1", "--steps=4")
    seeds = [flags["sweep"][-1] for flags in found if "sweep" in flags]
    assert seeds == ["0"] * 4 + ["1"] * 4


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--seeds=a",), "--seeds=a: give numbers"),
        (("--steps=1",), "--steps=1: use 2 or more"),
        (("--config.rl.nothing=1",), "no stage has this field"),
        (("--charge=3",), "--charge=3: no flag of this script"),
        (("--table",), "no table2.jsonl in it"),
        (("--arms=ful",), "--arms=ful: 'ful' is none of shared, shared_full, full"),
        (("--arms=full,shared_full",), "shared_full goes on from shared: add it"),
    ],
)
def test_wrong_flags_end_in_one_line(tmp_path, flags, said):
    done = run_script("table2", f"--workdir={tmp_path}", *flags)
    assert done.returncode != 0 and said in done.stderr
    assert "Traceback" not in done.stderr


def test_sigterm_ends_the_piece_that_is_under_way(tmp_path):
    script = Path(__file__).parents[2] / "scripts" / "table2.py"
    command = [sys.executable, str(script), f"--workdir={tmp_path}", "--size=smoke"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith("== 1 of ")
        while not (children := running(str(tmp_path / "cold"))):
            assert process.poll() is None
            time.sleep(0.05)
        process.terminate()
        assert process.wait(120) == 75
    assert not set(children) & set(running(str(tmp_path / "cold")))


def test_a_run_that_fails_keeps_the_results_that_there_are(tmp_path):
    scores = {"scores": {"overall": 0.5}, "status": "ok", "judge": None, "response": "r"}
    for decoding in ("greedy", "sampled"):
        path = tmp_path / "cold-0" / "evaluation" / f"test-{decoding}" / "000000.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"chart": 0, "turns": [scores, scores]}) + "\n")
    (tmp_path / "cold-0" / "evaluation.json").write_text("[]")
    done = run_script(
        "table2", f"--workdir={tmp_path}", "--size=smoke", "--config.data.kind=directory"
    )
    assert done.returncode == 1 and "sft_chart2code ended with status 1" in done.stderr
    lines = (tmp_path / "table2.jsonl").read_text().splitlines()
    assert [json.loads(line)["decoding"] for line in lines] == ["greedy", "sampled"]


def running(word: str) -> list[int]:
    """Processes with this word in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if word.encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def row(policy: str, seed: int, low: list, ok: list, repeat: list) -> str:
    return json.dumps(
        {
            **{"policy": policy, "seed": seed, "decoding": "greedy"},
            **{"low": low, "ok": ok, "repeat": repeat},
            "judge": [[0.2, 0.6], [None, 1.0]] if seed == 0 else [[None] * len(low[0])] * len(low),
        }
    )


def test_the_table_counts_corrections_over_first_turns_that_run(tmp_path):
    rows = [
        # two charts: +0.2 where the first turn ran; a crash that is mended does not count
        row(COLD, 0, [[0.5, 0.7], [0.0, 1.0]], [[1, 1], [0, 1]], [0, 0]),
        row(COLD, 1, [[0.5, 0.5], [0.5, 0.4]], [[1, 1], [1, 1]], [1, 0]),
    ]
    (tmp_path / "table2.jsonl").write_text("\n".join(rows) + "\n")
    done = run_script("table2", f"--workdir={tmp_path}", "--table")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "table2.md").read_text().splitlines()
    head, line = ([c.strip() for c in lines[n].split("|")[1:-1]] for n in (2, 4))
    cells = dict(zip(head, line, strict=True))
    assert (cells["policy"], cells["seeds"]) == (COLD, "2")
    assert cells.pop("right repeats") == "-"  # with seed 0 nothing is repeated
    means = {name: float(cell.split(" ")[0]) for name, cell in list(cells.items())[2:]}
    assert means == {
        **{"turn 1": 37.5, "turn 2": 65.0, "turn 2 - turn 1": 27.5},
        # seed 0: +20, 100 % improved; seed 1: (0 - 10) / 2
        **{"improvement": 7.5, "improved": 50.0, "regressed": 25.0},
        **{"mended": 0.0, "repeat": 25.0},
        # seed 0: 0.2 -> 0.6 where the first turn ran; seed 1: none
        **{"likeness 1": 5.0, "likeness 2": 40.0, "likeness gained": 20.0},
    }
    # Student's interval of 20 and -5 over two seeds: 7.5 +- 12.706 * 12.5
    assert "[-151.33, +166.33]" in cells["improvement"].replace("151.32", "151.33")


def test_full_scores_of_what_is_mended_and_repeated(tmp_path):
    charts = [
        # wrong first turns that run: two of four are mended
        *([[0.5, 1.0], 1, 0], [[0.5, 0.9], 1, 0], [[0.5, 1.0 - 1e-9], 1, 0], [[0.9, 0.9], 1, 1]),
        # right already: of all that is repeated, three of four
        *([[1.0, 1.0], 1, 1], [[1.0, 1.0], 1, 1], [[1.0, 0.5], 1, 0], [[1.0 - 1e-9] * 2, 1, 1]),
        *([[0.0, 1.0], 0, 0], [[0.0, 1.0], 0, 0], [[0.0, 0.0], 0, 1]),  # crashes
    ]
    low, runs, repeat = ([chart[n] for chart in charts] for n in range(3))
    ok = [[first, 1] for first in runs]
    (tmp_path / "table2.jsonl").write_text(row(COLD, 1, low, ok, repeat) + "\n")
    done = run_script("table2", f"--workdir={tmp_path}", "--table")
    assert done.returncode == 0, done.stderr
    head, _, line = (
        [c.strip() for c in r.split("|")] for r in done.stdout.split("\n\n")[1].splitlines()
    )
    found = {name: cell.split(" ")[0] for name, cell in zip(head, line, strict=True)}
    assert (found["mended"], found["repeat"], found["right repeats"]) == ("50.00", "50.00", "75.00")


def test_the_picture_has_an_arrow_for_every_turn_after_the_first(tmp_path):
    turns = [[0.4, 0.6, 0.9], [0.4, 0.6, 0.9]]
    rows = [
        row("three turns", 2, turns, [[1, 1, 1]] * 2, [0, 0]),
        row("no change", 1, [[0.5, 0.5]] * 2, [[1, 1]] * 2, [1, 1]),
    ]
    (tmp_path / "table2.jsonl").write_text("\n".join(rows) + "\n")
    assert run_script("table2", f"--workdir={tmp_path}", "--table").returncode == 0
    pixels = np.asarray(Image.open(tmp_path / "turns.png").convert("RGB")).astype(int)[60:]

    blue, orange = (31, 119, 180), (255, 127, 14)

    def tall(color: tuple[int, int, int]) -> np.ndarray:
        """Columns in which a mark is taller than a line: `[start, end)` of each."""
        heights = (abs(pixels - color) < 40).all(axis=2).sum(axis=0)
        edges = np.flatnonzero(np.diff(heights > 3, prepend=False, append=False))
        return edges.reshape(-1, 2)

    dot, second, third = tall(orange)
    assert third[0] - second[0] == pytest.approx(1.5 * (second[0] - dot[0]), rel=0.1)
    for first, end in (second, third):  # the arrow points to the right: it is tallest on the left
        heights = (abs(pixels[:, first:end] - orange) < 40).all(axis=2).sum(axis=0)
        assert heights[:2].max() > heights[-2:].max()
    (unchanged,) = tall(blue)
    heights = (abs(pixels[:, slice(*unchanged)] - blue) < 40).all(axis=2).sum(axis=0)
    assert abs(heights - heights[::-1]).max() <= 2  # a dot, which points nowhere
