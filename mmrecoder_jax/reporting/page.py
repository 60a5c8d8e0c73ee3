"""The page: a shell of trusted HTML, its style sheet and its script, and data that it loads.

The script (`page.js`) draws trajectories. It gets data in one of three ways, by the same names:

    in the page      <script type="application/json" data-name="s/0">...    a report of one file
    beside it        report/s/0.js, which calls mm("s/0", ...)              from file://, no server
    of the server    the same address, made when it is asked for            `watch`

A content security policy allows the page's own script and style sheet by their hashes, and what
that script loads ('strict-dynamic'); nothing is fetched, and nothing of anybody else is run.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from mmrecoder_jax.reporting.escape import escape
from mmrecoder_jax.reporting.trajectories import ENTRY, ENTRY_PICTURES, FILTERS

DATA = "report"  # the folder of the data, beside the page


def page_html(
    title: str,
    parts: Mapping[str, str],
    data: Mapping[str, Any],
    embedded: Mapping[str, Any] | None = None,
) -> str:
    """The whole page.

    Args:
      title: as text.
      parts: trusted HTML by the id of its place: "about", "short", "alarms", "results", "curves".
      data: what the script begins with; see `start_data`.
      embedded: data by name that the page brings with it; None where it loads all.
    """
    script, style = _file("page.js"), _file("page.css")
    policy = "; ".join(
        (
            "default-src 'none'",
            "img-src data: 'self' file:",
            f"style-src {_hash(style)}",
            f"script-src {_hash(script)} 'strict-dynamic'",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    blocks = {"start": data, **(embedded or {})}
    held = "".join(
        f'<script type="application/json" data-name="{escape(name)}">{as_json(value)}</script>\n'
        for name, value in blocks.items()
    )
    sections = "".join(
        f'<section id="{name}"><h2>{heading}</h2><div class="part" id="part-{name}">'
        f"{parts.get(name, '')}</div></section>\n"
        for name, heading in (
            ("short", "In short"),
            ("alarms", "Alarms"),
            ("results", "After every stage"),
            ("curves", "Curves"),
        )
    )
    links = "".join(
        f'<a href="#{name}">{text}</a>'
        for name, text in (
            ("short", "in short"),
            ("results", "results"),
            ("curves", "curves"),
            ("trajectories", "trajectories"),
        )
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style></head>\n"
        f'<body><header><h1>{escape(title)}</h1><div id="part-about">{parts.get("about", "")}'
        f"</div><nav>{links}</nav></header>\n<main>{sections}{VIEWER}</main>\n"
        f"{held}<script>{script}</script></body></html>\n"
    )


def start_data(
    sources: Sequence[Mapping[str, Any]], workdir: str, seconds: float = 0.0
) -> dict[str, Any]:
    """What the script begins with.

    Args:
      sources: files of trajectories, newest first: "key", "name", "group", "step", "chunk"
        (trajectories of a file of details), "again" (whether `replay` takes them).
      workdir: as commands name it.
      seconds: between looks for something new; 0 for a page that stays as it is.
    """
    return {
        "sources": list(sources),
        "entry": [*ENTRY, *ENTRY_PICTURES],
        "filters": FILTERS,
        "workdir": workdir,
        "seconds": seconds,
        "folder": DATA,
    }


def data_script(name: str, value: Any) -> str:
    """A file of data that the page loads as a script."""
    return f"mm({json.dumps(name)},{as_json(value)});\n"


def as_json(value: Any) -> str:
    """JSON in ASCII that ends no script element, whatever a text in it says."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def _file(name: str) -> str:
    return resources.files("mmrecoder_jax.reporting").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


VIEWER = """<section id="trajectories"><h2>Trajectories</h2>
<p id="loading" role="status"><noscript>Trajectories need JavaScript.</noscript></p>
<div id="viewer" hidden>
<form class="tools" role="search">
<label>from <select id="group"></select></label>
<label>sort by <select id="sort"></select></label>
<label class="grow">search <input id="search" type="search" autocomplete="off"
 placeholder="chart, step, error"></label>
<label><input id="deep" type="checkbox"> in code and thoughts too</label>
</form>
<div class="filters" id="filters" role="group" aria-label="filters"></div>
<p id="count" role="status"></p>
<ol id="list"></ol>
<nav class="pages" id="pages" aria-label="pages">
<button type="button" id="before">previous</button><span id="place"></span>
<button type="button" id="after">next</button></nav>
<p class="keys">Keys: <kbd>/</kbd> search, <kbd>j</kbd> <kbd>k</kbd> next and previous,
<kbd>Enter</kbd> open, <kbd>Esc</kbd> close, <kbd>n</kbd> <kbd>p</kbd> pages</p>
</div></section>
<dialog id="one" aria-labelledby="one-title"><header><h2 id="one-title"></h2>
<button type="button" id="one-before" title="previous (k)">previous</button>
<button type="button" id="one-after" title="next (j)">next</button>
<button type="button" id="close" title="close (Esc)">close</button></header>
<div id="one-body" tabindex="-1" autofocus></div></dialog>
"""
