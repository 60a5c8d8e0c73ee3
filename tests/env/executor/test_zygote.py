"""What a zygote has loaded: every untrusted child inherits it."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[3] / "mmrecoder_jax"
ZYGOTE = PACKAGE / "env" / "executor" / "zygote.py"
# By its path and without the package on the path, as `pool.py` starts it; main() does not run.
LOOK = (
    "import json, runpy, sys; runpy.run_path(sys.argv[1]); print(json.dumps(sorted(sys.modules)))"
)
OURS = [
    "mmrecoder_jax",
    "mmrecoder_jax.env",
    "mmrecoder_jax.env.child",
    "mmrecoder_jax.env.child.artist_colors",
    "mmrecoder_jax.env.child.capture",
    "mmrecoder_jax.env.child.chartmimic_recorder",
    "mmrecoder_jax.env.child.display_list",
    "mmrecoder_jax.env.child.errors",
    "mmrecoder_jax.env.child.ink",
    "mmrecoder_jax.env.child.integrity",
    "mmrecoder_jax.env.child.lettering",
    "mmrecoder_jax.env.child.long_texts",
    "mmrecoder_jax.env.child.main_module",
    "mmrecoder_jax.env.child.plot2code_recorder",
    "mmrecoder_jax.env.child.recorder",
    "mmrecoder_jax.env.child.scene",
    "mmrecoder_jax.env.child.script",
    "mmrecoder_jax.env.executor",
    "mmrecoder_jax.env.executor.reserve",
    "mmrecoder_jax.env.executor.warm_start",
    "mmrecoder_jax.env.sandbox",
    "mmrecoder_jax.env.sandbox.confinement",
    "mmrecoder_jax.env.sandbox.quota",
    "mmrecoder_jax.env.sandbox.scratch",
    "mmrecoder_jax.env.sandbox.syscalls",
    "mmrecoder_jax.env.wire",
]
# Ways to other processes, files and threads that a script is not to find ready.
UNWANTED = {"tempfile", "concurrent", "subprocess", "multiprocessing", "threading", "queue"}


def run(*arguments: str) -> list[str]:
    command = [sys.executable, "-P", "-B", "-c", *arguments]
    environment = {"MPLBACKEND": "agg"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def loaded() -> set[str]:
    return set(run(LOOK, str(ZYGOTE)))


def imports(path: Path) -> set[str]:
    """The names of all modules that a file imports from outside our package, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if not name.startswith("mmrecoder_jax")}


def our_files() -> list[Path]:
    names = [name.removeprefix("mmrecoder_jax").replace(".", "/").lstrip("/") for name in OURS]
    places = [
        PACKAGE / name / "__init__.py" if (PACKAGE / name).is_dir() else PACKAGE / f"{name}.py"
        for name in names
    ]
    return [*places, ZYGOTE]


def test_these_of_our_modules_are_loaded_and_no_others(loaded):
    assert sorted(name for name in loaded if name.split(".")[0] == "mmrecoder_jax") == OURS


def test_our_modules_ask_for_nothing_unwanted():
    wanted = set().union(*map(imports, our_files()))
    assert not {name for name in wanted if name.split(".")[0] in UNWANTED}


def test_nothing_unwanted_is_loaded_that_matplotlib_does_not_load(loaded):
    libraries = {"matplotlib", "mpl_toolkits", "numpy"}
    names = [name for path in our_files() for name in imports(path)]
    asked = sorted({name for name in names if name.split(".")[0] in libraries})
    same = "import contextlib, importlib, json, sys\nfor name in sys.argv[1:]:\n"
    same += "    with contextlib.suppress(ImportError): importlib.import_module(name)\n"
    same += "print(json.dumps(sorted(sys.modules)))"
    unwanted = {name for name in loaded - set(run(same, *asked)) if name.split(".")[0] in UNWANTED}
    assert unwanted == set()
