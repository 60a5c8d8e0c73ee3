"""The environment as the policy meets it: a response's code is taken out, run, and answered with
feedback.
"""

import io
from collections.abc import Iterable, Mapping

import numpy as np
from PIL import Image

from mmrecoder_jax.env.execution import Execution
from mmrecoder_jax.env.pool import ExecutorPool
from mmrecoder_jax.env.response import extract_code

FEEDBACK_IMAGES = ("render", "difference")


def feedback_text(execution: Execution, templates: Mapping[str, str]) -> str:
    """The text part of a turn's feedback.

    Args:
      execution: of the previous turn.
      templates: "render" for a script that drew a figure, "error" for any other; "{error}" in the
        latter is replaced by the error text.
    """
    return (
        templates["render"]
        if execution.ok
        else templates["error"].replace("{error}", execution.error)
    )


def feedback_image(execution: Execution, target: bytes, kind: str) -> np.ndarray | None:
    """The picture part of a turn's feedback, uint8 [H, W, 3]; None where the script drew nothing.

    Args:
      execution: of the previous turn, with pixels.
      target: the chart to redraw, as an encoded image. It is what the policy was shown: no target
        code or record enters the feedback.
      kind: "render" (the paper's feedback), or "difference": 255 - |target - render|, white where
        the render is right, in the target's size (a render of another size is resized to it).
    """
    if not execution.ok or kind == "render":
        return execution.image
    if kind != "difference":
        raise ValueError(f"feedback.image={kind!r}: use one of {', '.join(FEEDBACK_IMAGES)}")
    with Image.open(io.BytesIO(target)) as image:
        wanted = np.asarray(image.convert("RGB"), np.int16)
    render = execution.image
    if render.shape != wanted.shape:
        render = np.asarray(
            Image.fromarray(render).resize(
                (wanted.shape[1], wanted.shape[0]), Image.Resampling.BICUBIC
            )
        )
    return (255 - np.abs(wanted - render)).astype(np.uint8)


class ChartEnv(ExecutorPool):
    """An `ExecutorPool` that takes responses instead of code.

    with ChartEnv(EnvConfig(workers=2)) as env:
        first, second = env.execute([response_a, response_b])
    """

    def execute(self, responses: Iterable[str]) -> list[Execution]:
        """Runs the code of each response; NO_CODE where there is none."""
        return self.run([extract_code(response) for response in responses])
