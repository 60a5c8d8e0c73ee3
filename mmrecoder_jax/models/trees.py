"""Parts of a parameter tree, chosen by the path of a leaf ("model/layers/self_attn/q_proj/kernel"),
and put together again.
"""

from collections.abc import Callable
from typing import Any

Chosen = Callable[[str], bool]


def everything(name: str) -> bool:
    """Chooses every leaf."""
    return True


def split(
    tree: dict[str, Any], chosen: Chosen, prefix: str = ""
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the leaves that are chosen, the others), as trees of the same form in which empty branches
    are left out.
    """
    inside, outside = {}, {}
    for key, value in tree.items():
        if not isinstance(value, dict):
            (inside if chosen(prefix + key) else outside)[key] = value
            continue
        for part, whole in zip(
            split(value, chosen, f"{prefix}{key}/"), (inside, outside), strict=True
        ):
            if part:
                whole[key] = part
    return inside, outside


def join(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The tree that `split` took apart; a leaf that both have is taken from `second`."""
    whole = dict(first)
    for key, value in second.items():
        whole[key] = join(whole[key], value) if isinstance(value, dict) and key in whole else value
    return whole
