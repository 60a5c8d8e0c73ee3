"""Drawings as pages: one file each, whole in itself, without a network.

All that a model wrote is escaped (`reporting.escape`); pictures are PNG files that this package
encoded from pixels.
"""

import base64
import difflib
import html
import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from mmrecoder_jax.data.sources import png_bytes
from mmrecoder_jax.drawing.choosing import Choice
from mmrecoder_jax.drawing.drawing import Drawing
from mmrecoder_jax.drawing.sheet import Section, write_sheet
from mmrecoder_jax.env.response import extract_code, extract_thought
from mmrecoder_jax.images import BadImage, decode
from mmrecoder_jax.reporting.escape import data_uri, escape
from mmrecoder_jax.rl.trajectory import Turn

_MOST_LINES = 1000  # of a listing; the time of a comparison grows with their square
_MOST_CARDS = 500  # of the index: each brings two pictures
_THUMBNAIL = (360, 300)  # pixels, at most, of a picture in the index


def drawing_page(path: Path, name: str, drawing: Drawing, settings: Mapping[str, Any]) -> None:
    """Writes the page of one drawing."""
    sections = []
    code = drawing.code
    if code is not None:
        listing = f'<pre class="code">{_lines(code, None)}</pre>'
        note = "<p>The script that is handed over is beside this page: final.py.</p>"
        sections.append(Section("Chart and drawing", _pair(drawing)))
        sections.append(Section("Code", note + listing))
    for sample, trajectory in enumerate(drawing.samples):
        title = f"Sample {sample + 1}" if len(drawing.samples) > 1 else "Turns"
        alike = drawing.alike[sample]
        pictures = "".join(
            _turn_picture(turn, Choice(sample, number), drawing.choice, alike[number])
            for number, turn in enumerate(trajectory.turns)
        )
        chart = _figure(data_uri(drawing.chart.image), "<b>the chart</b>", "the chart")
        before: list[str | None] = [None, *(extract_code(turn.text) for turn in trajectory.turns)]
        listings = "".join(
            _turn_text(turn, number, earlier)
            for number, (turn, earlier) in enumerate(zip(trajectory.turns, before, strict=False), 1)
        )
        sections.append(
            Section(
                title,
                f'<div class="pictures">{chart}{pictures}</div>'
                "<details open><summary>thoughts and code of every turn</summary>"
                f'<div class="turns">{listings}</div></details>',
            )
        )
    facts = {field: value for field, value in settings.items() if value not in ("", None)}
    banner = drawing.summary if code is None else f"Handed over: {drawing.summary} (1 is equal)."
    write_sheet(path, title=name, banner=banner, sections=sections, facts=facts)


def index_page(directory: Path, rows: Mapping[str, Mapping[str, Any]]) -> Path:
    """Writes the page of all drawings in a directory, by name; returns its path."""
    shown = list(rows.items())[:_MOST_CARDS]
    cards = "".join(_card(directory, name, row) for name, row in shown)
    if len(shown) < len(rows):
        cards += f"<p>{len(rows) - len(shown)} more are in the folders beside this page.</p>"
    drawn = sum(row["chosen"] is not None for row in rows.values())
    path = directory / "index.html"
    write_sheet(
        path,
        title=directory.resolve().name,
        banner=f"Charts: {len(rows)}. Scripts that run: {drawn}.",
        sections=[Section("Drawings", cards)],
        facts={},
    )
    return path


def _card(directory: Path, name: str, row: Mapping[str, Any]) -> str:
    pictures = "".join(
        _figure(uri, caption, caption)
        for file, caption in (("chart.png", "chart"), ("final.png", "drawing"))
        if (uri := _thumbnail(directory / name / file))
    )
    address = html.escape(f"{quote(name)}/index.html", quote=True)
    return (
        f'<article><header><h3><a href="{address}">{escape(name)}</a></h3>'
        f'<span class="tag">{escape(str(row["summary"]))}</span></header>'
        f'<div class="pictures">{pictures}</div></article>'
    )


def _thumbnail(path: Path) -> str:
    """A small copy of a picture as an address; "" where there is none."""
    try:
        image = decode(path)
    except BadImage:
        return ""
    image.thumbnail(_THUMBNAIL, Image.Resampling.BOX)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _pair(drawing: Drawing) -> str:
    render = drawing.render
    assert render is not None  # there is code
    return (
        '<div class="pictures">'
        + _figure(data_uri(drawing.chart.image), "<b>the chart</b>", "the chart")
        + _figure(data_uri(png_bytes(render)), "<b>the drawing</b>", "the drawing")
        + "</div>"
    )


def _figure(uri: str, caption: str, text: str) -> str:
    return (
        f'<figure><img loading="lazy" src="{uri}" alt="{escape(text)}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _turn_picture(turn: Turn, place: Choice, choice: Choice | None, alike: float) -> str:
    number = place.turn + 1
    chosen = ' <span class="tag improved">handed over</span>' if place == choice else ""
    image = turn.execution.image
    if image is None:
        error = turn.execution.error
        reason = f"<pre>{escape(error)}</pre>" if error else ""
        picture = f'<div class="nothing"><b>{escape(str(turn.execution.status))}</b>{reason}</div>'
        return f"<figure>{picture}<figcaption><b>turn {number}</b></figcaption></figure>"
    judged = "" if turn.verdict is None else _judged(turn)
    caption = f"<b>turn {number}</b>{chosen} likeness {alike:.2f}{judged}"
    return _figure(data_uri(png_bytes(image)), caption, f"render of turn {number}")


def _judged(turn: Turn) -> str:
    assert turn.verdict is not None
    if turn.verdict.score is None:
        return f", judge: {escape(turn.verdict.problem)}"
    return f", judge {turn.verdict.score:.2f}"


def _turn_text(turn: Turn, number: int, before: str | None) -> str:
    parts = [f"<h4>turn {number}</h4>"]
    code = extract_code(turn.text)
    if code is None:
        parts.append('<p class="missing">no code in this response:</p>')
        parts.append(f'<pre class="thought">{escape(turn.text)}</pre>')
    else:
        thought = extract_thought(turn.text)
        parts.append(f'<pre class="thought">{escape(thought)}</pre>' if thought else "")
        parts.append(f'<pre class="code">{_lines(code, before)}</pre>')
    if turn.execution.error:
        error = f"{turn.execution.status}: {turn.execution.error}"
        parts.append(f'<pre class="error">{escape(error)}</pre>')
    if not turn.finished and turn.text:
        parts.append('<p class="missing">the length limit cut this response</p>')
    return f"<div>{''.join(parts)}</div>"


def _lines(code: str, before: str | None) -> str:
    """A listing; lines that the turn before does not have are marked with `+`."""
    lines = code.splitlines()
    new = _new(lines[:_MOST_LINES], before)
    shown = [
        f'<span class="line{" new" if number in new else ""}" '
        f'data-mark="{"+" if number in new else " "}">{escape(line)}\n</span>'
        for number, line in enumerate(lines[:_MOST_LINES])
    ]
    left = len(lines) - len(shown)
    return "".join(shown) + (f"… {left} more lines\n" if left else "")


def _new(lines: Sequence[str], before: str | None) -> set[int]:
    """Numbers of the lines that a line comparison does not find in the other code."""
    if before is None:
        return set()
    # autojunk would drop lines that are frequent in long code
    found = difflib.SequenceMatcher(
        None, before.splitlines()[:_MOST_LINES], lines, autojunk=False
    ).get_matching_blocks()
    same = itertools.chain.from_iterable(range(block.b, block.b + block.size) for block in found)
    return set(range(len(lines))) - set(same)
