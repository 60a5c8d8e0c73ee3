"""Holds the package to the import rules written in docs/architecture.md, which this test reads:
there is no second copy of them.

A rule is a line `who -> what` with an optional `never what`, in the block below "Who may import
whom". `who` is modules (`sft`, `models.processor`), rooms (`rl`: everything below mmrecoder_jax/rl)
or `leaves`; the most exact rule for a module is the one that counts. `what` is the same, or
`anything`, or packages as they are imported. A rule that names a package allows no others; the
standard library and a room's own modules are always allowed.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mmrecoder_jax"
ROOMS = tuple(
    ".".join(path.relative_to(PACKAGE).parts)
    for path in sorted(PACKAGE.rglob("*"))
    if path.is_dir() and path.name != "__pycache__"
)


class Rules:
    """The rules of one architecture page; `check` lists what a module's source breaks."""

    def __init__(self, page):
        block = re.search(r"## Who may import whom.*?```\n(.*?)```", page, re.S)
        assert block, 'docs/architecture.md has no block below "Who may import whom"'
        self.leaves = []
        self.rules = {}  # who -> (allowed words, forbidden words)
        for line in block.group(1).splitlines():
            if line.strip().startswith("leaves:"):
                self.leaves = line.partition(":")[2].split()
                continue
            who, arrow, what = line.partition("->")
            assert arrow, (
                f"docs/architecture.md: not a rule (`who -> what` or `leaves: names`): {line!r}"
            )
            allowed, _, forbidden = re.sub(r"\bnever\b", "\0", what).partition("\0")
            for name in who.split():
                assert name not in self.rules, f"docs/architecture.md has two rules for {name}"
                self.rules[name] = (self._words(allowed), self._words(forbidden))

    def _words(self, text):
        return {word for word in re.split(r"[\s,]+", text) if word}

    def rule_of(self, module):
        """The rule for `rl.judge.base`: its own, else that of the nearest folder that has one
        (`rl.judge`, then `rl`), else that of the leaves; None when it has no place in the picture.
        """
        for name in prefixes(module):
            if name in self.rules:
                return self.rules[name]
        if not set(prefixes(module)).isdisjoint(self.leaves):
            return self.rules["leaves"]
        return None

    def room_of(self, module):
        """The nearest folder with a rule or among the leaves; None for a file at the top."""
        homes = [name for name in prefixes(module) if name in ROOMS]
        return next((name for name in homes if name in self.rules or name in self.leaves), None)

    def _holds(self, words, target):
        """Whether `data.batching` or `jax.numpy` is one of the words or below one.

        A folder with a rule of its own (`env.child`) is not meant by the folder above (`env`).
        """
        words = (words - {"leaves"}) | (set(self.leaves) if "leaves" in words else set())
        for name in prefixes(target):
            if name in words:
                return True
            if name in self.rules and name in ROOMS:
                return False
        return False

    def check(self, module, source):
        rule = self.rule_of(module)
        if rule is None:
            return [
                f"{module} has no place in docs/architecture.md: add it to a rule or to the leaves"
            ]
        allowed, forbidden = rule
        inside, outside = imports(module, source)
        own_room = None if module in self.rules else self.room_of(module)
        packages = {word for word in allowed if not self._is_ours(word)}
        wrong = []
        for target in sorted(inside):
            own = own_room is not None and self.room_of(target) == own_room
            permitted = self._holds(allowed, target) or "anything" in allowed or own
            if not permitted or self._holds(forbidden, target):
                wrong.append(f"{module} imports mmrecoder_jax.{target}")
        for target in sorted(outside):
            permitted = not packages or "anything" in allowed or self._holds(packages, target)
            if not permitted or self._holds(forbidden, target):
                wrong.append(f"{module} imports {target}")
        return wrong

    def _is_ours(self, word):
        return (
            word in ("anything", "leaves", *ROOMS, *self.leaves, *self.rules)
            or word.split(".")[0] in ROOMS
        )


def prefixes(name):
    """`env.child.capture` -> itself, `env.child`, `env`."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def imports(module, source):
    """What a module imports: (names below mmrecoder_jax, packages outside the standard library),
    wherever in the file it does so.
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = ["mmrecoder_jax", *module.split(".")][: -node.level]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            # `from mmrecoder_jax.data import batching` names a module, `from
            # mmrecoder_jax.data.batching import Piece` does not
            names |= {
                f"{base}.{alias.name}" if is_module(f"{base}.{alias.name}") else base
                for alias in node.names
            }
    inside = {
        name.removeprefix("mmrecoder_jax").lstrip(".")
        for name in names
        if name.split(".")[0] == "mmrecoder_jax"
    }
    outside = {
        name
        for name in names
        if name.split(".")[0] not in ("mmrecoder_jax", *sys.stdlib_module_names)
    }
    return inside, outside


def is_module(name):
    path = ROOT.joinpath(*name.split("."))
    return name.startswith("mmrecoder_jax.") and (path.is_dir() or path.with_suffix(".py").exists())


def modules():
    """(`rl.losses`, path) of every module but the package's own `__init__`."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if name != "__init__":
            yield name, path


def test_every_module_keeps_to_the_import_rules():
    rules = Rules((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))
    found = [
        wrong
        for name, path in modules()
        for wrong in rules.check(name, path.read_text(encoding="utf-8"))
    ]
    assert not found, "against docs/architecture.md:\n" + "\n".join(found)


def test_the_package_itself_imports_nothing():
    assert imports("__init__", (PACKAGE / "__init__.py").read_text(encoding="utf-8")) == (
        set(),
        set(),
    )


def test_no_import_circle():
    """Not even one hidden in a function: what a module imports never leads back to it."""
    graph = {
        name.removesuffix(".__init__"): imports(name, path.read_text(encoding="utf-8"))[0]
        for name, path in modules()
    }

    def reached(start):
        found, waiting = set(), list(graph[start])
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                waiting += graph.get(name, ())
        return found

    assert [name for name in graph if name in reached(name)] == []


PAGE = """
## Who may import whom
```
train         -> anything
  sft         -> rl, data, leaves
    rl        -> data.batching, leaves
    data      -> models.processor, env         never jax
    models    -> jax, numpy
    models.processor -> models.config, numpy
    env       -> numpy                         never pandas
    env.child -> env.wire, matplotlib
    leaves    -> leaves
  leaves: config monitoring
```
"""


@pytest.mark.parametrize(
    "module, source, wrong",
    [
        ("train", "import mmrecoder_jax.rl.losses, jax", []),
        ("sft", "from mmrecoder_jax import config\nfrom mmrecoder_jax.rl.losses import x", []),
        ("sft", "from mmrecoder_jax import grpo", ["mmrecoder_jax.grpo"]),
        (
            "rl.losses",
            "from mmrecoder_jax.data.batching import x\nimport mmrecoder_jax.rl.sampler",
            [],
        ),
        ("rl.losses", "from mmrecoder_jax.rl.judge import base", []),
        ("rl.judge.base", "from mmrecoder_jax.rl import losses", []),
        ("rl.losses", "from mmrecoder_jax.data import sources", ["mmrecoder_jax.data.sources"]),
        ("rl.losses", "from ..data import batching, sources", ["mmrecoder_jax.data.sources"]),
        ("rl.losses", "import mmrecoder_jax.sft", ["mmrecoder_jax.sft"]),
        (
            "data.sources",
            "from mmrecoder_jax.env import x\nimport grain\nfrom . import synthetic",
            [],
        ),
        ("data.sources", "def f():\n    import jax.numpy as jnp", ["jax.numpy"]),
        ("data.sources", "from jax import numpy", ["jax"]),
        (
            "models.vision",
            "import os\nimport jax.numpy\nfrom mmrecoder_jax.models.config import x",
            [],
        ),
        ("models.vision", "import torch", ["torch"]),
        ("models.processor", "import numpy\nfrom mmrecoder_jax.models.config import x", []),
        (
            "models.processor",
            "import jax\nfrom mmrecoder_jax.models import vision",
            ["mmrecoder_jax.models.vision", "jax"],
        ),
        ("env.pool", "if False:\n    import jax\nimport numpy.linalg, pandas", ["jax", "pandas"]),
        ("env.pool", "from mmrecoder_jax.models.config import x", ["mmrecoder_jax.models.config"]),
        (
            "env.pool",
            "from mmrecoder_jax.env.child import capture",
            ["mmrecoder_jax.env.child.capture"],
        ),
        ("env.child.capture", "from mmrecoder_jax.env import wire\nimport matplotlib", []),
        ("env.child.capture", "from mmrecoder_jax.env.child import recorder", []),
        ("env.child.capture", "from mmrecoder_jax.env import pool", ["mmrecoder_jax.env.pool"]),
        ("env.__init__", "from .pool import ExecutorPool", []),
        ("data.sources", "from mmrecoder_jax.env.child import x", ["mmrecoder_jax.env.child"]),
        ("monitoring.metrics", "from mmrecoder_jax.monitoring.progress import bar", []),
        ("config", "from mmrecoder_jax.models import config", ["mmrecoder_jax.models.config"]),
    ],
)
def test_the_checker_finds_what_breaks_a_rule(module, source, wrong):
    assert Rules(PAGE).check(module, source) == [f"{module} imports {name}" for name in wrong]


def test_the_checker_finds_a_module_without_a_place():
    assert "has no place" in Rules(PAGE).check("helpers", "")[0]


@pytest.mark.parametrize(
    "module",
    [
        "mmrecoder_jax",
        "mmrecoder_jax.env",
        "mmrecoder_jax.models.processor",
        "mmrecoder_jax.monitoring.progress",
    ],
)
def test_importing_starts_no_jax(module):
    code = (
        f"import sys, {module}\n"
        "loaded = {name.split('.')[0] for name in sys.modules} & {'jax', 'jaxlib', 'flax'}\n"
        "sys.exit(sorted(loaded) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
