"""The curves of a stage's metrics: a panel for each kind, as HTML with inline SVG.

A metric `panel/line` is a line in its panel. A metric of a turn, `turn2/low_level`, is the line
"turn2" in the panel of low_level, beside the other turns; one of an evaluation,
`eval/greedy/turn2/low_level`, is the line "greedy turn2" in the panel "eval low_level". A metric
without a slash is the line "all" of its panel. A turn has the same colour in all panels. Panels of
metrics that were 0 at every step are named in one sentence, unless an alarm rings.
"""

import fnmatch
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mmrecoder_jax.monitoring.alarms import MONITORS
from mmrecoder_jax.monitoring.metrics import RESERVED
from mmrecoder_jax.monitoring.progress import format_number
from mmrecoder_jax.reporting import svg
from mmrecoder_jax.reporting.escape import escape

# These panels come first, in this order.
FIRST_PANELS = (
    *("reward", "low_level", "eval low_level", "exec_rate", "eval exec_rate", "loss", "entropy"),
    *("improvement", "eval improvement", "improved"),
    *("regressed", "silent_groups", "truncated", "logp_gap", "held_out_loss", "probability"),
)
# What the machine did; below a fold.
MACHINE = re.compile(r"env|env_.*|seconds|compiles|rollout|padding|judge|param_norm|alarms")


def curves_html(rows: Sequence[Mapping[str, Any]], ringing: Mapping[str, float], stage: str) -> str:
    """Draws every metric of a stage over its steps.

    Args:
      rows: its metrics, as `metrics.read_metrics` returns them.
      ringing: thresholds of the alarms that ring, by name; their panels are red.
      stage: its name, for labels.
    """
    panels: dict[str, dict[str, str]] = {}  # panel -> line -> metric
    names = dict.fromkeys(name for row in rows for name in row if name not in RESERVED)
    for name in names:
        panel, line = _place(name)
        panels.setdefault(panel, {})[line] = name
    still = [panel for panel in panels if _is_still(panels[panel].values(), rows, ringing)]
    order = sorted(panels.keys() - still, key=_rank)
    shown = [_panel(panel, panels[panel], rows, ringing, stage) for panel in order]
    machine = [MACHINE.fullmatch(panel) is not None for panel in order]
    first = "".join(html for html, below in zip(shown, machine, strict=True) if not below)
    rest = "".join(html for html, below in zip(shown, machine, strict=True) if below)
    fold = (
        f'<details data-key="machine {escape(stage)}"><summary>time, executions, padding'
        f'</summary><div class="panels">{rest}</div></details>'
    )
    zero = ", ".join(escape(_title(panel)) for panel in sorted(still))
    said = f'<p class="keys">0 at every step: {zero}.</p>' if zero else ""
    return f'<div class="panels">{first}</div>{said}' + (fold if rest else "")


def _is_still(
    metrics: Iterable[str], rows: Sequence[Mapping[str, Any]], ringing: Mapping[str, float]
) -> bool:
    """Whether there is nothing to see: no number but 0, and no alarm."""
    names = list(metrics)
    return all(row[name] == 0 for row in rows for name in names if name in row) and not _alarms(
        names, ringing
    )


def _alarms(metrics: Collection[str], ringing: Mapping[str, float]) -> list[str]:
    """The alarms of some metrics that ring."""
    return [
        name
        for name in ringing
        if any(fnmatch.fnmatch(metric, MONITORS[name].metric) for metric in metrics)
    ]


def _title(panel: str) -> str:
    return panel.replace("_", " ")


def _colors(lines: Iterable[str]) -> dict[str, int]:
    """Line -> its colour: that of its turn; behind those of all turns, where it is of none."""
    names = list(lines)
    turns = {name: int(name[4:]) - 1 for name in names if re.fullmatch(r"turn\d+", name)}
    others = [name for name in names if name not in turns]
    first = max(turns.values(), default=-1) + 1
    return turns | {name: first + i for i, name in enumerate(others)}


def _rank(panel: str) -> tuple[int, str]:
    """The first panels in their own order, then the others by name."""
    if panel in FIRST_PANELS:
        return FIRST_PANELS.index(panel), panel
    return len(FIRST_PANELS), panel


def _place(name: str) -> tuple[str, str]:
    """(panel, line) of a metric."""
    first, _, rest = name.partition("/")
    if first == "eval":
        line, _, last = rest.rpartition("/")
        return f"eval {last}", line.replace("/", " ")
    return (rest, first) if re.fullmatch(r"turn\d+", first) else (first, rest or "all")


def _panel(
    panel: str,
    metrics: Mapping[str, str],
    rows: Sequence[Mapping[str, Any]],
    ringing: Mapping[str, float],
    stage: str,
) -> str:
    lines, colors = [], _colors(metrics)
    for line, name in metrics.items():
        pairs = [(row["step"], row[name]) for row in rows if name in row]
        found = np.array(pairs, dtype=float)  # null is nan
        lines.append(svg.Line(line, colors[line], found[:, 0], found[:, 1]))
    alarms = _alarms(metrics.values(), ringing)
    # A factor is on no axis of what it is a factor of.
    limits = [ringing[name] for name in alarms if not MONITORS[name].relative]
    title = _title(panel)
    picture = svg.lines(lines, f"{title} of {stage}", limits[0] if limits else None)
    keys = "".join(
        f'<span class="key c{line.color % svg.COLORS}">'
        f"{'' if line.name == 'all' else escape(line.name)} {_newest(line)}</span>"
        for line in lines
    )
    red = ' class="red"' if alarms else ""
    return f"<figure{red}><figcaption><b>{escape(title)}</b> {keys}</figcaption>{picture}</figure>"


def _newest(line: svg.Line) -> str:
    finite = line.y[np.isfinite(line.y)]
    return format_number(float(finite[-1])) if finite.size else "?"
