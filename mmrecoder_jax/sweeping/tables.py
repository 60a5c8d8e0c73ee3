"""The results of a sweep as a table for the terminal, as CSV, and in a sentence."""

import csv
import io
import math
from collections.abc import Sequence

from mmrecoder_jax.exam.intervals import Estimate
from mmrecoder_jax.monitoring.progress import format_number
from mmrecoder_jax.reporting.tables import format_table
from mmrecoder_jax.sweeping.axes import SEED
from mmrecoder_jax.sweeping.results import Metric, Result, Setting, State, ranked


def text_table(settings: Sequence[Setting], metric: Metric) -> str:
    """A row for each setting: its values, how many of its runs have finished, mean and interval."""
    first = ranked(settings, metric.best)[:1]
    rows = []
    for setting in settings:
        found = setting.over_seeds
        row = {
            **setting.values,
            "finished": f"{_finished(setting)} of {len(setting.results)}",
            metric.name: format_number(found.mean) if setting.numbers else "-",
            "95 % over seeds": _interval(found) or "-",
        }
        failed = sum(result.state == State.FAILED for result in setting.results)
        notes = ["best"] * (setting in first) + [f"{failed} failed"] * bool(failed)
        rows.append(row | {"": ", ".join(notes)})
    return format_table(rows)


def _finished(setting: Setting) -> int:
    return sum(result.state == State.FINISHED for result in setting.results)


def _interval(found: Estimate) -> str:
    if math.isnan(found.low):
        return ""
    return f"[{format_number(found.low)}, {format_number(found.high)}]"


def settings_csv(settings: Sequence[Setting], metric: Metric) -> str:
    """A row for each setting, with all digits."""
    lines = []
    for setting in settings:
        found = setting.over_seeds
        lines.append(
            {
                **setting.values,
                "metric": metric.name,
                "runs": len(setting.results),
                "finished": found.count,
                **{name: _number(getattr(found, name)) for name in ("mean", "low", "high")},
            }
        )
    return _csv(lines)


def points_csv(results: Sequence[Result], metric: Metric) -> str:
    """A row for each point."""
    return _csv(
        [
            {
                "point": result.point.name,
                **result.point.texts(),
                "state": str(result.state),
                "step": result.step,
                "metric": metric.name,
                "value": _number(result.value),
                "failure": result.failure,
            }
            for result in results
        ]
    )


def _number(value: float) -> str:
    return "" if math.isnan(value) else repr(value)


def _csv(rows: Sequence[dict[str, object]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def best_in_words(settings: Sequence[Setting], metric: Metric) -> str:
    """Which setting is best, and how far that can be trusted."""
    order = ranked(settings, metric.best)
    if not order:
        return "best: no point has finished"
    first, found = order[0], order[0].over_seeds
    interval = _interval(found)
    said = [f"best ({metric.best}): {first}, {metric.name} {format_number(found.mean)}"]
    if interval:
        said[0] += f" {interval} over {found.count} seeds"
    if (done := _finished(first)) < len(first.results):
        said.append(f"{done} of its {len(first.results)} runs have finished")
    if len(order) > 1:
        said += _doubts(order)
    pick = max if metric.best == "max" else min
    run = pick((r for r in first.results if math.isfinite(r.value)), key=lambda r: r.value)
    said.append(f"its best run is {run.point.name}")
    return "; ".join(said)


def _doubts(order: Sequence[Setting]) -> list[str]:
    """What keeps the first two settings from being told apart."""
    one, two = (setting.over_seeds for setting in order[:2])
    if one.mean == two.mean:
        return [f"{order[1]} is as good"]
    if min(one.count, two.count) < 2:
        return [f"one run of a setting says little: sweep config.{SEED} too"]
    if one.low <= two.high and two.low <= one.high:
        return [f"its interval overlaps that of {order[1]}: more seeds would tell them apart"]
    return []
