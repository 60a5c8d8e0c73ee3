"""What tests share: a compilation cache for the session (subprocesses too), and a tiny policy with
its environment.
"""

import atexit
import dataclasses
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="mmrecoder-jax-cache-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's job in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests interrupt themselves

import pytest
from absl import flags

flags.FLAGS.mark_as_parsed()


@dataclasses.dataclass
class Policy:
    """A randomly initialised tiny policy: `stage`, `params`, and some charts with their
    records.
    """

    stage: Any
    params: Any
    charts: list

    def stage_with(self, fields: dict[str, Any], **changes: Any) -> Any:
        """A copy of the stage whose configuration has other values (dotted names): the policy is
        shared by all tests and stays as it is.
        """
        from mmrecoder_jax.config import set_fields

        config = self.stage.config.copy_and_resolve_references()
        set_fields(config, fields)
        return dataclasses.replace(self.stage, config=config, **changes)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """The URL of a package index on this machine, and its folder."""
    from tests.package_index import serve

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serve(tmp_path / "index") as url:
        yield url, tmp_path / "index"


@pytest.fixture(scope="session")
def _cloud():
    """One server for all: libraries ask once where the cloud is."""
    pytest.importorskip("gcsfs")
    from tests.buckets import serving

    with serving("bucket") as cloud, pytest.MonkeyPatch.context() as patch:
        for name, value in cloud.variables.items():
            patch.setenv(name, value)
        yield cloud


@pytest.fixture
def cloud(_cloud, tmp_path, monkeypatch):
    """A stand-in for Cloud Storage with an empty `bucket`, for this process and those it starts;
    what is fetched goes below `tmp_path`.
    """
    from mmrecoder_jax import places

    _cloud.objects["bucket"].clear()
    _cloud.requests.clear()
    monkeypatch.setenv(places.HOME, str(tmp_path / "cache"))
    monkeypatch.setattr(places, "_copies", [])
    yield _cloud
    _cloud.fault = lambda method, path, query: None


@pytest.fixture(scope="session")
def pool():
    """One warm executor pool in the synthetic charts' house style."""
    from mmrecoder_jax.data import synthetic
    from mmrecoder_jax.env import ChartEnv, EnvConfig

    config = EnvConfig(
        workers=2,
        dpi=synthetic.DPI,
        rc_params=synthetic.RC_PARAMS,
        preload=("numpy", "matplotlib"),
    )
    with ChartEnv(config) as env:
        yield env


@pytest.fixture
def pools(pool):
    """Where it does not matter that references and answers run apart: one pool for both."""
    from mmrecoder_jax.env.pools import Pools

    return Pools(references=pool, answers=pool)


@pytest.fixture(scope="session")
def policy(tmp_path_factory, pool) -> Policy:
    from mmrecoder_jax import prepare
    from mmrecoder_jax.config import load
    from mmrecoder_jax.stage import build

    workdir = str(tmp_path_factory.mktemp("policy"))
    config = load("stage2", "smoke")
    config.data.update({"train_count": 12, "val_count": 4, "test_count": 4})
    prepare.ensure_charts(config, workdir)
    stage = build(config, workdir, prepare.ensure_tokenizer(config, workdir))
    stage.write_config()
    charts = stage.charts("train")
    params = stage.initial_params()
    params["model"]["embed_tokens"]["weight"] /= (
        8  # nearly even odds: an untrained policy would repeat one token
    )
    return Policy(stage, params, [charts[i] for i in range(len(charts))])


def train_command(config: str, workdir: str, *flags: str) -> list[str]:
    """The training command of a configuration in its smoke size."""
    return [
        sys.executable,
        "-m",
        "mmrecoder_jax.train",
        f"--config=configs/{config}.py:smoke",
        f"--workdir={workdir}",
        *flags,
    ]


@dataclasses.dataclass
class SmokeRun:
    """A finished `configs/pipeline.py:smoke --profile=2`: its work directory, what it printed."""

    workdir: str
    output: str


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory) -> SmokeRun:
    """One run for all processes of pytest: the first that needs it makes it, others wait."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    workdir, said = base / "smoke", base / "smoke.txt"
    with open(base / "smoke.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not said.exists():
            done = subprocess.run(
                train_command("pipeline", str(workdir), "--profile=2"),
                capture_output=True,
                text=True,
                timeout=1500,
                check=False,
            )
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
            said.write_text(done.stdout, "utf-8")
    return SmokeRun(str(workdir), said.read_text("utf-8"))
