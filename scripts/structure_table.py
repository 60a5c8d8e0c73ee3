"""Measures the structure of a checkout, or of two side by side, and prints a Markdown table.

    python scripts/structure_table.py .
    python scripts/structure_table.py BEFORE_DIR . --write docs/architecture.md

The sources are parsed, never imported, so any version can be measured. With `--write` the table
replaces what is between `<!-- structure table -->` and `<!-- end -->` in a file.

What the rows count, in the package `mmrecoder_jax` unless said otherwise:

    lines           of a file, blank ones and docstrings included
    comments        lines with a comment, per 100 lines of code (neither blank nor only a comment
                    nor inside a docstring)
    tests           lines below tests/ divided by lines of the package
    a GRPO step     files of the functions and classes that the loop of `grpo.train` names, and
                    grpo.py itself; what those call in turn is not counted
    import circles  groups of modules that import each other, wherever in a file they do so
"""

import argparse
import ast
import io
import math
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

PACKAGE = "mmrecoder_jax"
COLUMNS = 100
BEGIN, END = "<!-- structure table -->", "<!-- end -->"

Graph = Mapping[str, set[str]]


def sources(folder: Path) -> dict[Path, str]:
    """Path -> text of every Python file below a folder."""
    return {path: path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py"))}


def measure(checkout: Path) -> dict[str, str]:
    """The rows of the table for one checkout."""
    package = sources(checkout / PACKAGE)
    if not package:
        raise FileNotFoundError(f"{checkout}: no checkout, it has no Python files in {PACKAGE}/")
    sizes = sorted(len(text.splitlines()) for text in package.values())
    lines = [line for text in package.values() for line in text.splitlines()]
    long = sum(len(line) > COLUMNS for line in lines)
    comments, code = map(sum, zip(*map(comments_and_code, package.values()), strict=True))
    tests = sum(len(text.splitlines()) for text in sources(checkout / "tests").values())
    modules = {module_name(path, checkout): text for path, text in package.items()}
    step = step_files(modules)
    circles = [" ".join(sorted(circle)) for circle in import_circles(import_graph(modules))]
    return {
        "files": str(len(sizes)),
        "lines per file: median / p90 / longest": " / ".join(
            str(quantile(sizes, share)) for share in (0.5, 0.9, 1.0)
        ),
        f"lines over {COLUMNS} columns": f"{100 * long / len(lines):.1f} %",
        "comments per 100 lines of code": f"{100 * comments / code:.1f}",
        "lines of tests per line of source": f"{tests / sum(sizes):.2f}",
        "files that a GRPO step names": f"{len(step)}: {', '.join(sorted(step))}",
        "import circles": f"{len(circles)}: {'; '.join(circles)}" if circles else "0",
    }


def quantile(ordered: Sequence[int], share: float) -> int:
    """The smallest value that at least this share of the values does not exceed.

    >>> quantile([1, 2, 3, 4], 0.5), quantile([1, 2, 3, 4], 0.9)
    (2, 4)
    """
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)]


def comments_and_code(text: str) -> tuple[int, int]:
    """(lines with a comment, lines of code) of one file."""
    comments: set[int] = set()
    code: set[int] = set()
    skipped = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.type not in skipped:
            code.update(range(token.start[0], token.end[0] + 1))
    return len(comments), len(code - docstring_lines(ast.parse(text)))


def docstring_lines(tree: ast.Module) -> set[int]:
    """Numbers of the lines that docstrings take."""
    found: set[int] = set()
    for node in ast.walk(tree):
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            statement = node.body[0]
            assert statement.end_lineno is not None, "parsed from text, so lines are known"
            found.update(range(statement.lineno, statement.end_lineno + 1))
    return found


def module_name(path: Path, checkout: Path) -> str:
    """`mmrecoder_jax/rl/losses.py` -> `rl.losses`; a room is its `__init__.py`: `rl`."""
    parts = path.relative_to(checkout / PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph(modules: Mapping[str, str]) -> Graph:
    """Module -> modules of the package that it imports, at its head or inside a function."""
    return {
        name: {target for _, target in imported_names(ast.parse(text), modules)} - {name}
        for name, text in modules.items()
    }


def imported_names(tree: ast.AST, modules: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(name in the file, module of the package that it comes from) of every import."""
    known = set(modules)

    def module_of(dotted: str) -> str | None:
        """The module that `mmrecoder_jax.rl.losses` or `mmrecoder_jax.rl.losses.sft_loss` is in."""
        if dotted.split(".")[0] != PACKAGE:
            return None
        name = dotted.removeprefix(PACKAGE).lstrip(".")
        return name if name in known else name.rpartition(".")[0]

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [(alias.asname or alias.name, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found = [(a.asname or a.name, f"{node.module}.{a.name}") for a in node.names]
        else:
            continue
        for name, dotted in found:
            target = module_of(dotted)
            if target in known and target:
                yield name, target


def import_circles(graph: Graph) -> list[set[str]]:
    """Groups of modules that reach each other by imports."""
    reached = {name: _reachable(graph, name) for name in graph}
    circles = []
    for name, found in reached.items():
        circle = {other for other in found if name in reached[other]}
        if circle and circle not in circles:
            circles.append(circle)
    return circles


def _reachable(graph: Graph, start: str) -> set[str]:
    """Modules that `start` imports, directly or not; itself only where a circle leads back."""
    found: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += graph[name]
    return found


def step_files(modules: Mapping[str, str]) -> set[str]:
    """Modules that a reader of one GRPO step is sent to by the names in its loop."""
    tree = ast.parse(modules["grpo"])
    imports = dict(imported_names(tree, modules))
    train = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "train")
    loop = next(n for n in ast.walk(train) if isinstance(n, ast.For))
    names = {
        n.id for statement in loop.body for n in ast.walk(statement) if isinstance(n, ast.Name)
    }
    return {"grpo"} | {imports[name] for name in names if name in imports}


def table(columns: Mapping[str, Mapping[str, str]]) -> str:
    """Markdown; a column per checkout."""
    rows = next(iter(columns.values()))
    lines = [["", *columns], ["---"] * (1 + len(columns))]
    lines += [[name, *(column[name] for column in columns.values())] for name in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write_between(path: Path, text: str) -> None:
    """Puts text between the marks of a file."""
    page = path.read_text(encoding="utf-8")
    parts = re.split(f"({BEGIN}\n|{END})", page)
    if len(parts) < 5 or parts[1] != f"{BEGIN}\n" or parts[3] != END:
        raise ValueError(f"{path} needs a line {BEGIN} and below it a line {END}")
    parts[2] = text + "\n"
    path.write_text("".join(parts), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkouts", type=Path, nargs="+", help="one, or two: before and after")
    parser.add_argument(
        "--write", type=Path, help="file with the marks that the table goes between"
    )
    arguments = parser.parse_args()
    if len(arguments.checkouts) > 2:
        parser.error("give one checkout, or two: before and after")
    heads = ["now"] if len(arguments.checkouts) == 1 else ["before", "after"]
    try:
        found = table(dict(zip(heads, map(measure, arguments.checkouts), strict=True)))
        print(found)
        if arguments.write:
            write_between(arguments.write, found)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
