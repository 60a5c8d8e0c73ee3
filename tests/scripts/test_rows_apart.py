"""The experiment about rows that share tokens, stand apart, or are padded."""

import json
import runpy

import jax
import numpy as np
import pytest

from mmrecoder_jax.data import batching
from mmrecoder_jax.data.batching import DistinctTokens
from mmrecoder_jax.models.qwen2_5_vl import init_params
from tests.rl.test_packed import CONFIG, LENGTH, agree, found_by, packed, rows_of
from tests.scripts.run import ROOT, run_script

STEPS = [("together", 0.5, 4.0), ("apart", 0.5, 8.0), ("padded", 0.7, 12.0)]


@pytest.fixture
def worker():
    return runpy.run_path(str(ROOT / "scripts" / "rows_worker.py"))


def test_rows_apart_share_no_slot_and_padded_ones_take_a_bucket(worker):
    rows = rows_of(2)
    taken = {}
    for name, slots in (
        ("together", DistinctTokens()),
        ("apart", worker["Apart"]()),
        ("padded", worker["padded"]((LENGTH // 2, LENGTH))()),
    ):
        seen = []
        for row in rows:
            cost = slots.cost(row)
            before = slots.count
            places, new = slots.add(row)
            assert slots.count - before == cost
            assert len(places) == len(new) == row.length
            seen.append(places)
        taken[name] = slots.count
        if name != "together":
            assert new.all() and len(np.unique(np.concatenate(seen))) == sum(map(len, seen))
    lengths = [row.length for row in rows]
    assert taken["apart"] == sum(lengths) > taken["together"]
    assert taken["padded"] == sum(LENGTH // 2 if n <= LENGTH // 2 else LENGTH for n in lengths)


@pytest.mark.parametrize("kind", ["apart", "padded"])
def test_they_give_the_same_gradient(worker, kind, monkeypatch):
    rows = rows_of(2)
    params = init_params(CONFIG, jax.random.key(0))
    together = packed(rows)
    slots = worker["Apart"] if kind == "apart" else worker["padded"]((LENGTH,))
    monkeypatch.setattr(batching, "DistinctTokens", slots)
    batch = packed(rows)
    taken = (batch["home"] >= 0).sum()
    assert taken == sum(row.length for row in rows) > (together["home"] >= 0).sum()
    agree(found_by(CONFIG, params, batch), found_by(CONFIG, params, together))


def test_runs_differ_by_the_rows_alone(tmp_path):
    flags = ("--config.seed=3", "--config.optim.lr=1e-5")
    done = run_script(
        "rows_apart", f"--workdir={tmp_path}/out", f"--cold={tmp_path}", "--dry_run", *flags
    )
    assert done.returncode == 0, done.stderr
    commands = [set(line.split()) for line in done.stdout.splitlines()]
    assert len(commands) == 3
    common = set.intersection(*commands)
    assert {*flags, f"--config.init_from={tmp_path}/sft_self_correction"} <= common
    own = [sorted(command - common) for command in commands]
    assert own == [[f"--rows={kind}", f"--workdir={tmp_path}/out/{kind}"] for kind, _, _ in STEPS]


def test_the_table_compares_with_the_first_and_leaves_out_what_compiles(tmp_path):
    rows = [
        {
            "rows": kind,
            "step": step,
            "reward": reward + 0.1 * (step == 4 and kind == "padded"),
            "update seconds": 100.0 if step <= 2 else seconds,
            "step seconds": 100.0 if step <= 2 else 10 + seconds,
        }
        for kind, reward, seconds in STEPS
        for step in range(1, 6)
    ]
    path = tmp_path / "rows_apart.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    done = run_script("rows_apart", f"--workdir={tmp_path}", "--table")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "rows_apart.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert cells == [
        ["together", "5", "0.5000", "+0.0000", "0.0000", "4.00 (1.00)", "14.00 (1.00)"],
        ["apart", "5", "0.5000", "+0.0000", "0.0000", "8.00 (2.00)", "18.00 (1.29)"],
        ["padded", "5", "0.7200", "+0.2200", "0.3000", "12.00 (3.00)", "22.00 (1.57)"],
    ]
    assert (tmp_path / "rows_apart.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--steps=2", "--cold=cold"), "error: --steps=2: use more than 2"),
        ((), "error: --cold: name the finished pipeline"),
        (("--cold=cold", "--config.nothing=1"), "error: --config.nothing=1: no stage has"),
        (("--table",), "no rows_apart.jsonl in it"),
    ],
)
def test_a_wrong_flag_is_named(tmp_path, flags, said):
    done = run_script("rows_apart", f"--workdir={tmp_path}", *flags)
    assert done.returncode != 0 and said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_it_runs_to_the_end(smoke_run, tmp_path):
    done = run_script(
        "rows_apart",
        f"--workdir={tmp_path}",
        f"--cold={smoke_run.workdir}",
        "--size=smoke",
        "--steps=4",
        seconds=900,
    )
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "rows_apart.jsonl").read_text(encoding="utf-8").splitlines()
    found = [(row["rows"], row["step"]) for row in map(json.loads, lines)]
    assert found == [(kind, step) for kind, _, _ in STEPS for step in range(1, 5)]
    assert "all done" in done.stdout
