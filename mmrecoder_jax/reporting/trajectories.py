"""Trajectories as HTML: target and renders side by side, the code of every turn with its changes.

Everything a model wrote (responses, code, errors) is escaped. Renders arrive as PNG files that
this package encoded from pixels, so no file that a model wrote is passed on.
"""

import dataclasses
import difflib
import itertools
from collections.abc import Sequence

from mmrecoder_jax.env.response import extract_code, extract_thought
from mmrecoder_jax.reporting.escape import MAX_CHARS, PNG_MAGIC, data_uri, escape
from mmrecoder_jax.rl.correction import improved, regressed, same_code

MAX_LINES = 400  # of one code listing; the diff's time grows with their square
MAX_LINE_CHARS = MAX_CHARS // 10

FILTERS = {
    "improved": "first turn executes, last turn scores higher",
    "regressed": "first turn executes, last turn scores lower",
    "repaired": "first turn fails, last turn executes",
    "repeated": "a turn repeats the code of the turn before",
    "failed": "some turn does not execute",
}


@dataclasses.dataclass(frozen=True)
class TurnView:
    """One turn: what was written, what became of it, what it earned.

    Attributes:
      status: of `env.execution.Status`; "ok" is success.
      error: feedback text; "" when ok.
      render_png: None where nothing was drawn.
      scores: parts in [0, 1] by name; turns are compared by "overall".
      reward: None where no reward was computed.
    """

    response: str
    status: str
    error: str
    render_png: bytes | None
    scores: dict[str, float]
    reward: float | None

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def overall(self) -> float:
        """The low-level score."""
        return self.scores["overall"]

    @property
    def code(self) -> str | None:
        """None where the response has no code block."""
        return extract_code(self.response)


@dataclasses.dataclass(frozen=True)
class TrajectoryView:
    """One target chart and the turns that redraw it."""

    id: str
    target_png: bytes
    turns: list[TurnView]

    def __post_init__(self) -> None:
        if not self.target_png.startswith(PNG_MAGIC):
            raise ValueError(
                f"the target of trajectory {self.id!r} is no PNG: it starts with "
                f"{self.target_png[:8]!r}"
            )
        if not self.turns:
            raise ValueError(f"trajectory {self.id!r} has no turns")

    def labels(self) -> list[str]:
        """The filters (`FILTERS`) that show this trajectory, from its first and its last turn.

        improved, regressed: only where the first turn executes (arXiv 2604.01600 counts nothing
        else as self-correction), by the rule of `rl.correction`. repaired: the first turn does not
        execute and the last one does. repeated: some turn's code is that of the turn before.
        failed: some turn does not execute.
        """
        first, last = self.turns[0], self.turns[-1]
        pairs = itertools.pairwise(self.turns)
        tests = {
            "improved": first.ok and improved(first.overall, last.overall),
            "regressed": first.ok and regressed(first.overall, last.overall),
            "repaired": not first.ok and last.ok,
            "repeated": any(same_code(a.response, b.response) for a, b in pairs),
            "failed": not all(turn.ok for turn in self.turns),
        }
        return [name for name, holds in tests.items() if holds]


def trajectories_html(views: Sequence[TrajectoryView], title: str) -> str:
    """Trajectories one below the other, with a button for each of `FILTERS`."""
    labels = [view.labels() for view in views]
    buttons = [f'<button type="button" data-show="" aria-pressed="true">all {len(views)}</button>']
    for name, meaning in FILTERS.items():
        count = sum(name in found for found in labels)
        state = "" if count else " disabled"
        buttons.append(
            f'<button type="button" data-show="{name}" aria-pressed="false" '
            f'title="{meaning}"{state}>{name} {count}</button>'
        )
    articles = [_trajectory_html(view, found) for view, found in zip(views, labels, strict=True)]
    return (
        f'<div class="gallery" aria-label="{escape(title)}">'
        f'<div class="filters">{"".join(buttons)}</div>{"".join(articles)}</div>'
    )


def _trajectory_html(view: TrajectoryView, labels: Sequence[str]) -> str:
    first, last = view.turns[0].overall, view.turns[-1].overall
    sign = "up" if improved(first, last) else "down" if regressed(first, last) else ""
    tags = "".join(f'<span class="tag {name}">{name}</span>' for name in labels)
    delta = f'<span class="delta {sign}">{last - first:+.3f}</span>' if len(view.turns) > 1 else ""
    # Lazy: a page holds hundreds of pictures, most of them below the fold.
    pictures = [
        f'<figure><img loading="lazy" src="{data_uri(view.target_png)}" alt="target">'
        "<figcaption><b>target</b></figcaption></figure>"
    ]
    pictures += [_render_html(turn, number) for number, turn in enumerate(view.turns, 1)]
    listings = [_turn_html(view.turns, i) for i in range(len(view.turns))]
    return (
        f'<article data-labels="{" ".join(labels)}">'
        f"<header><h3>{escape(view.id)}</h3>{delta}{tags}</header>"
        f'<div class="pictures">{"".join(pictures)}</div>'
        "<details><summary>thoughts and code</summary>"
        f'<div class="turns">{"".join(listings)}</div></details></article>'
    )


def _render_html(turn: TurnView, number: int) -> str:
    if turn.render_png is not None:
        uri = data_uri(turn.render_png)
        picture = f'<img loading="lazy" src="{uri}" alt="render of turn {number}">'
    else:
        reason = f"<pre>{escape(turn.error)}</pre>" if turn.error else ""
        picture = f'<div class="nothing"><b>{escape(turn.status)}</b>{reason}</div>'
    parts = [
        f"<span>{escape(name)} <b>{score:.2f}</b></span>" for name, score in turn.scores.items()
    ]
    reward = "" if turn.reward is None else f"<span>reward <b>{turn.reward:.3f}</b></span>"
    return (
        f"<figure>{picture}<figcaption><b>turn {number}</b> "
        f'<span class="parts">{reward} {" ".join(parts)}</span></figcaption></figure>'
    )


def _turn_html(turns: Sequence[TurnView], i: int) -> str:
    turn, code = turns[i], turns[i].code
    parts = [f"<h4>turn {i + 1}</h4>"]
    if code is None:
        parts.append(
            '<p class="missing">no code in this response:</p>'
            f'<pre class="thought">{escape(turn.response)}</pre>'
        )
    else:
        thought = extract_thought(turn.response)
        parts.append(f'<pre class="thought">{escape(thought)}</pre>' if thought else "")
        before = turns[i - 1].code if i else None
        after = turns[i + 1].code if i + 1 < len(turns) else None
        parts.append(_code_html(code, before, after))
    if turn.error:
        parts.append(f'<pre class="error">{escape(turn.status)}: {escape(turn.error)}</pre>')
    return f"<div>{''.join(parts)}</div>"


def _code_html(code: str, before: str | None, after: str | None) -> str:
    """The listing of one turn, with a mark per line.

    `+` marks lines that the turn before does not have, `-` lines that the next turn drops, `±`
    both.
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
        text = escape(line, MAX_LINE_CHARS)
        shown.append(f'<span class="line {style}" data-mark="{sign}">{text}\n</span>')
    more = len(code.splitlines()) - len(lines)
    rest = f'<span class="line" data-mark=" ">… {more} more lines\n</span>' if more else ""
    return f'<pre class="code">{"".join(shown)}{rest}</pre>'


def _unmatched(lines: Sequence[str], other: str | None) -> set[int]:
    """Indices of the lines that a line diff does not find in the other code."""
    if other is None:
        return set()
    # autojunk would drop lines that are frequent in long code, such as `plt.subplot(...)`.
    matcher = difflib.SequenceMatcher(None, lines, other.splitlines()[:MAX_LINES], autojunk=False)
    matched: set[int] = set()
    for block in matcher.get_matching_blocks():
        matched.update(range(block.a, block.a + block.size))
    return set(range(len(lines))) - matched
