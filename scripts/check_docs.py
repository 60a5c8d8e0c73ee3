"""Checks what the pages tell people to type: programs, flags, fields, extras, imports, links.

    python scripts/check_docs.py          a line for each mistake; exit status 1 where there is one
    python scripts/check_docs.py --run    asks each of our programs for its flags (--help) as well

Commands are read from fenced blocks and from `code` in the text; `check_commands` says what is
looked up.
"""

import argparse
import ast
import dataclasses
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from check_commands import (
    FOREIGN,
    OURS,
    ROOT,
    check_command,
    flags_in,
    module_file,
    program_name,
    simple_commands,
)

PAGES = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
)


@dataclasses.dataclass(frozen=True)
class Mistake:
    """What is wrong at a line of a page."""

    page: str
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.what}"


def check_page(page: Path) -> Iterator[Mistake]:
    """All mistakes of a page."""
    name, text = _named(page), page.read_text(encoding="utf-8")
    for line, command in commands(text):
        for words in simple_commands(command):
            yield from (Mistake(name, line, what) for what in check_command(words))
    for line, source in python_blocks(text):
        yield from (Mistake(name, line, what) for what in check_python(source))
    yield from (Mistake(name, line, what) for line, what in check_links(page, text))


def _named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name


# ---------------------------------------------------------------- reading a page


def _blocks(text: str) -> Iterator[tuple[int, str, str]]:
    """(first line, language, content) of each fenced block."""
    for match in re.finditer(r"^ *```(\w*)\n(.*?)^ *```", text, re.M | re.S):
        yield text[: match.start()].count("\n") + 2, match[1], textwrap.dedent(match[2])


def _without_blocks(text: str) -> str:
    """The text with blank lines in place of its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```", lambda m: "\n" * m[0].count("\n"), text, flags=re.M | re.S)


def commands(text: str) -> Iterator[tuple[int, str]]:
    """(line, command) of everything on a page that is a command, or the flags of one."""
    for start, language, block in _blocks(text):
        if language not in ("", "sh", "bash", "console"):
            continue
        lines = block.splitlines()
        at = 0
        while at < len(lines):
            first, command = at, lines[at].strip().removeprefix("$ ")
            while command.endswith("\\") and at + 1 < len(lines):
                at += 1
                command = command[:-1] + lines[at].strip()
            if _is_command(command):
                yield start + first, command
            at += 1
    for match in re.finditer(r"(?<!`)`([^`]+)`(?!`)", plain := _without_blocks(text)):
        command = " ".join(match[1].split())
        if _is_command(command) or command.startswith("--"):
            yield plain[: match.start()].count("\n") + 1, command


def _is_command(text: str) -> bool:
    words = re.sub(r"^([A-Z_]+=\S* )+", "", text).split()
    return len(words) > 1 and (program_name(words[0]) in OURS | FOREIGN)


def python_blocks(text: str) -> Iterator[tuple[int, str]]:
    """(line, source) of each block of Python."""
    return ((start, block) for start, language, block in _blocks(text) if language == "python")


# ---------------------------------------------------------------- Python and links


def check_python(source: str) -> Iterator[str]:
    """What is wrong with a block of Python: its syntax, or an import of ours."""
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        yield f"Python: {error}"
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mmrecoder_jax"):
            package = ROOT.joinpath(*str(node.module).split(".")) / "__init__.py"
            path = module_file(str(node.module)) or (package if package.is_file() else None)
            if path is None:
                yield f"no such module: {node.module}"
                continue
            text = path.read_text(encoding="utf-8")
            for alias in node.names:
                inner = module_file(f"{node.module}.{alias.name}")
                if inner is None and not re.search(rf"\b{alias.name}\b", text):
                    yield f"{node.module} has no {alias.name}"


def check_links(page: Path, text: str) -> Iterator[tuple[int, str]]:
    """Links of a page that lead nowhere, or out of what the site is made of."""
    plain = _without_blocks(text)
    for match in re.finditer(r"\]\(([^)\s]+)\)", plain):
        target, _, anchor = match[1].partition("#")
        line = plain[: match.start()].count("\n") + 1
        if ":" in target:
            continue
        path = (page.parent / target) if target else page
        if not path.exists():
            yield line, f"no such file: {match[1]}"
        elif page.parent.name == "docs" and not path.resolve().is_relative_to(
            page.parent.resolve()
        ):
            yield line, f"{target} is outside docs/, which the site is made of: name it as text"
        elif anchor and path.suffix == ".md" and anchor not in anchors(path):
            yield line, f"no such heading: {match[1]}"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", _without_blocks(page.read_text(encoding="utf-8")), re.M)
    plain = (re.sub(r"[`*]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading)) for heading in plain}


# ---------------------------------------------------------------- the real programs


def programs() -> dict[str, set[str]]:
    """The flags that the pages use of each of our programs, without fields."""
    used: dict[str, set[str]] = {}
    for page in PAGES:
        for _, command in commands(page.read_text(encoding="utf-8")):
            for words in simple_commands(command):
                if words and program_name(words[0]).startswith("python") and len(words) > 1:
                    ours = words[1] == "-m" and words[2].startswith("mmrecoder_jax.")
                    name = words[2] if ours else words[1]
                    if ours or name.startswith("scripts/"):
                        flags = {name for name, _ in flags_in(words)}
                        used.setdefault(name, set()).update(
                            flag for flag in flags if not flag.startswith("config.")
                        )
    return used


def ask(program: str, flags: set[str]) -> Iterator[str]:
    """Runs `PROGRAM --helpfull` (or --help) and looks for the flags.

    With a configuration, `evaluate` is another command than without.
    """
    command = ["-m", program] if program.startswith("mmrecoder_jax.") else [str(ROOT / program)]
    asked = [["--helpfull"], ["--help"]]
    if program == "mmrecoder_jax.evaluate":
        asked.append(["--config=evaluate:tiny", "--helpfull"])
    shown = ""
    for words in asked:
        done = subprocess.run(
            [sys.executable, *command, *words],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        shown += done.stdout
    for flag in sorted(flags):
        if not re.search(rf"--(\[no\])?{re.escape(flag)}\b", shown):
            yield f"{program} --help does not name --{flag}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--run", action="store_true", help="asks each program for its flags too")
    arguments = parser.parse_args()
    mistakes = [str(mistake) for page in PAGES for mistake in check_page(page)]
    if arguments.run:
        for program, flags in sorted(programs().items()):
            mistakes += ask(program, flags)
    print("\n".join(mistakes) if mistakes else f"{len(PAGES)} pages: all commands and links exist")
    sys.exit(bool(mistakes))


if __name__ == "__main__":
    main()
