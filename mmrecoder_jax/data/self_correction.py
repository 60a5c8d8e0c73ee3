"""Two-turn correction dialogues without a teacher.

Cold start 2 of MM-ReCoder (arXiv 2604.01600) learns from dialogues (wrong response, feedback,
better response), kept where low-level(turn 2) - low-level(turn 1) >= 0.02. The paper's second turns
come from a 235B teacher. Here they are the ground truth, and the first turns come from

  * corrupted ground truth (`data.corruptions`): synthetic, any number of them;
  * the policy's own answers to training charts: what it really gets wrong.

What the second turn thinks is filled in from the execution and the score of the first one: "Fix
error: SyntaxError." or "Fix text, color.".
"""

import dataclasses
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmrecoder_jax.data.build import stream_in_chunks
from mmrecoder_jax.data.corruptions import break_code
from mmrecoder_jax.data.sources import (
    Chart,
    Dialogue,
    DialogueDirectory,
    RandomAccess,
    png_bytes,
)
from mmrecoder_jax.data.writers import DialogueWriter
from mmrecoder_jax.env import Execution, ExecutorPool
from mmrecoder_jax.env.chart_env import feedback_images, feedback_text
from mmrecoder_jax.env.chartmimic import Scores, score
from mmrecoder_jax.env.response import extract_code, response_text, think_text
from mmrecoder_jax.images import BadImage

BROKEN_SHARE = 0.25  # of synthetic drafts; the others run and draw something else
DONORS = 4  # charts that an edit may borrow from
POLICY = "policy"  # the origin of what the policy wrote
LOOKS_RIGHT = "Looks right."
SATISFIED_SHARE = 0.5  # of drafts written as later turns: those that found their earlier turn right
PARTS = ("text", "layout", "type", "color")  # of the low-level score

Corrupt = Callable[[str, Sequence[str], random.Random], str]  # (code, donors, generator) -> wrong
Diagnosis = Callable[[str, str], str | None]  # (draft, truth) -> a thought; None: by the score


def undiagnosed(draft: str, truth: str) -> str | None:
    """The diagnosis of charts of no grammar: none."""
    return None


class NoDialogue(ValueError):
    """No draft gains enough; the message says how many there were."""


@dataclasses.dataclass(frozen=True)
class Draft:
    """A first turn that has not been executed yet.

    Attributes:
      id: unique in its dialogue directory.
      origin: `POLICY`, or what was done to the right code: "edited", "broken".
    """

    id: str
    chart: Chart
    response: str
    origin: str


def synthetic_drafts(
    charts: RandomAccess[Chart],
    count: int,
    seed: int,
    corrupt: Corrupt,
    right_share: float = 0.0,
    later_share: float = 0.0,
    diagnosis: Diagnosis = undiagnosed,
) -> Iterator[Draft]:
    """Wrong answers about the charts in turn; a share of them does not run, and a share is right.

    Each depends on (seed, its number, its chart and the donors' codes) alone.

    Args:
      corrupt: puts mistakes into code, of the charts' grammar.
      right_share: of the drafts, those that are the chart's own code.
      later_share: of the drafts, those that think as a later turn does (`later_think`) instead of
        naming the chart's kinds; their codes are the same.
      diagnosis: of the charts' grammar.
    """
    for number in range(count):
        # A generator per draft: a build that resumes makes the same drafts.
        rng = random.Random(f"{seed}/draft/{number}")
        chart = charts[number % len(charts)]
        donors = [charts[rng.randrange(len(charts))].code for _ in range(DONORS)]
        if right_share and rng.random() < right_share:
            code, origin = chart.code, "right"
        elif rng.random() < BROKEN_SHARE:
            code, origin = break_code(chart.code, rng), "broken"
        else:
            code, origin = corrupt(chart.code, donors, rng), "edited"
        think = think_text(code)
        if later_share and rng.random() < later_share:
            wanted = chart.code if origin == "broken" else code
            think = later_think(wanted, donors, corrupt, diagnosis, rng)
        yield Draft(f"synthetic-{number:06d}", chart, response_text(think, code), origin)


def later_think(
    code: str, donors: Sequence[str], corrupt: Corrupt, diagnosis: Diagnosis, rng: random.Random
) -> str:
    """What a later turn may have thought that wrote `code`.

    Either that its earlier turn looked right, which was the same code, or what was wrong with
    another one, made up here.
    """
    if rng.random() < SATISFIED_SHARE:
        return LOOKS_RIGHT
    return diagnosis(corrupt(code, donors, rng), code) or f"Fix {rng.choice(PARTS)}."


def correction_think(execution: Execution, scores: Scores) -> str:
    """What a second turn thinks about the first one."""
    if not execution.ok:
        last_line = execution.error.strip().rpartition("\n")[2]
        # A time limit has no exception to name: then its status says what happened.
        name = re.match(r"\w*(?:Error|Exception|Interrupt|Exit)\b", last_line)
        return f"Fix error: {name[0] if name else execution.status}."
    parts = [part for part in PARTS if getattr(scores, part) < 1]
    return f"Fix {', '.join(parts)}." if parts else "Fix data."


def make_dialogue(
    draft: Draft,
    execution: Execution,
    feedback: Mapping[str, str],
    min_gain: float,
    keep_right: bool = False,
    diagnosis: Diagnosis = undiagnosed,
) -> Dialogue | None:
    """The dialogue in which the truth follows a draft.

    Args:
      execution: of the draft's code.
      feedback: "render", "error" and "image" of the configuration: what the second turn reads and
        sees.

    Returns:
      None where the second turn gains less than `min_gain`: there is nothing to correct.
    """
    chart = draft.chart
    scores = score(execution.record if execution.ok else None, chart.record)
    gain = score(chart.record, chart.record).overall - scores.overall
    code = (extract_code(draft.response) or "").strip()
    is_right = code == chart.code.strip()
    if gain < min_gain and not (keep_right and is_right):
        return None
    seen = feedback_images(execution, chart.image, feedback["image"])
    think = LOOKS_RIGHT if is_right else correction_think(execution, scores)
    if execution.ok and not is_right:
        think = diagnosis(code, chart.code) or think
    return Dialogue(
        id=draft.id,
        chart=chart,
        responses=(draft.response, response_text(think, chart.code)),
        feedback_text=(feedback_text(execution, feedback),),
        feedback_images=(tuple(map(png_bytes, seen)),),
        gain=gain,
        origin=draft.origin,
    )


def build_dialogues(
    directory: str | Path,
    drafts: Sequence[Draft],
    pool: ExecutorPool,
    references: ExecutorPool,
    meta: dict[str, Any],
    feedback: Mapping[str, str],
    min_gain: float,
    keep_right: bool = False,
    diagnosis: Diagnosis = undiagnosed,
    progress: Callable[[int, int], None] | None = None,
    shown: Callable[[Execution, Chart], Execution] = lambda execution, chart: execution,
    unreadable: Callable[[Draft, BadImage], None] | None = None,
) -> DialogueDirectory:
    """Executes the drafts and writes the dialogues that gain enough.

    Resumable, atomic, and the same whatever order executions end in.

    Args:
      pool: runs what the policy wrote.
      references: runs what was made of right code: no script of a policy may find it in its
        executor.
      meta: what the directory is built from; a killed build is taken over where it is the same.
      feedback, min_gain: see `make_dialogue`.
      progress: called with (drafts executed, drafts in all) after each.
      shown: makes a failure of an execution whose figure cannot be shown to the policy.
      unreadable: told of drafts whose target is no image, which are left out; None: it raises.

    Raises:
      NoDialogue: not one draft gains enough.
    """
    writer = DialogueWriter(directory, meta | {"min_gain": min_gain})
    todo = [draft for draft in drafts if draft.id not in writer.done]
    done = len(drafts) - len(todo)
    for draft, execution in _executed(todo, pool, references):
        done += 1
        try:
            seen = shown(execution, draft.chart)
            dialogue = make_dialogue(draft, seen, feedback, min_gain, keep_right, diagnosis)
        except BadImage as error:
            if unreadable is None:
                raise
            unreadable(draft, error)
            continue
        if dialogue:
            writer.add(dialogue)
        if progress:
            progress(done, len(drafts))
    if not writer.done:
        raise NoDialogue(
            f"none of {len(drafts)} drafts gains {min_gain} by its correction: there is nothing to "
            "learn from"
        )
    return writer.finish()


def _executed(
    drafts: Sequence[Draft], pool: ExecutorPool, references: ExecutorPool
) -> Iterator[tuple[Draft, Execution]]:
    """Each draft with what came of its code, as they finish."""
    policy = [draft for draft in drafts if draft.origin == POLICY]
    synthetic = [draft for draft in drafts if draft.origin != POLICY]
    for part, executors in ((synthetic, references), (policy, pool)):
        codes = [extract_code(draft.response) for draft in part]
        for index, execution in stream_in_chunks(executors, codes):
            yield part[index], execution
