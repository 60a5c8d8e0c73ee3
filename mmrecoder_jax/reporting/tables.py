"""One table of results, as text for the terminal, as HTML for the page, and as Markdown.

A row maps column names to cells; a column that a row does not have is shown as a dash, and in
Markdown as an empty cell.
"""

from collections.abc import Mapping, Sequence

from mmrecoder_jax.reporting.escape import escape

Row = Mapping[str, str | int]


def format_table(rows: Sequence[Row]) -> str:
    """Aligned text; a column with numbers goes to the right.

    after         turn  exec
    cold start 1     1  97.0
    cold start 1     2  -
    """
    columns = column_names(rows)
    # Results come as text, percent with their interval; counts alone are numbers.
    texts = [[_cell(row, name) for name in columns] for row in rows]
    to_right = [any(isinstance(row.get(name), int) for row in rows) for name in columns]
    widths = [max(map(len, column)) for column in zip(columns, *texts, strict=True)]
    lines = []
    for line in (columns, *texts):
        cells = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, to_right, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def table_html(rows: Sequence[Row]) -> str:
    """The same table as HTML; its first column stays in view when the rest is scrolled."""
    columns = column_names(rows)
    heads = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = []
    for row in rows:
        cells = ""
        for i, name in enumerate(columns):
            tag = "td" if i else "th"
            style = ' class="words"' if isinstance(row.get(name), str) else ""
            cells += f"<{tag}{style}>{escape(_cell(row, name))}</{tag}>"
        body.append(f"<tr>{cells}</tr>")
    return (
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def table_markdown(rows: Sequence[Row]) -> str:
    """The same table as Markdown."""
    columns = column_names(rows)
    cells = [[str(row.get(name, "")) for name in columns] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def column_names(rows: Sequence[Row]) -> list[str]:
    """All columns that any row has, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _cell(row: Row, name: str) -> str:
    return str(row[name]) if name in row else "-"
