"""What the pages name exists: modules, files, fields of configurations. Commands and links:
scripts/check_docs.py.
"""

import re
import textwrap
from pathlib import Path

import pytest
import yaml

from mmrecoder_jax.config import STAGES, field_names, load

ROOT = Path(__file__).parents[1]
ARCHITECTURE = ROOT / "docs" / "architecture.md"  # it also names files that are gone
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("mmrecoder_jax", "configs", "docs", "examples", "scripts", "tests")
FOREIGN = {
    *("script.py", "direct_600/<type>_<n>.py"),  # any script; files of a published data set
    # what `generate` writes
    *("chart.py", "final.py", "chart/final.py", "turn-1.py", "chart/turn-1.py"),
    "chart/sample-2/turn-1.py",
}
PLACES = ("", *(f"{path.name}." for path in (ROOT / "mmrecoder_jax").iterdir() if path.is_dir()))
FILES = {path.relative_to(ROOT).as_posix() for name in FOLDERS for path in (ROOT / name).rglob("*")}


def named(path):
    return path.relative_to(ROOT).as_posix()


def missing_module(dotted):
    """Whether `mmrecoder_jax.rl.losses.grpo_loss` has a part that does not exist: neither a module
    nor, as the last part, a name that the module before it defines.
    """
    path, parts = ROOT, dotted.split(".")
    while parts and (path / parts[0]).is_dir():
        path = path / parts.pop(0)
    if len(parts) == 1 and path != ROOT and defines(path / "__init__.py", parts[0]):
        parts = []
    if parts and (path / f"{parts[0]}.py").is_file():
        source = path / f"{parts.pop(0)}.py"
        if parts and defines(source, parts[0]):
            parts = parts[2:]  # a class's own attribute is not looked up
    return bool(parts)


def defines(path, name):
    """Whether a file of Python defines a name, at its top or in a class."""
    source = path.read_text(encoding="utf-8") if path.is_file() else ""
    return bool(re.search(rf"\b(def|class) {name}\b|^{name}\b.*=", source, re.M))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_modules(page):
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"\b(?:mmrecoder_jax|tests)(?:\.[a-zA-Z_]\w*)+", text)
    assert not [name for name in found if missing_module(name)]


@pytest.mark.parametrize("page", [p for p in PAGES if p != ARCHITECTURE], ids=named)
def test_files(page):
    """A Python file is named by the end of its path: `rl/losses.py`, or `losses.py`. A reader
    chooses what `<name>` stands for.
    """
    text = page.read_text(encoding="utf-8")
    found = {name.lstrip("./") for name in re.findall(r"[\w*./<>-]+\.py\b", text)} - FOREIGN
    patterns = {name: re.sub(r"<\w+>", "*", name) for name in found}
    wrong = [n for n, pattern in patterns.items() if not any(Path(f).match(pattern) for f in FILES)]
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_fields(page):
    """`section.field` in backticks, and the flags of commands."""
    configs = [load(name, None) for name in (*STAGES, "pipeline", "evaluate")]
    fields = {field for config in configs for field in field_names(config)}
    sections = {field.split(".")[0] for field in fields if "." in field}
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"--config\.([\w.]+)", text)
    found += [name for name in re.findall(r"`([a-z_]+\.\w+)[=` ]", text)]
    wrong = [
        name
        for name in found
        if name not in fields
        and name.split(".")[0] in sections
        and all(missing_module(f"mmrecoder_jax.{place}{name}") for place in PLACES)
        and not name.endswith((".py", ".md", ".json", ".jsonl"))
    ]
    assert not wrong


def test_letters():
    """The letters of dimensions are copied from their home."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = re.search(r"## Letters of dimensions\n.*?```\n(.*?)```", page, re.S)
    home = (ROOT / "mmrecoder_jax" / "models" / "config.py").read_text(encoding="utf-8")
    assert block and textwrap.indent(block.group(1), "    ") in home


def test_citation():
    """What the format (1.2.0) wants at least, for the software and for the paper."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    (paper,) = citation["references"]
    assert {"type", "title", "authors"} <= set(paper) and "2604.01600" in paper["url"]
