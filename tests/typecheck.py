"""The type checker that jaxtyping's pytest hook applies to every function of the package.

`pyproject.toml` names it (`--jaxtyping-packages=mmrecoder_jax,tests.typecheck.typechecked`): in the
processes of pytest, every call of an annotated function checks its arguments and its result, shapes
included. Subprocesses that tests start run without the hook, as users do.

It is beartype with three changes. The first two make it agree with mypy:

- An int is accepted where a float is declared (PEP 484).
- `TextIO` means io's text streams: beartype asks for a `buffer`, which StringIO lacks.
- `Self` is not checked: jaxtyping hands methods over without their class, and beartype refuses what
  it cannot resolve. mypy checks it.
"""

import io
from collections.abc import Callable
from typing import Any, Self, TextIO

from beartype import BeartypeConf, BeartypeHintOverrides, beartype

CONF = BeartypeConf(
    is_pep484_tower=True, hint_overrides=BeartypeHintOverrides({TextIO: io.TextIOBase})
)


def typechecked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its arguments and its result checked at each call."""
    function.__annotations__ = {
        name: Any if hint is Self else hint for name, hint in function.__annotations__.items()
    }
    return beartype(function, conf=CONF)
