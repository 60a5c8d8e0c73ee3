"""Runs the examples (`>>>`) in the package's docstrings."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def with_examples():
    """Names of the modules that have examples. Only these are imported: some of the others are
    programs, which define the same command-line flags or belong in a process of their own.
    """
    for path in sorted((ROOT / "mmrecoder_jax").rglob("*.py")):
        if ">>> " in path.read_text(encoding="utf-8"):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("name", with_examples())
def test_examples_in_docstrings(name):
    failed, attempted = doctest.testmod(importlib.import_module(name))
    assert attempted and not failed  # doctest prints what differs
