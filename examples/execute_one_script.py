"""Runs untrusted chart scripts in the sandbox: one that draws, and one that fails.

    python examples/execute_one_script.py            writes render.png
    python examples/execute_one_script.py chart.png

An execution never raises on what the script does: its status says how it ended, and `error` is the
feedback that the policy would read. docs/environment.md says what the sandbox covers.
"""

import sys

from PIL import Image

from mmrecoder_jax.env.execution import EnvConfig, Execution
from mmrecoder_jax.env.pool import ExecutorPool

DRAWS = """
import matplotlib.pyplot as plt
plt.plot([1, 2, 3], [2, 1, 3], marker="o")
plt.title("Three points")
plt.show()
"""
FAILS = """
import matplotlib.pyplot as plt
plt.plot([1, 2, 3], [2, 1])
"""


def describe(name: str, execution: Execution) -> None:
    """Prints how a script ended and what was recorded of its drawing."""
    print(f"{name}: {execution.status}")
    if execution.record is not None:
        print(f"  texts {', '.join(execution.record.texts)}")
    if execution.error:
        print(f"  feedback {execution.error.splitlines()[-1]}")


def main(path: str = "render.png") -> None:
    with ExecutorPool(EnvConfig(workers=1, preload=("numpy", "matplotlib"))) as pool:
        drawn, failed = pool.run([DRAWS, FAILS])
    describe("draws", drawn)
    describe("fails", failed)
    if drawn.image is not None:
        Image.fromarray(drawn.image).save(path)
        height, width, _ = drawn.image.shape
        print(f"wrote {path}, {width} x {height} pixels")


if __name__ == "__main__":
    main(*sys.argv[1:])
