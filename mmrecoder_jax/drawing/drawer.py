"""Drawing from Python: `mmrecoder_jax.drawer()`.

with mmrecoder_jax.drawer() as drawer:
    print(drawer.draw("chart.png").code)
"""

import contextlib
from typing import Any, Self

import numpy as np
from PIL import Image

from mmrecoder_jax.config import ConfigError
from mmrecoder_jax.drawing.authors import Author
from mmrecoder_jax.drawing.choosing import Select, check_select
from mmrecoder_jax.drawing.drawing import Drawing, draw
from mmrecoder_jax.drawing.open import Who, author_config, keep_programs, open_author
from mmrecoder_jax.drawing.pictures import chart_of
from mmrecoder_jax.images import Encoded


class Drawer:
    """An author that is ready to draw; a context manager.

    Args:
      checkpoint: a work directory of a stage, or a Hugging Face directory; "": the policy in the
        box.
      server: address of an OpenAI-compatible server, asked in place of a checkpoint.
      model: the name the server knows its model by.
      **options: other fields of `drawing.open.Who`.

    Raises:
      ConfigError: there is no such author.
    """

    def __init__(self, checkpoint: str = "", server: str = "", model: str = "", **options: Any):
        self._who = Who(checkpoint, server, model, **options)
        self._config = author_config(self._who)
        self._exits = contextlib.ExitStack()
        self._author: Author | None = None

    def __enter__(self) -> Self:
        keep_programs()
        self._author = self._exits.enter_context(open_author(self._who, config=self._config))
        return self

    def __exit__(self, *exc: Any) -> None:
        self._author = None
        self._exits.__exit__(*exc)

    def draw(
        self,
        picture: Encoded | Image.Image | np.ndarray,
        *,
        turns: int = 4,
        samples: int = 1,
        temperature: float | None = None,
        seed: int = 0,
        select: str = Select.VISUAL,
        name: str = "chart",
    ) -> Drawing:
        """Redraws a chart.

        Args:
          picture: the path or the bytes of an image file, an image of Pillow, or pixels.
          turns: of a conversation.
          samples: conversations, of whose turns one is chosen.
          temperature: None: 0 (greedy) for one sample, 1 for several.
          seed: of sampling.
          select: the turn that is handed over: "visual" (most alike) or "last" (that runs).

        Returns:
          The drawing; its `code` is None where no turn runs.

        Raises:
          BadImage: the picture cannot be read.
          ConfigError: a value that cannot be, or samples that would all be equal.
          RuntimeError: outside of the `with` block.
        """
        if self._author is None:
            raise RuntimeError("a drawer is ready inside its `with` block")
        if turns < 1 or samples < 1:
            raise ConfigError(f"turns={turns}, samples={samples}: use 1 or more")
        check_select(select, samples, judged=False)
        if temperature is None:
            temperature = 1.0 if samples > 1 else 0.0
        chart = chart_of(picture, name, self._config.data.instruction)
        ((_, drawing),) = draw(
            self._author,
            [chart],
            turns=turns,
            samples=samples,
            temperature=temperature,
            seed=seed,
            select=select,
        )
        return drawing
