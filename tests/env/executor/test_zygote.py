"""What a zygote has loaded: every untrusted child inherits it."""

import ast
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mmrecoder_jax.env import EnvConfig, ExecutorPool

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
    "mmrecoder_jax.env.child.chart2code_recorder",
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
    "mmrecoder_jax.env.executor.beginning",
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


# Finds, in all the memory that a process has, every known word that a given word follows. A script
# holds the first word and the hash of the second one, so it does not find its own.
SCAN = """
import ctypes, gc, hashlib, os
libc = ctypes.CDLL(None, use_errno=True)
libc.sbrk.restype = ctypes.c_void_p
HEADS, KNOWN, PAGE = {heads}, {known}, 4096
# {control}
def is_readable(address):
    if libc.mincore(ctypes.c_void_p(address), 1, (ctypes.c_char * 1)()):
        return False  # nothing is there
    libc.access(ctypes.c_void_p(address), 0)
    return ctypes.get_errno() != 14  # EFAULT
def look(data):
    for head in HEADS:
        at = data.find(head)
        while at >= 0:
            tail = data[at + len(head): at + len(head) + 16]
            found.add(KNOWN.get(hashlib.sha256(tail).hexdigest()))
            at = data.find(head, at + 1)
found = set()
top = max(ctypes.cast(f, ctypes.c_void_p).value for f in (libc.access, libc.sbrk)) + (64 << 20)
places = [id(object()), libc.sbrk(0), id([0] * 10**6), id(bytes(10**7)), id(os), id(look)]
ranges = [(place - (64 << 20), place + (64 << 20)) for place in places] + [(top - (1 << 30), top)]
scanned, last = 0, b''
seen = set()
for low, high in ranges:
    for address in range(max(low, PAGE) // PAGE * PAGE, high, PAGE):
        if address in seen: continue
        seen.add(address)
        if is_readable(address):
            data = ctypes.string_at(address, PAGE)
            look(last[-64:] + data)
            last, scanned = data, scanned + 1
for each in gc.get_objects():
    if isinstance(each, (str, bytes)): look(each.encode() if isinstance(each, str) else each)
raise ValueError(f"{{scanned}} pages, found {{sorted(filter(None, found))}}")
"""


def test_a_script_finds_nothing_of_earlier_ones():
    head, pixel_head = b"Head-Of-A-Marker", bytes(range(100, 103)) + b"\xff"
    tails = {
        name: hashlib.sha256(name.encode()).hexdigest()[:16].encode()
        for name in ("code", "error", "text", "file", "control")
    }
    pixels = bytes([9, 19, 29, 255, 39, 49, 59, 255, 69, 79, 89, 255, 99, 109, 119, 255])
    digests = {hashlib.sha256(tail).hexdigest(): name for name, tail in tails.items()}
    digests[hashlib.sha256(pixels).hexdigest()] = "pixels"
    word = {name: (head + tail).decode() for name, tail in tails.items()}
    chart = f"""
import numpy as np, matplotlib.pyplot as plt
fig = plt.figure(figsize=(4, 4))
row = np.frombuffer(bytes({list(pixel_head + pixels)}) * 40, np.uint8).reshape(1, -1, 4)
fig.figimage(np.tile(row, (100, 1, 1)))
fig.text(0.1, 0.8, '{word["text"]}')
open('{word["file"]}', 'w').write('x')
"""
    earlier = [
        f"# {word['code']}\nx = 1",
        f"raise ValueError('{word['error']}' * 9)",
        chart,
        f"raise ValueError('{word['error']}' * 9)  # {word['code']}",
    ]
    look = SCAN.format(heads=[head, pixel_head], known=digests, control=word["control"])
    with ExecutorPool(
        EnvConfig(workers=1, preload=("numpy", "matplotlib"), replay_share=1.0, bubblewrap=False)
    ) as pool:
        statuses = [result.status for result in pool.run(earlier)]
        assert statuses == ["no_figure", "error", "ok", "error"]
        error = pool.run([look])[0].error
    assert error.endswith("found ['control']"), error
    assert int(error.split("ValueError: ")[1].split()[0]) > 5000
