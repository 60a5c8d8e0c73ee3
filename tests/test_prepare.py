"""What the pipeline does about real charts: there, gathered, or missing."""

import os

from mmrecoder_jax import prepare
from mmrecoder_jax.config import load
from mmrecoder_jax.data import sdists
from mmrecoder_jax.data.sources import ChartDirectory


def pipeline(gallery: str, sample: int):
    config = load("pipeline", "tiny")
    config.data.gallery, config.data.gallery_sample, config.env.workers = gallery, sample, 1
    return config


def test_a_gallery_that_is_there_is_taken(tmp_path):
    assert prepare.ensure_gallery(pipeline(str(tmp_path), 5), str(tmp_path / "work")) == str(
        tmp_path
    )


def test_a_missing_gallery_is_sampled_once(tmp_path, index, monkeypatch, capsys):
    monkeypatch.setattr(sdists, "INDEX", index[0])
    config = pipeline(str(tmp_path / "none"), 5)
    directory = prepare.ensure_gallery(config, str(tmp_path))
    assert directory == os.path.join(str(tmp_path), "data", "gallery")
    assert len(ChartDirectory(directory)) == 2
    assert "mmrecoder_jax.build_gallery" in capsys.readouterr().out
    monkeypatch.setattr(sdists, "INDEX", "http://127.0.0.1:9")
    assert prepare.ensure_gallery(config, str(tmp_path)) == directory


def test_no_index_ends_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sdists, "INDEX", "http://127.0.0.1:9")
    assert prepare.ensure_gallery(pipeline(str(tmp_path / "none"), 5), str(tmp_path)) == ""
    assert "cannot get matplotlib-3.8.4.tar.gz" in capsys.readouterr().out
    assert prepare.ensure_gallery(pipeline("", 5), str(tmp_path)) == ""
