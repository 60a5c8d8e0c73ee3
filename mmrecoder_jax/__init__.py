"""MM-ReCoder in JAX (arXiv 2604.01600).

    with mmrecoder_jax.drawer() as drawer:
        print(drawer.draw("chart.png").code)

Importing this package imports nothing else: the execution side must start fast, without JAX.
"""

from typing import Any

__version__ = "0.2.0.dev0"  # the one home of the version: setup.py reads this line


def drawer(checkpoint: str = "", server: str = "", model: str = "", **options: Any) -> Any:
    """Who redraws charts as code: a `drawing.drawer.Drawer`, to be used in a `with` block.

    Args:
      checkpoint: a work directory of a stage, or a Hugging Face directory; "": the policy in the
        box.
      server: address of an OpenAI-compatible server, asked in place of a checkpoint.
      model: the name the server knows its model by.
      **options: other fields of `drawing.open.Who`.
    """
    import importlib

    home = importlib.import_module("mmrecoder_jax.drawing.drawer")
    return home.Drawer(checkpoint, server, model, **options)
