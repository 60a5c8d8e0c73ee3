"""What must be alike in two machines for the same script to give the same result.

    {"Python": "3.11", "matplotlib": "3.8.4", ..., "machine": "x86_64", "sandbox": "auto",
     "bubblewrap": "used", "mmrecoder_jax": "5f1c2a9be0d4"}

The last one is a digest of our code that runs in and around the process of a script. What no name
of a release says (how a library was built, which instructions a processor has) shows in a chart
that each machine draws, `CHART`.
"""

import functools
import hashlib
import platform
from collections.abc import Mapping
from pathlib import Path

from mmrecoder_jax.env.execution import EnvConfig
from mmrecoder_jax.env.interpreter import Interpreter
from mmrecoder_jax.env.local import Answer
from mmrecoder_jax.env.sandbox import bubblewrap
from mmrecoder_jax.env.sandbox.confinement import SandboxMode
from mmrecoder_jax.env.wire import RecordKind, Request

BUBBLEWRAP = "bubblewrap"
# Texts, markers, transparency, interpolation and a layout, with numbers from the fixed seed.
CHART = Request(
    """\
import matplotlib.pyplot as plt
import numpy as np

fig, (left, right) = plt.subplots(1, 2, figsize=(4, 2))
x = np.linspace(0, 6, 50)
for k in range(3):
    left.plot(x, np.sin(x + k) ** 3, alpha=0.6, label=f"$\\alpha_{k}$")
left.scatter(*np.random.randn(2, 30), s=9, c="crimson")
left.set_title("Text, 0123456789")
left.legend(fontsize=6)
right.imshow(np.random.rand(7, 9), interpolation="bicubic", aspect="auto")
right.set_xlabel("rotated", rotation=30)
fig.tight_layout()
""",
    RecordKind.TRAINING,
)
_FOLDER = Path(__file__).parent
_OF_SCRIPTS = ("wire.py", "child/*.py", "executor/*.py", "sandbox/*.py")


def likeness(config: EnvConfig, python: Interpreter) -> dict[str, str]:
    """The facts of this machine for executors of that configuration, by what a user calls them."""
    is_wrapped = config.sandbox == SandboxMode.AUTO and config.bubblewrap and bubblewrap.program()
    return {
        "Python": ".".join(python.version.split(".")[:2]),
        **python.releases,
        "machine": platform.machine(),
        "sandbox": str(config.sandbox),
        BUBBLEWRAP: "used" if is_wrapped else "not used",
        "mmrecoder_jax": _digest(),
    }


def differences(there: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """In words: ["matplotlib is 3.8.4 there and 3.10.1 here", "squarify is missing there"]."""
    found = []
    for name in {**here, **there}:
        if name not in there or name not in here:
            found.append(f"{name} is missing {'there' if name in here else 'here'}")
        elif there[name] != here[name]:
            found.append(f"{name} is {there[name]} there and {here[name]} here")
    return found


def drawn(answer: Answer) -> str:
    """A digest of what an executor drew, and says of it."""
    whole = hashlib.sha256(len(answer.claim).to_bytes(8) + answer.claim + answer.pixels)
    return whole.hexdigest()


@functools.cache
def _digest() -> str:
    files = sorted(path for pattern in _OF_SCRIPTS for path in _FOLDER.glob(pattern))
    whole = hashlib.sha256()
    for path in files:
        whole.update(path.relative_to(_FOLDER).as_posix().encode() + b"\0" + path.read_bytes())
    return whole.hexdigest()[:12]
