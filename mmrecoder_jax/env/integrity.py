"""Whether a script changed the library that draws it, or the recorder that watches it.

Runs inside the script's own process, so a script that knows of it can evade it: the result is a warning to count (the "tamper" flag),
not a boundary. An honest plotting script never assigns to a method of matplotlib's classes.
"""

import importlib
from collections.abc import Mapping
from types import FunctionType, ModuleType
from typing import Any

from mmrecoder_jax.env import capture, recorder

_MODULES = (
    "artist axes._axes axes._base axis backend_bases backends.backend_agg collections container figure image lines patches patheffects "
    "spines table text transforms"
)
Snapshot = list[tuple[Mapping[str, Any], dict[str, Any]]]


def snapshot() -> Snapshot:
    """The methods of matplotlib's drawing classes and the functions of the recorder and capture, as they are now."""
    modules = [*(importlib.import_module(f"matplotlib.{name}") for name in _MODULES.split()), recorder, capture]
    taken: Snapshot = []
    for module in modules:
        taken.append((vars(module), _functions(module)))
        own = (thing for thing in vars(module).values() if isinstance(thing, type) and thing.__module__ == module.__name__)
        taken += [(vars(cls), dict(vars(cls))) for cls in own]
    return taken


def changed(taken: Snapshot) -> bool:
    """Whether anything in the snapshot has been replaced since."""
    return any(now.get(name) is not value for now, was in taken for name, value in was.items())


def _functions(module: ModuleType) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if isinstance(value, FunctionType | type)}
