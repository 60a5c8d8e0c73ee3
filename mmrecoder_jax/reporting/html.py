"""A run as one HTML file: tables, pictures (the curves of `curves`), and a gallery of trajectories
with their renders and code.

The file is complete in itself: images are data URIs, the style sheet and the filter script are
inline, nothing is loaded. It follows the reader's light or dark setting and fits a phone.
Everything a model wrote (responses, code, errors) is escaped, control and direction-changing
characters are shown as `\\u202e`, and a content security policy allows our own script and no other.
Renders arrive as pixel arrays and are encoded here (`png_bytes`), so that no file a model wrote is
passed on.

    write_report("report.html", title="MM-ReCoder, tiny", banner="a tiny model ...", facts={"seed":
    0}, sections=[
        Section("Results", summary_table_html(rows)),
        Section("Curves", figure_html(metrics_curves(read_metrics(path), "stage1"), "stage1")),
        Section("Held-out charts", trajectory_gallery_html(views, "Held-out charts")),
    ])
"""

import base64
import dataclasses
import datetime
import difflib
import hashlib
import html
import io
import itertools
import math
import numbers
import os
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Cell = Any  # str, int, float, None, or (value, low, high): a number with its interval

MAX_CHARS = 20_000  # of a response or an error that a page shows
MAX_LINES = 400  # of one code listing
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


@dataclasses.dataclass(frozen=True)
class TurnView:
    """One turn: what was written, what became of it, what it earned."""

    response: str
    code: str | None  # None: the response holds no code block
    status: str  # of `env.execution.Status`; "ok" is success
    error: str  # feedback text, "" when ok
    render_png: bytes | None  # None: nothing was drawn
    # parts in [0, 1] by name; "overall" ranks the turn, without it the mean of the parts does
    scores: dict[str, float]
    reward: float | None  # None: no reward was computed

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def overall(self) -> float:
        """The number that turns are compared by; 0 for a turn without scores."""
        if "overall" in self.scores:
            return self.scores["overall"]
        return sum(self.scores.values()) / len(self.scores) if self.scores else 0.0


@dataclasses.dataclass(frozen=True)
class TrajectoryView:
    """One target chart and the turns that redraw it."""

    id: str
    target_png: bytes
    turns: list[TurnView]

    def __post_init__(self):
        if not self.target_png.startswith(PNG_MAGIC):
            raise ValueError(
                f"the target of trajectory {self.id!r} is no PNG: it starts with {self.target_png[:8]!r}"
            )
        if not self.turns:
            raise ValueError(f"trajectory {self.id!r} has no turns")

    def labels(self) -> list[str]:
        """What the filters ask for, from the first and the last turn.

        failed: some turn did not execute. improved, regressed: the first turn executed and the last
        one is better, worse (arXiv 2604.01600 counts only these as self-correction). repaired: the
        first turn did not execute and the last one did. repeated: some turn's code is that of the
        turn before.
        """
        first, last = self.turns[0], self.turns[-1]
        codes = [turn.code and turn.code.strip() for turn in self.turns]
        tests = {
            "improved": first.ok and last.overall > first.overall,
            "regressed": first.ok and last.overall < first.overall,
            "repaired": not first.ok and last.ok,
            "repeated": any(a is not None and a == b for a, b in itertools.pairwise(codes)),
            "failed": not all(turn.ok for turn in self.turns),
        }
        return [name for name, holds in tests.items() if holds]


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the report: its heading and trusted HTML, made by the functions of this module."""

    title: str
    html: str


FILTERS = {
    "improved": "first turn executes, last turn scores higher",
    "regressed": "first turn executes, last turn scores lower",
    "repaired": "first turn fails, last turn executes",
    "repeated": "a turn repeats the code of the turn before",
    "failed": "some turn does not execute",
}


def png_bytes(image: np.ndarray, max_side: int = 800) -> bytes:
    """Encodes pixels as PNG, shrunk so that no side is longer than `max_side`.

    Args:
      image: uint8 [height, width, 3].
    Raises:
      ValueError: for any other shape or type.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(
            f"an image must be uint8 [height, width, 3]; this one is {image.dtype} {list(image.shape)}"
        )
    picture = Image.fromarray(image)
    picture.thumbnail((max_side, max_side))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


# ---------------------------------------------------------------- tables


def format_table(rows: Sequence[Mapping[str, Cell]], columns: Sequence[str] | None = None) -> str:
    """Aligned text for the terminal; numbers to the right. Two columns `turn 1/exec` and `turn
    1/text` share a heading `turn 1`.

        ```
                      turn 1
        step          exec   text
        cold start 1  0.970  0.812
        ```

    Cells: text, integers, fractions (three decimals; one where the name ends in %), None (a dash),
    or (value, low, high).
    """
    columns = list(columns or _columns(rows))
    heads = [_split(name)[1] for name in columns]
    texts = [[_cell_text(row.get(name), name) for name in columns] for row in rows]
    to_right = [any(not isinstance(row.get(name), str | None) for row in rows) for name in columns]
    widths = [max(map(len, column)) for column in zip(heads, *texts, strict=True)]
    groups = []
    for group, start, end in _groups(columns):
        wide = sum(widths[start:end]) + 2 * (end - start - 1)
        widths[end - 1] += max(len(group) - wide, 0)
        groups.append(group.ljust(wide))
    lines = ["  ".join(groups)] if any(group.strip() for group in groups) else []
    for line in (heads, *texts):
        cells = zip(line, widths, to_right, strict=True)
        lines.append(
            "  ".join(
                text.rjust(width) if right else text.ljust(width) for text, width, right in cells
            )
        )
    return "\n".join(line.rstrip() for line in lines)


def summary_table_html(
    rows: Sequence[Mapping[str, Cell]], columns: Sequence[str] | None = None
) -> str:
    """The same table as HTML; intervals are set small under their number."""
    columns = list(columns or _columns(rows))
    groups = _groups(columns)
    starts = {start for _, start, _ in groups if start}  # a rule to the left of every group
    top = [
        f'<th colspan="{end - start}" class="group{_starts(start, starts)}">{_text(group)}</th>'
        for group, start, end in groups
    ]
    lines = [f"<tr>{''.join(top)}</tr>"] if any(group for group, _, _ in groups) else []
    lines.append(
        "<tr>"
        + "".join(
            f'<th class="{_starts(i, starts)}">{_text(_split(name)[1])}</th>'
            for i, name in enumerate(columns)
        )
        + "</tr>"
    )
    body = []
    for row in rows:
        cells = [
            _cell_html(row.get(name), name, "th" if i == 0 else "td", _starts(i, starts))
            for i, name in enumerate(columns)
        ]
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><thead>{"".join(lines)}</thead><tbody>{"".join(body)}</tbody></table></div>'


def _columns(rows: Sequence[Mapping[str, Cell]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _split(name: str) -> tuple[str, str]:
    """`turn 1/exec` -> group and name; `step` -> no group."""
    group, _, rest = name.rpartition("/")
    return group, rest


def _groups(columns: Sequence[str]) -> list[tuple[str, int, int]]:
    """Neighbours that share a group: (group, first column, column after the last one)."""
    found = []
    start = 0
    for group, members in itertools.groupby(columns, key=lambda name: _split(name)[0]):
        end = start + len(list(members))
        found.append((group, start, end))
        start = end
    return found


def _number(value: Any, name: str) -> str:
    value = float(value)
    if not math.isfinite(value):
        return "-"
    return f"{value:.1f}" if name.endswith("%") else f"{value:.3f}"


def _cell_text(cell: Cell, name: str) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, str):
        return cell
    if isinstance(cell, tuple):
        value, low, high = (_number(part, name) for part in cell)
        return f"{value} [{low}, {high}]"
    return str(cell) if isinstance(cell, numbers.Integral) else _number(cell, name)


def _cell_html(cell: Cell, name: str, tag: str, style: str) -> str:
    if isinstance(cell, tuple):
        value, low, high = (_number(part, name) for part in cell)
        inner = f"{value}<small>{low} … {high}</small>"
    else:
        inner = _text(_cell_text(cell, name))
    words = " words" if isinstance(cell, str) else ""
    return f'<{tag} class="{style}{words}">{inner}</{tag}>'


def _starts(column: int, starts: set[int]) -> str:
    return " starts" if column in starts else ""


def figure_html(image: bytes, caption: str) -> str:
    """A picture (the SVG of `curves`, or a PNG) with its caption."""
    return f'<figure class="curves"><figcaption>{_text(caption)}</figcaption><img src="{_data_uri(image)}" alt="{_text(caption)}"></figure>'


# ---------------------------------------------------------------- gallery


def trajectory_gallery_html(views: Sequence[TrajectoryView], title: str) -> str:
    """Trajectories one below the other, with buttons that show one kind of them: see
    `TrajectoryView.labels`.
    """
    labels = [view.labels() for view in views]
    buttons = [f'<button type="button" data-show="" aria-pressed="true">all {len(views)}</button>']
    for name, meaning in FILTERS.items():
        count = sum(name in found for found in labels)
        state = "" if count else " disabled"
        buttons.append(
            f'<button type="button" data-show="{name}" aria-pressed="false" title="{meaning}"{state}>{name} {count}</button>'
        )
    articles = "".join(
        _trajectory_html(view, found) for view, found in zip(views, labels, strict=True)
    )
    return f'<div class="gallery" aria-label="{_text(title)}"><div class="filters">{"".join(buttons)}</div>{articles}</div>'


def _trajectory_html(view: TrajectoryView, labels: Sequence[str]) -> str:
    change = view.turns[-1].overall - view.turns[0].overall
    sign = "up" if change > 0 else "down" if change < 0 else ""
    tags = "".join(f'<span class="tag {name}">{name}</span>' for name in labels)
    delta = f'<span class="delta {sign}">{change:+.3f}</span>' if len(view.turns) > 1 else ""
    pictures = [
        f'<figure><img loading="lazy" src="{_data_uri(view.target_png)}" alt="target"><figcaption><b>target</b></figcaption></figure>'
    ]
    pictures += [_render_html(turn, number) for number, turn in enumerate(view.turns, 1)]
    listings = [_turn_html(view.turns, i) for i in range(len(view.turns))]
    return (
        f'<article data-labels="{" ".join(labels)}"><header><h3>{_text(view.id)}</h3>{delta}{tags}</header>'
        f'<div class="pictures">{"".join(pictures)}</div>'
        f'<details><summary>thoughts and code</summary><div class="turns">{"".join(listings)}</div></details></article>'
    )


def _render_html(turn: TurnView, number: int) -> str:
    if turn.render_png is not None:
        picture = (
            f'<img loading="lazy" src="{_data_uri(turn.render_png)}" alt="render of turn {number}">'
        )
    else:
        reason = f"<pre>{_text(turn.error)}</pre>" if turn.error else ""
        picture = f'<div class="nothing"><b>{_text(turn.status)}</b>{reason}</div>'
    parts = " ".join(
        f"<span>{_text(name)} <b>{score:.2f}</b></span>" for name, score in turn.scores.items()
    )
    reward = "" if turn.reward is None else f"<span>reward <b>{turn.reward:.3f}</b></span>"
    return f'<figure>{picture}<figcaption><b>turn {number}</b> <span class="parts">{reward} {parts}</span></figcaption></figure>'


def _turn_html(turns: Sequence[TurnView], i: int) -> str:
    turn = turns[i]
    parts = [f"<h4>turn {i + 1}</h4>"]
    if turn.code is None:
        parts.append(
            f'<p class="missing">no code in this response:</p><pre class="thought">{_text(turn.response)}</pre>'
        )
    else:
        thought = (
            turn.response.split("```python")[0]
            .replace("<think>", "")
            .replace("</think>", "")
            .strip()
        )
        parts.append(f'<pre class="thought">{_text(thought)}</pre>' if thought else "")
        before = turns[i - 1].code if i else None
        after = turns[i + 1].code if i + 1 < len(turns) else None
        parts.append(_code_html(turn.code, before, after))
    if turn.error:
        parts.append(f'<pre class="error">{_text(turn.status)}: {_text(turn.error)}</pre>')
    return f"<div>{''.join(parts)}</div>"


def _code_html(code: str, before: str | None, after: str | None) -> str:
    """The listing of one turn: `+` marks lines that the turn before did not have, `-` those that
    the next turn drops.
    """
    lines = code.splitlines()[:MAX_LINES]
    new = _unmatched(lines, before)
    dropped = _unmatched(lines, after)
    marks = {
        (False, False): (" ", ""),
        (True, False): ("+", "new"),
        (False, True): ("-", "old"),
        (True, True): ("±", "new old"),
    }
    shown = []
    for number, line in enumerate(lines):
        sign, style = marks[number in new, number in dropped]
        shown.append(
            f'<span class="line {style}" data-mark="{sign}">{_text(line, MAX_CHARS // 10)}\n</span>'
        )
    more = len(code.splitlines()) - len(lines)
    rest = f'<span class="line" data-mark=" ">… {more} more lines\n</span>' if more else ""
    return f'<pre class="code">{"".join(shown)}{rest}</pre>'


def _unmatched(lines: Sequence[str], other: str | None) -> set[int]:
    """Numbers of the lines that a line diff does not find in the other code; none without another
    code.
    """
    if other is None:
        return set()
    blocks = difflib.SequenceMatcher(
        None, lines, other.splitlines()[:MAX_LINES], autojunk=False
    ).get_matching_blocks()
    return set(range(len(lines))) - {
        number for block in blocks for number in range(block.a, block.a + block.size)
    }


def _text(text: str, limit: int = MAX_CHARS) -> str:
    """Escaped text of anyone; characters that hide or reorder text are shown as their number."""
    cut = f"\n… {len(text) - limit} more characters" if len(text) > limit else ""
    shown = "".join(
        c
        if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
        else f"\\u{ord(c):04x}"
        for c in text[:limit]
    )
    return html.escape(shown + cut)


def _data_uri(image: bytes) -> str:
    kind = "image/png" if image.startswith(PNG_MAGIC) else "image/svg+xml"
    return f"data:{kind};base64,{base64.b64encode(image).decode()}"


# ---------------------------------------------------------------- the page


def write_report(
    path: str | os.PathLike,
    *,
    title: str,
    banner: str,
    sections: Sequence[Section],
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the report, whole or not at all, and returns its path.

    Args:
      title: what was run.
      banner: what a reader must know before any number, e.g. that the model is tiny.
      facts: name -> value under the title (config, seeds); the time of writing is added.
    """
    facts = dict(facts or {}) | {
        "written": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    }
    facts_html = "".join(
        f"<div><dt>{_text(str(name))}</dt><dd>{_text(str(value))}</dd></div>"
        for name, value in facts.items()
    )
    links = "".join(
        f'<a href="#part{i}">{_text(section.title)}</a>' for i, section in enumerate(sections)
    )
    parts = "".join(
        f'<section id="part{i}"><h2>{_text(section.title)}</h2>{section.html}</section>'
        for i, section in enumerate(sections)
    )
    script_hash = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{script_hash}'"
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{_text(title)}</title><style>{STYLE}</style></head>'
        f'<body><header><h1>{_text(title)}</h1><p class="banner">{_text(banner)}</p><dl>{facts_html}</dl><nav>{links}</nav></header>'
        f"<main>{parts}</main><script>{SCRIPT}</script></body></html>\n"
    )
    path = Path(path)
    beside = path.with_name(path.name + ".new")
    beside.write_text(page, encoding="utf-8")
    os.replace(beside, path)
    return path


SCRIPT = """
for (const gallery of document.querySelectorAll('.gallery')) {
  const buttons = gallery.querySelectorAll('button[data-show]');
  for (const button of buttons) button.addEventListener('click', () => {
    for (const other of buttons) other.setAttribute('aria-pressed', other === button);
    for (const article of gallery.querySelectorAll('article')) {
      const show = button.dataset.show;
      article.hidden = show !== '' && !article.dataset.labels.split(' ').includes(show);
    }
  });
}
"""

STYLE = """
:root{color-scheme:light dark;--ink:#24292f;--soft:#5b6570;--page:#fff;--card:#f6f8fa;--edge:#d5dbe1;--link:#0b62c4;
--new:#d8f5df;--old:#ffe1de;--both:#fff0c9;--good:#13753a;--bad:#bb2330;--note:#fff6d6;--note-edge:#d9b33c}
@media(prefers-color-scheme:dark){:root{--ink:#d5dbe2;--soft:#98a3af;--page:#0f1318;--card:#171c23;--edge:#2f3843;--link:#6cb0ff;
--new:#12381f;--old:#471b1e;--both:#43370f;--good:#55c980;--bad:#ff8087;--note:#2b2510;--note-edge:#8f7524}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1320px;padding:1rem;background:var(--page);color:var(--ink);overflow-wrap:anywhere;
font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.6rem;line-height:1.2;margin:.3rem 0}
h2{font-size:1.25rem;margin:2.2rem 0 .7rem;padding-bottom:.3rem;border-bottom:1px solid var(--edge)}h3{font-size:1rem;margin:0}
h4{margin:.2rem 0 .4rem;font-size:.9rem}a{color:var(--link)}small{color:var(--soft)}
.banner{background:var(--note);border-left:4px solid var(--note-edge);padding:.6rem .8rem;margin:.8rem 0;border-radius:0 6px 6px 0}
dl{display:flex;flex-wrap:wrap;gap:.3rem 1.6rem;margin:.8rem 0}dt{color:var(--soft);font-size:.8rem}dd{margin:0}
nav{display:flex;flex-wrap:wrap;gap:.3rem 1rem}.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.88rem}
th,td{padding:.3rem .5rem;text-align:right;white-space:nowrap;vertical-align:top;border-bottom:1px solid var(--edge)}
thead th{color:var(--soft);font-weight:600}thead tr:last-child th{border-bottom:2px solid var(--edge)}
th.group{text-align:left;color:var(--ink)}.starts{border-left:1px solid var(--edge)}.words{text-align:left}
tr>th:first-child{text-align:left;position:sticky;left:0;background:var(--page)}td small{display:block;font-size:.72rem}figure{margin:0}
figcaption{font-size:.82rem;color:var(--soft)}figcaption b{color:var(--ink)}.curves{margin-bottom:1.6rem;overflow-x:auto}
.curves figcaption{font-size:1rem;font-weight:600;color:var(--ink);margin-bottom:.3rem}
.curves img{display:block;width:100%;min-width:620px}.filters{display:flex;flex-wrap:wrap;gap:.4rem;margin-bottom:.8rem}
button{font:inherit;font-size:.85rem;padding:.25rem .8rem;border:1px solid var(--edge);border-radius:99px;cursor:pointer;
background:var(--card);color:inherit}
button[aria-pressed=true]{background:var(--ink);color:var(--page);border-color:var(--ink)}button:disabled{opacity:.45;cursor:default}
article{border:1px solid var(--edge);border-radius:8px;background:var(--card);padding:.8rem;margin-bottom:1rem}
article header{display:flex;flex-wrap:wrap;align-items:center;gap:.3rem .6rem;margin-bottom:.6rem}
.tag{font-size:.75rem;padding:0 .5rem;border:1px solid var(--edge);border-radius:99px;color:var(--soft)}
.tag.improved,.tag.repaired,.up{color:var(--good)}.tag.regressed,.tag.failed,.down{color:var(--bad)}
.delta{font-variant-numeric:tabular-nums;font-weight:600}
.pictures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(46%,220px),1fr));gap:.8rem}
.pictures img{display:block;width:100%;background:#fff;border:1px solid var(--edge);border-radius:4px}
.parts span{margin-right:.5rem;white-space:nowrap}
.nothing{min-height:8rem;padding:.6rem;border:1px dashed var(--bad);border-radius:4px;color:var(--bad);font-size:.85rem}
.nothing pre{max-height:12rem;overflow:auto}pre{margin:.3rem 0;white-space:pre-wrap;font:12px/1.45 ui-monospace,Menlo,Consolas,monospace}
summary{cursor:pointer;margin-top:.6rem;color:var(--link);font-size:.88rem}
.turns{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:1rem;margin-top:.6rem}.turns>div{min-width:0}
.thought{color:var(--soft);border-left:3px solid var(--edge);padding-left:.6rem}
.code{background:var(--page);border:1px solid var(--edge);border-radius:4px;padding:.4rem 0}
.line{display:block;padding:0 .6rem 0 1.7rem;text-indent:-1.1rem}
.line::before{content:attr(data-mark);white-space:pre;display:inline-block;width:1.1rem;text-indent:0;color:var(--soft)}
.line.new{background:var(--new)}.line.old{background:var(--old)}.line.new.old{background:var(--both)}.error,.missing{color:var(--bad)}
"""
