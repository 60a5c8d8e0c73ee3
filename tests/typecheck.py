"""The type checker that jaxtyping's pytest hook applies to every function of the package.

`pyproject.toml` names it (`--jaxtyping-packages=mmrecoder_jax,tests.typecheck.typechecked`): in the
processes of pytest, every call of an annotated function checks its arguments and its result, shapes
included. Subprocesses that tests start run without the hook, as users do.

It is beartype with two changes:

- An int is accepted where a float is declared, as mypy does (PEP 484).
- `Self` is not checked: jaxtyping hands methods over without their class, and beartype refuses what
  it cannot resolve. mypy checks it.
"""

from collections.abc import Callable
from typing import Any, Self

from beartype import BeartypeConf, beartype

CONF = BeartypeConf(is_pep484_tower=True)


def typechecked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its arguments and its result checked at each call."""
    function.__annotations__ = {
        name: Any if hint is Self else hint for name, hint in function.__annotations__.items()
    }
    return beartype(function, conf=CONF)
