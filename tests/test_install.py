"""Without a checkout: what the wheel holds, and what runs from it in an empty folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of this checkout, built beside it from a copy of what it is made of."""
    pytest.importorskip("setuptools", minversion="77")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("mmrecoder_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(out)],
        cwd=source,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return out / done.stdout.splitlines()[-1]


def test_the_wheel_holds_every_module_configuration_and_data_file(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "mmrecoder_jax").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    configs = {f"mmrecoder_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assert len(configs) >= 6
    others = {name for name in held if ".dist-info/" not in name}
    assert others == package | configs


def run(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_the_installed_package_runs_in_an_empty_folder(wheel, tmp_path):
    """The wheel's files in front of everything else, the libraries from this environment."""
    installed, folder = tmp_path / "installed", tmp_path / "empty"
    zipfile.ZipFile(wheel).extractall(installed)
    folder.mkdir()
    where = run(installed, folder, "-c", "import mmrecoder_jax; print(mmrecoder_jax.__file__)")
    assert where.stdout.strip() == str(installed / "mmrecoder_jax" / "__init__.py")
    train = ("-m", "mmrecoder_jax.train", "--workdir=W")
    helped = run(installed, folder, *train, "--config=pipeline:smoke", "--helpfull")
    assert "--config:" in helped.stdout and "--workdir:" in helped.stdout
    for wrong, said in (
        ("--config=stag2:tiny", "did you mean --config=stage2"),
        ("--config=configs/stage2.py:tiny", "did you mean --config=stage2"),
        ("--config=stage2:tiny", "--config.init_from=runs/tiny/stage1"),
    ):
        done = run(installed, folder, *train, wrong)
        assert done.returncode == 1 and done.stderr.startswith("error: ")
        assert said in done.stderr and done.stderr.count("\n") == 1
    first = ("--config=sft_chart2code:smoke", "--config.train.steps=1", "--config.data.val_count=1")
    few = ("--config.data.train_count=8", "--config.data.test_count=1")
    done = run(installed, folder, *train, *first, *few)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (folder / "W" / "checkpoints" / "1").is_dir()
