"""What a zygote removes when its trainer is gone."""

import socket

import pytest

from mmrecoder_jax.env.executor import beginning
from mmrecoder_jax.env.sandbox import scratch


@pytest.mark.parametrize("name", ["home", f"{scratch.POOL_PREFIX}ab12"])
def test_only_the_folder_of_a_pool_is_removed(monkeypatch, tmp_path, name):
    """By hand, the program is started with the user's own HOME."""
    folder, private = tmp_path / name, tmp_path / name / "0-1"
    private.mkdir(parents=True)
    (folder / "letter").write_text("dear")
    monkeypatch.chdir(private)
    monkeypatch.setenv("HOME", str(folder))
    ours, theirs = socket.socketpair()
    with ours:
        beginning.clean_up(ours.fileno())
        assert (folder / "letter").exists()  # the trainer lives
        theirs.close()
        beginning.clean_up(ours.fileno())
    assert (folder / "letter").exists() is (name == "home")
