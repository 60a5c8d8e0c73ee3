"""Whether a script changed the library that draws it, or the recorder that watches it.

The zygote takes the snapshot before it forks; the script's own process compares when the script has
ended. A script that knows of it can evade it: the result is a warning to count (the "tamper" flag),
not a boundary. An honest plotting script never assigns to a method of matplotlib's classes.
"""

import ctypes
import gc
import importlib
import sys
from collections.abc import Mapping
from types import FunctionType, ModuleType
from typing import Any

from mmrecoder_jax.env.child import artist_colors, capture, ink, recorder

_MODULES = (
    "artist axes._axes axes._base axis backend_bases backends.backend_agg collections container "
    "figure image lines patches patheffects spines table text transforms"
)
# (what to look at, its content, the address of its version tag, its version)
Snapshot = list[tuple[Mapping[str, Any], dict[str, Any], int, int]]
# Of a dict's version tag, which CPython raises with every change and had until 3.12.
_VERSION_OFFSET = 24


def snapshot() -> Snapshot:
    """Everything that draws or watches, as it is now.

    That is the methods of matplotlib's drawing classes, and the functions of recorder, ink,
    artist_colors and capture.
    """
    modules = [
        *(importlib.import_module(f"matplotlib.{name}") for name in _MODULES.split()),
        recorder,
        capture,
        artist_colors,
        ink,
    ]
    taken: Snapshot = []
    for module in modules:
        taken.append((vars(module), _functions(module), *_version(vars(module))))
        own = [
            thing
            for thing in vars(module).values()
            if isinstance(thing, type) and thing.__module__ == module.__name__
        ]
        taken += [
            (vars(cls), dict(vars(cls)), *_version(gc.get_referents(vars(cls))[0])) for cls in own
        ]
    return taken


def changed(taken: Snapshot) -> bool:
    """Whether anything in the snapshot has been replaced since."""
    return any(
        now.get(name) is not value
        for now, was, address, version in taken
        # Looking at every function would make the kernel copy its page, as Python counts
        # references: only where something changed.
        if not version or ctypes.c_uint64.from_address(address).value != version
        for name, value in was.items()
    )


def _version(names: dict[str, Any]) -> tuple[int, int]:
    """The address of a dict's version tag, and the tag; both 0 where this Python has none."""
    if sys.implementation.name != "cpython" or sys.version_info >= (3, 13):
        return 0, 0
    address = id(names) + _VERSION_OFFSET
    return address, ctypes.c_uint64.from_address(address).value


def _functions(module: ModuleType) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, FunctionType | type)
    }
