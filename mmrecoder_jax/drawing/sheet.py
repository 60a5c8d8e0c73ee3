"""A page of sections as one HTML file that loads nothing and runs nothing.

Images are data URIs and the style sheet is inline. It follows its reader's light or
dark setting and fits a phone. A content security policy allows no script at all.
"""

import dataclasses
import datetime
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmrecoder_jax.reporting.escape import escape


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page: its heading and trusted HTML, made by the functions of this room."""

    title: str
    html: str


def write_sheet(
    path: str | os.PathLike[str],
    *,
    title: str,
    banner: str,
    sections: Sequence[Section],
    facts: Mapping[str, Any],
) -> None:
    """Writes the page, whole or not at all.

    Args:
      title: what was drawn.
      banner: what a reader must know first.
      facts: name -> value under the title; the time of writing is added.
    """
    written = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    page = _page(title, banner, sections, dict(facts) | {"written": written})
    path = Path(path)
    # Renamed over the old page, so that a browser never reads half of one.
    beside = path.with_name(path.name + ".new")
    beside.write_text(page, encoding="utf-8")
    os.replace(beside, path)


def _page(title: str, banner: str, sections: Sequence[Section], facts: Mapping[str, Any]) -> str:
    facts_html = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>"
        for name, value in facts.items()
    )
    links = "".join(
        f'<a href="#part{i}">{escape(section.title)}</a>' for i, section in enumerate(sections)
    )
    parts = "".join(
        f'<section id="part{i}"><h2>{escape(section.title)}</h2>{section.html}</section>'
        for i, section in enumerate(sections)
    )
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f'<body><header><h1>{escape(title)}</h1><p class="banner">{escape(banner)}</p>'
        f"<dl>{facts_html}</dl><nav>{links}</nav></header>"
        f"<main>{parts}</main></body></html>\n"
    )


STYLE = """
:root{color-scheme:light dark;--ink:#24292f;--soft:#5b6570;--page:#fff;--card:#f6f8fa;
  --edge:#d5dbe1;--link:#0b62c4;--new:#d8f5df;--good:#13753a;
  --bad:#bb2330;--note:#fff6d6;--note-edge:#d9b33c}
@media(prefers-color-scheme:dark){:root{--ink:#d5dbe2;--soft:#98a3af;--page:#0f1318;
  --card:#171c23;--edge:#2f3843;--link:#6cb0ff;--new:#12381f;
  --good:#55c980;--bad:#ff8087;--note:#2b2510;--note-edge:#8f7524}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1320px;padding:1rem;background:var(--page);color:var(--ink);
  overflow-wrap:anywhere;font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.6rem;line-height:1.2;margin:.3rem 0}
h2{font-size:1.25rem;margin:2.2rem 0 .7rem;padding-bottom:.3rem;border-bottom:1px solid var(--edge)}
h3{font-size:1rem;margin:0}
h4{margin:.2rem 0 .4rem;font-size:.9rem}
a{color:var(--link)}
.banner{background:var(--note);border-left:4px solid var(--note-edge);padding:.6rem .8rem;
  margin:.8rem 0;border-radius:0 6px 6px 0}
dl{display:flex;flex-wrap:wrap;gap:.3rem 1.6rem;margin:.8rem 0}
dt{color:var(--soft);font-size:.8rem}
dd{margin:0}
nav{display:flex;flex-wrap:wrap;gap:.3rem 1rem}
figure{margin:0}
figcaption{font-size:.82rem;color:var(--soft)}
figcaption b{color:var(--ink)}
article{border:1px solid var(--edge);border-radius:8px;background:var(--card);padding:.8rem;
  margin-bottom:1rem}
article header{display:flex;flex-wrap:wrap;align-items:center;gap:.3rem .6rem;margin-bottom:.6rem}
.tag{font-size:.75rem;padding:0 .5rem;border:1px solid var(--edge);border-radius:99px;
  color:var(--soft)}
.tag.improved{color:var(--good)}
.pictures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(46%,220px),1fr));gap:.8rem}
.pictures img{display:block;width:100%;background:#fff;border:1px solid var(--edge);
  border-radius:4px}
.nothing{min-height:8rem;padding:.6rem;border:1px dashed var(--bad);border-radius:4px;
  color:var(--bad);font-size:.85rem}
.nothing pre{max-height:12rem;overflow:auto}
pre{margin:.3rem 0;white-space:pre-wrap;font:12px/1.45 ui-monospace,Menlo,Consolas,monospace}
summary{cursor:pointer;margin-top:.6rem;color:var(--link);font-size:.88rem}
.turns{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:1rem;
  margin-top:.6rem}
.turns>div{min-width:0}
.thought{color:var(--soft);border-left:3px solid var(--edge);padding-left:.6rem}
.code{background:var(--page);border:1px solid var(--edge);border-radius:4px;padding:.4rem 0}
.line{display:block;padding:0 .6rem 0 1.7rem;text-indent:-1.1rem}
.line::before{content:attr(data-mark);white-space:pre;display:inline-block;width:1.1rem;
  text-indent:0;color:var(--soft)}
.line.new{background:var(--new)}
.error,.missing{color:var(--bad)}
"""
