"""The accounts of a stage's data: what is learnt from, what is left out and why, said and kept.

    found = accounts.survey_rows(config, workdir, "charts", charts, to_row, bad)    before training
    found = accounts.survey_prompts(config, workdir, charts, processor, bad, 2)    in RL stages
    batch = accounts.next_of(iterator)                                              in every step

The counts are printed, and kept in `<workdir>/data_<stage>.json`.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from ml_collections import ConfigDict

from mmrecoder_jax.config import ConfigError
from mmrecoder_jax.data.batching import TokenRow
from mmrecoder_jax.data.sources import RandomAccess
from mmrecoder_jax.data.survey import BadRows, Survey, TooManyBadRows, survey
from mmrecoder_jax.env.chart_env import FeedbackImage
from mmrecoder_jax.learner import distributed
from mmrecoder_jax.models.processor import Processor
from mmrecoder_jax.monitoring.progress import bar

T = TypeVar("T")


def bad_rows(config: ConfigDict, source: RandomAccess[Any]) -> BadRows:
    """A counter of the bad rows of a source, with the limit of `data.max_bad_rows`."""
    limit = config.data.max_bad_rows
    if not limit >= 0:
        raise ConfigError(
            f"data.max_bad_rows={limit}: use 0, a number of rows, or a share of them below 1"
        )
    return BadRows.of(limit, len(source))


def next_of(iterator: Iterator[T]) -> T:
    """The next batch of every host; raises ConfigError where one of them met too many bad rows."""
    with distributed.together(), bad_rows_named():
        return next(iterator)


@contextlib.contextmanager
def bad_rows_named() -> Iterator[None]:
    """Inside, too many bad rows are a ConfigError."""
    try:
        yield
    except TooManyBadRows as error:
        raise ConfigError(str(error)) from error


def survey_rows(
    config: ConfigDict,
    workdir: str,
    name: str,
    source: Any,
    outline: Callable[[Any], TokenRow],
    bad: BadRows,
) -> Survey:
    """Counts what of a source no bucket holds, and says it. All hosts call it together.

    Args:
      name: what messages call the source.
      source: of charts or dialogues.
      outline: the row of an item, its images by their sizes alone.

    Raises:
      ConfigError: too many bad rows, or too few rows are left to learn from.
    """

    def measure(item: Any) -> tuple[int, int]:
        row = outline(item)
        return row.length, max((image.patches.shape[0] for image in row.images), default=0)

    longest = max(config.data.lengths)
    remedy = f"raise the largest of data.lengths={config.data.lengths}"
    return _survey(config, workdir, name, source, measure, longest, "data.lengths", remedy, bad)


def survey_prompts(
    config: ConfigDict,
    workdir: str,
    source: Any,
    processor: Processor,
    bad: BadRows,
    turns: int,
) -> Survey:
    """Counts the charts that leave no room for a conversation of so many turns, and says it.

    A chart is left out where its first prompt does not fit `rl.prompt_length`, or the feedback on a
    render of its own size does not fit `rl.feedback_length`.

    Raises:
      ConfigError: too many bad rows, or too few charts are left.
    """
    rl = config.rl
    room = rl.feedback_length if turns > 1 else 0

    def measure(chart: Any) -> tuple[int, int]:
        image, *more = map(processor.outline, chart.images)
        length = len(processor.first_prompt(chart.instruction, image, more).ids)
        if room:
            text = config.feedback.render
            images = [image] * FeedbackImage(config.feedback.image).pictures
            feedback = len(processor.feedback_prompt(text, images, closed=False).ids)
            length = max(length, feedback - room + rl.prompt_length)  # as long as it misses room
        return length, max(shown.patches.shape[0] for shown in (image, *more))

    fields = "rl.prompt_length" + (" or rl.feedback_length" if room else "")
    remedy = f"raise rl.prompt_length={rl.prompt_length}"
    remedy += f", rl.feedback_length={room}" if room else ""
    remedy += f" or the largest of data.windows={config.data.windows}, and data.lengths with them"
    return _survey(
        config, workdir, "prompts", source, measure, rl.prompt_length, fields, remedy, bad
    )


def _survey(
    config: ConfigDict,
    workdir: str,
    name: str,
    source: Any,
    measure: Callable[[Any], tuple[int, int]],
    longest: int,
    fields: str,
    remedy: str,
    bad: BadRows,
) -> Survey:
    found: list[Survey] = []

    def look(bad: BadRows, write: bool) -> None:
        with bad_rows_named():
            found.append(
                survey(
                    source,
                    measure,
                    longest,
                    max(config.data.windows),
                    bad,
                    cache=_cache(config, workdir, name, source),
                    write=write,
                    each=lambda numbers: bar(f"lengths of {name}", numbers, unit="row"),
                )
            )

    with distributed.together():
        if distributed.is_main():
            look(bad, True)
            _keep(config.stage, workdir, name, found[0])
    with distributed.together():
        if not distributed.is_main():  # reads the sizes that the main host has measured
            with bad.silent():
                look(bad, False)
    _say_left(config, name, found[0], longest, fields, remedy)
    return found[0]


def _say_left(
    config: ConfigDict, name: str, found: Survey, longest: int, fields: str, remedy: str
) -> None:
    """Says what is left out; raises ConfigError where too little is left."""
    left = f"{len(found.kept)} of {found.rows} {name} fit {fields} and data.windows"
    why = (
        f"{found.too_long} are longer than {longest} tokens ({fields}), "
        f"{found.too_wide} have images of more than {max(config.data.windows)} windows "
        f"(data.windows), {found.bad} are bad"
    )
    missing = found.rows - len(found.kept)
    few = missing and (len(found.kept) < config.train.batch_size or missing > len(found.kept))
    if few or not found.rows:
        raise ConfigError(
            f"{left}: {why}; too few to learn from (a batch and half of the rows are the least). "
            f"The longest row has {found.longest} tokens, half of them have at most "
            f"{found.lengths_for_half}: {remedy}"
        )
    if missing and distributed.is_main():
        print(f"{left}; left out: {why}", flush=True)


def _cache(config: ConfigDict, workdir: str, name: str, source: Any) -> Path:
    """Where the lengths of a source are kept; another file or processor is another place."""
    settings = [name, source.stamp(), config.processor.to_dict(), config.data.instruction]
    if name == "prompts":  # measured against the buckets of a conversation
        settings += [config.rl.to_dict(), config.feedback.to_dict()]
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    return Path(workdir) / "lengths" / f"{digest}.npy"


def _keep(stage: str, workdir: str, name: str, found: Survey) -> None:
    path = Path(workdir) / f"data_{stage}.json"
    kept = json.loads(path.read_text()) if path.is_file() else {}
    os.makedirs(workdir, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(kept | {name: found.counts()}, indent=1))
    temporary.replace(path)
