"""Example scripts of plotting libraries -> charts: real code that nobody wrote for a benchmark.

A gallery script is a tutorial: a docstring, cells of code between `# %%` lines, and often several
figures. Each cell that draws becomes a chart of its own. Its code is tried in two forms
(`cell_codes`): the cell with only those earlier lines that it needs, and, where that does not draw,
the whole script up to the cell's end:

    x = np.arange(5)             cell 2 alone             cell 2 so far
    fig, ax = plt.subplots()         x = np.arange(5)         x = np.arange(5)
    ax.plot(x)                       ax = plt.axes()          fig, ax = plt.subplots()
    # %%                             ax.bar(x, x)             ax.plot(x)
    ax = plt.axes()                                           ax = plt.axes()
    ax.bar(x, x)                                              ax.bar(x, x)

Comments and docstrings go: they describe the library, not the picture.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

from mmrecoder_jax.data.benchmarks import RawChart, Skipped
from mmrecoder_jax.data.rows import hashed_name, read_script, slug

_CELL = re.compile(r"^(?:# ?%%.*|#{20,} *)$", re.MULTILINE)

# What cannot be a still picture drawn offline: a reason, and what it looks like in the code.
_UNFIT = (
    (
        "needs data from the network",
        re.compile(r"load_dataset\(|\burllib\b|\brequests\.get|https?://\S+\.(?:csv|png)['\"]"),
    ),
    (
        "is an animation",
        re.compile(
            r"matplotlib\.animation|matplotlib import animation|FuncAnimation|ArtistAnimation"
        ),
    ),
    (
        "needs a window",
        re.compile(
            r"backends\.backend_(?!agg|pdf|svg|ps|pgf)\w|matplotlib\.widgets|\bginput\("
            r"|waitforbuttonpress|\binput\("
        ),
    ),
    (
        "needs a window",
        re.compile(
            r"^\s*(?:import|from) (?:tkinter|wx|gi|PyQt\w*|PySide\w*|kivy|pygame)\b", re.MULTILINE
        ),
    ),
    ("needs TeX", re.compile(r"usetex['\"]?\]? ?[=:] ?True|backend_pgf|use\(['\"]pgf['\"]\)")),
)

# Names under which gallery scripts hold figures: a line that touches one is not copied into a cell,
# it belongs to another picture.
_FIGURE_NAME = re.compile(r"plt|pylab|sns|fig\w*|axs?|axes|ax\d+|ax_\w+|subfigs?|g")
_DEFINITIONS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
_STATE_CALLS = re.compile(
    r"(?:np|numpy)\.random\.seed|random\.seed|plt\.style\.use|sns\.set_\w+|sns\.set"
)


def gallery_charts(root: Path, label: str, licence: str) -> Iterator[RawChart | Skipped]:
    """A raw chart per cell of each script below `root`, in order, or why a script was left out.

    Args:
      label: the start of each `source`, such as "matplotlib-3.8.4/galleries".
      licence: goes into every chart.
    """
    names = set()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        source = f"{label}/{name}"
        cells: list[tuple[str, ...]] = []
        try:
            text = read_script(path)
            reason = unfit(text)
            cells = [] if reason else cell_codes(text)
        except SyntaxError as error:
            reason = f"is no Python: {error.msg}"
        except (ValueError, RecursionError, MemoryError) as error:  # a NUL, brackets without end
            reason = f"is no Python: {error}"
        if reason:
            yield Skipped(source, reason)
            continue
        for number, codes in enumerate(cells, start=1):
            identity = f"{label}-{name.with_suffix('')}-{number:02d}"
            chart = slug(identity)
            if chart in names:  # of "a/b.py" and "a_b.py" the second gets a hash
                chart = hashed_name(identity)
            names.add(chart)
            yield RawChart(
                chart,
                codes,
                None,
                f"{source}#{number}",
                licence,
            )


def unfit(text: str) -> str | None:
    """Why a script cannot become a chart, judging by its text; None where it may."""
    return next((reason for reason, pattern in _UNFIT if pattern.search(text)), None)


def cell_codes(text: str) -> list[tuple[str, ...]]:
    """The forms of a script that draws a cell, best first, for each cell with code.

    Raises:
      SyntaxError: `text` is no Python.
    """
    cells = [_clean(cell) for cell in _CELL.split(_without_docstring(text))]
    cells = [cell for cell in cells if cell]
    if not all(map(_parses, cells)):  # a marker inside a block: not cells
        cells = [_clean(_without_docstring(text))]
        ast.parse(cells[0])
    codes: list[tuple[str, ...]] = []
    for number, cell in enumerate(cells):
        so_far = "\n\n".join(cells[: number + 1])
        alone = standalone(cells[:number], cell)
        codes.append((so_far,) if alone is None or alone == so_far else (alone, so_far))
    return codes


def standalone(earlier: list[str], cell: str) -> str | None:
    """`cell` after those statements of earlier cells that bind the names it uses.

    Statements are looked at from the last to the first, as each may need names of its own.

    Returns:
      None where one of them belongs to a figure, so that the cell draws on an earlier picture.
    """
    needed = _free_names(ast.parse(cell))
    kept = []
    for text in reversed(earlier):
        for node in reversed(ast.parse(text).body):
            source = _source(text, node)
            bound = _bound_names(node)
            if not bound & needed and not _STATE_CALLS.match(source):
                continue
            harmless = isinstance(node, _DEFINITIONS) or _STATE_CALLS.match(source)
            names = _used_names(node) | bound
            if not harmless and any(map(_FIGURE_NAME.fullmatch, names)):
                return None
            if isinstance(node, ast.Assign):
                needed -= {target.id for target in node.targets if isinstance(target, ast.Name)}
            needed |= _used_names(node)
            kept.append(source)
    return "\n".join([*reversed(kept), "", cell] if kept else [cell])


def _free_names(tree: ast.Module) -> set[str]:
    """Names that a cell uses before any statement of its own binds them."""
    free: set[str] = set()
    bound: set[str] = set()
    for node in tree.body:
        stores = _stored_names(node)
        # A loop binds its variables before its body uses them; an assignment binds afterwards.
        inside = set() if isinstance(node, ast.Assign | ast.AugAssign) else stores
        free |= _used_names(node) - bound - inside
        bound |= stores | (_bound_names(node) if isinstance(node, _DEFINITIONS) else set())
    return free


def _bound_names(node: ast.stmt) -> set[str]:
    """Names that a statement binds or, by the look of it, changes.

    `x = 1`, `x[0] = 1`, `x.append(1)`, `def x`, `import x` all give {"x"}.
    """
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    names = _stored_names(node)
    for child in ast.walk(node):
        changed: ast.expr | None = None
        if isinstance(child, ast.Subscript | ast.Attribute) and isinstance(child.ctx, ast.Store):
            changed = child.value
        elif isinstance(child, ast.Expr) and isinstance(child.value, ast.Call):
            changed = child.value.func
        while isinstance(changed, ast.Attribute | ast.Subscript):
            changed = changed.value
        if isinstance(changed, ast.Name):
            names.add(changed.id)
    return names


def _stored_names(tree: ast.AST) -> set[str]:
    return {
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }


def _used_names(tree: ast.AST) -> set[str]:
    return {
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Store)
    }


def _source(text: str, node: ast.stmt) -> str:
    """The lines of a statement, its decorators included (its own line is that of `def`)."""
    decorators = node.decorator_list if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
    return "\n".join(text.splitlines()[first - 1 : node.end_lineno])


def _parses(code: str) -> bool:
    try:
        ast.parse(code)
    except SyntaxError:
        return False
    return True


def _without_docstring(text: str) -> str:
    body = ast.parse(text).body
    if not body or not isinstance(body[0], ast.Expr) or not isinstance(body[0].value, ast.Constant):
        return text
    return "\n".join(text.splitlines()[body[0].end_lineno :])


def _clean(code: str) -> str:
    """`code` without comments and runs of empty lines.

    Strings stay as they are, and so does code that cannot be tokenized.
    """
    lines = code.splitlines()
    inside: set[int] = set()  # lines of strings
    bare: set[int] = set()  # lines that were a comment
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(code + "\n").readline))
    except (tokenize.TokenError, SyntaxError):
        return code
    for token in tokens:
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column].rstrip()
            if not lines[row - 1]:
                bare.add(row)
        elif token.type == tokenize.STRING:
            inside.update(range(token.start[0], token.end[0] + 1))
    out: list[str] = []
    for number, line in enumerate(lines, start=1):
        if line.strip() or number in inside or (number not in bare and out and out[-1].strip()):
            out.append(line)
    return "\n".join(out).strip("\n")
