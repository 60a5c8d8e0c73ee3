"""Trajectories and charts of no policy, for tests of what happens to them."""

import numpy as np

from mmrecoder_jax.data.sources import Chart, png_bytes
from mmrecoder_jax.env.chartmimic import score
from mmrecoder_jax.env.execution import Execution
from mmrecoder_jax.env.response import response_text
from mmrecoder_jax.env.wire import Status
from mmrecoder_jax.rl.judge.base import Verdict
from mmrecoder_jax.rl.trajectory import Trajectory, Turn

CODE = "import matplotlib.pyplot as plt\nplt.bar([1, 2], [{height}, 1])\nplt.show()"
# What a script of some seconds would wait for: `wait_for(code)` in tests of an environment.
ANSWER = response_text("a bar chart", CODE)


def bars(height, color=(200, 30, 30)):
    """Pixels of a chart with one bar of so many pixels."""
    pixels = np.full((40, 60, 3), 255, np.uint8)
    pixels[40 - height :, 20:40] = color
    return pixels


def chart(name="chart", height=20):
    return Chart(name, png_bytes(bars(height)), "", None, "Redraw this chart.", f"{name}.png", "")


def turn(height=None, error="", text=None, judge=None, status=Status.ERROR):
    """A turn that drew a bar of this height; without one it failed."""
    image = None if height is None else bars(height)
    execution = Execution(status if image is None else Status.OK, image, error)
    nothing = np.zeros(0, np.float32)
    return Turn(
        nothing.astype(np.int32),
        nothing,
        True,
        ANSWER.replace("{height}", str(height)) if text is None else text,
        execution,
        score(None, None),
        1.0,
        None if judge is None else Verdict(judge if judge >= 0 else None),
    )


def trajectory(*turns, of=None):
    return Trajectory(of or chart(), 0, (), turns)
