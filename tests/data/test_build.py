"""Synthetic charts are rendered once, resumed after a kill, and never mistaken for others."""

import dataclasses
import io
import signal
import subprocess
import sys

import pytest
from PIL import Image

from mmrecoder_jax.data import synthetic
from mmrecoder_jax.data.build import build_synthetic


def test_build_synthetic(tmp_path, pool):
    seen = []
    charts = build_synthetic(
        tmp_path / "val", "val", 12, 3, pool, lambda done, total: seen.append((done, total))
    )
    assert seen == [(i + 1, 12) for i in range(12)]
    for index in range(12):
        spec = synthetic.chart_spec(3, index, "val")
        chart = charts[index]
        assert chart.code == spec.code()
        assert Image.open(io.BytesIO(chart.image)).size == (168, 112)
        texts = {
            spec.title,
            spec.xlabel,
            spec.ylabel,
            *spec.labels,
            *(spec.categories if spec.kind == "pie" else ()),
        } - {""}
        assert set(chart.record.texts) == texts
        assert len(chart.record.colors) == len(spec.colors)
    before = pool.stats()["requests"]
    assert len(build_synthetic(tmp_path / "val", "val", 12, 3, pool)) == 12
    assert pool.stats()["requests"] == before, "built again though it was there"
    with pytest.raises(ValueError, match=r"other charts \(seed, grammar differ\)"):
        build_synthetic(tmp_path / "val", "val", 12, 4, pool)


BUILD = """
import sys
from mmrecoder_jax.data import synthetic
from mmrecoder_jax.data.build import build_synthetic
from mmrecoder_jax.env import EnvConfig, ExecutorPool
style = {"dpi": synthetic.DPI, "rc_params": synthetic.RC_PARAMS}
with ExecutorPool(EnvConfig(workers=1, preload=("numpy", "matplotlib"), **style)) as pool:
    build_synthetic(sys.argv[1], "train", 60, 0, pool, lambda n, _: print(n, flush=True))
"""


def test_build_goes_on_after_a_kill(tmp_path, pool):
    target = tmp_path / "train"
    process = subprocess.Popen(
        [sys.executable, "-c", BUILD, str(target)], stdout=subprocess.PIPE, text=True
    )
    while int(process.stdout.readline()) < 10:
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not target.exists()
    done = []
    charts = build_synthetic(
        target, "train", 60, 0, pool, lambda number, total: done.append(number)
    )
    assert len(charts) == 60
    assert 0 < len(done) <= 50, "what the killed build had made was used"
    whole = build_synthetic(tmp_path / "whole", "train", 60, 0, pool)
    assert list(charts) == list(whole)
    assert (target / "charts.jsonl").read_bytes() == (
        tmp_path / "whole" / "charts.jsonl"
    ).read_bytes()


def test_chart_that_does_not_run_is_an_error(tmp_path, pool, monkeypatch):
    spec = dataclasses.replace(synthetic.chart_spec(0, 0), colors=("nocolor",) * 5)
    monkeypatch.setattr(synthetic, "chart_spec", lambda *_: spec)
    with pytest.raises(RuntimeError, match=r"train-000000 does not run[\s\S]*nocolor"):
        build_synthetic(tmp_path / "bad", "train", 1, 0, pool)
