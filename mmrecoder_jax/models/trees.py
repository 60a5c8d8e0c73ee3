"""Splits a parameter tree by the paths of its leaves, and joins the parts again.

A path is "model/layers/self_attn/q_proj/kernel".

    tree                       {"a": {"kernel": 1, "bias": 2}, "b": {"bias": 3}}
    split(tree, is_bias)       {"a": {"bias": 2}, "b": {"bias": 3}},  {"a": {"kernel": 1}}
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
    """(the chosen leaves, the others), as trees of the same form without empty branches."""
    inside: dict[str, Any] = {}
    outside: dict[str, Any] = {}
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


def pick(tree: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """The leaves of a tree that another tree has too."""
    return {
        key: pick(tree[key], value) if isinstance(value, dict) else tree[key]
        for key, value in like.items()
    }


def join(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The tree that `split` took apart; if both have a leaf, that of `second` counts."""
    whole = dict(first)
    for key, value in second.items():
        whole[key] = join(whole[key], value) if isinstance(value, dict) and key in whole else value
    return whole
