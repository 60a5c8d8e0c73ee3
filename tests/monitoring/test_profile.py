import gzip
import json

import jax.numpy as jnp
import pytest

from mmrecoder_jax.config import ConfigError
from mmrecoder_jax.monitoring import profile
from mmrecoder_jax.monitoring.progress import Progress


@pytest.fixture(autouse=True)
def _none_afterwards():
    yield
    profile.want("")


def run(workdir, steps, active=True):
    with (
        profile.Profile(str(workdir), active) as traced,
        Progress("stage1", max(steps), annotate=traced.annotate) as progress,
    ):
        for step in steps:
            with traced.step(step), progress.phase(f"phase of {step}"):
                (jnp.ones(8) * step).block_until_ready()


def names_in(path):
    return {
        event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    }


def test_the_trace_of_some_steps_has_their_phases(tmp_path, capsys):
    profile.want("2-3")
    run(tmp_path, range(1, 5))
    (path,) = tmp_path.glob("profile/plugins/profile/*/perfetto_trace.json.gz")
    names = names_in(path)
    assert {"phase of 2", "phase of 3"} <= names and not {"phase of 1", "phase of 4"} & names
    assert f"trace of steps 2-3: {path}\n" in capsys.readouterr().out


def test_a_stage_that_ends_or_resumes_among_the_steps_has_what_it_took(tmp_path, capsys):
    profile.want("2-9")
    run(tmp_path, range(3, 5))
    assert "trace of steps 3-4: " in capsys.readouterr().out
    run(tmp_path / "none", range(1, 2))
    assert "no trace of steps 2-9: the run took none of them" in capsys.readouterr().out
    run(tmp_path / "other host", range(1, 4), active=False)
    assert not (tmp_path / "other host").exists() and not (tmp_path / "none").exists()


def test_nothing_is_recorded_unasked(tmp_path, capsys):
    profile.want("")
    run(tmp_path, range(1, 4))
    assert not list(tmp_path.iterdir()) and "trace" not in capsys.readouterr().out


@pytest.mark.parametrize("steps", ["x", "0", "4-3", "3-", "-3", "3,4", "²", "1.5"])
def test_other_words_are_refused(steps):
    with pytest.raises(ConfigError, match="use a step, such as 3, or the first and the last"):
        profile.want(steps)
