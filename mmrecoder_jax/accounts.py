"""The accounts of a stage's data: what is learnt from, what is left out and why, said and kept.

    found = accounts.survey_rows(config, workdir, "charts", charts, to_row, bad)    before training
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
from mmrecoder_jax.learner import distributed
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
    """The next batch; raises ConfigError where too many rows are bad."""
    with bad_rows_named():
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
    """Counts what of a source no bucket holds, and says it.

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

    with bad_rows_named():
        found = survey(
            source,
            measure,
            max(config.data.lengths),
            max(config.data.windows),
            bad,
            cache=_cache(config, workdir, name, source) if distributed.is_main() else None,
            each=lambda numbers: bar(f"lengths of {name}", numbers, unit="row"),
        )
    if distributed.is_main():
        _keep(config.stage, workdir, name, found)
    left = f"{len(found.kept)} of {found.rows} {name} fit data.lengths and data.windows"
    why = (
        f"{found.too_long} are longer than {max(config.data.lengths)} tokens (data.lengths), "
        f"{found.too_wide} have images of more than {max(config.data.windows)} windows "
        f"(data.windows), {found.bad} are bad"
    )
    missing = found.rows - len(found.kept)
    few = missing and (len(found.kept) < config.train.batch_size or missing > len(found.kept))
    if few or not found.rows:
        raise ConfigError(
            f"{left}: {why}; too few to learn from (a batch and half of the rows are the least). "
            f"The longest row has {found.longest} tokens, half of them have at most "
            f"{found.lengths_for_half}: raise the largest of data.lengths={config.data.lengths}"
        )
    if missing:
        print(f"{left}; left out: {why}", flush=True)
    return found


def _cache(config: ConfigDict, workdir: str, name: str, source: Any) -> Path:
    """Where the lengths of a source are kept; another file or processor is another place."""
    settings = [name, source.stamp(), config.processor.to_dict(), config.data.instruction]
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    return Path(workdir) / "lengths" / f"{digest}.npy"


def _keep(stage: str, workdir: str, name: str, found: Survey) -> None:
    path = Path(workdir) / f"data_{stage}.json"
    kept = json.loads(path.read_text()) if path.is_file() else {}
    os.makedirs(workdir, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(kept | {name: found.counts()}, indent=1))
    temporary.replace(path)
