"""grain pipelines: charts and dialogues -> token rows -> learner batches; charts -> prompts.

Supervised rows and sampled trajectories become batches through the same two steps, rows
(`TokenRow`) and `batching.Collate`. Iterators are checkpointed with the parameters, so a resumed
run sees the batches an uninterrupted one would have seen.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar

import grain
import numpy as np

from mmrecoder_jax.data.batching import Collate, Piece, TokenRow
from mmrecoder_jax.data.sources import Chart, Dialogue, RandomAccess
from mmrecoder_jax.data.survey import BadRows, Readable
from mmrecoder_jax.env.response import response_text, think_text
from mmrecoder_jax.models.processor import Processor

Item = TypeVar("Item")


def single_turn_row(chart: Chart, processor: Processor, outline: bool = False) -> TokenRow:
    """(image, code) as one turn to learn.

    The thought is a plain description of the code: there is no teacher to think.

    Args:
      outline: images have their sizes alone, for counting (`Processor.outline`).
    """
    look = processor.outline if outline else processor.image
    prompt = processor.first_prompt(chart.instruction, look(chart.image))
    response = processor.response(response_text(think_text(chart.code), chart.code))
    return TokenRow((Piece.shown(prompt), Piece(response, 1)), loss_turns=(1,))


def dialogue_row(dialogue: Dialogue, processor: Processor, outline: bool = False) -> TokenRow:
    """A two-turn dialogue; only the last turn is learnt, the first is what went wrong.

    Args:
      outline: see `single_turn_row`.
    """
    look = processor.outline if outline else processor.image
    chart = dialogue.chart
    prompt = processor.first_prompt(chart.instruction, look(chart.image))
    pieces = [Piece.shown(prompt), Piece(processor.response(dialogue.responses[0]), 1)]
    later = zip(
        dialogue.feedback_text, dialogue.feedback_image, dialogue.responses[1:], strict=True
    )
    for turn, (text, png, response) in enumerate(later, start=2):
        image = look(png) if png else None
        pieces.append(Piece.shown(processor.feedback_prompt(text, image, closed=True)))
        pieces.append(Piece(processor.response(response), turn))
    return TokenRow(tuple(pieces), loss_turns=(len(dialogue.responses),))


def rows_of(
    source: RandomAccess[Item],
    to_row: Callable[[Item], TokenRow],
    longest: int,
    bad: BadRows,
    kept: np.ndarray | None = None,
) -> grain.MapDataset:
    """Token rows of a random-access source.

    Rows longer than the largest bucket are left out: cutting code would teach broken code. So are
    bad ones, which `bad` counts.

    Args:
      kept: numbers of the rows that are wanted (`survey.survey`), so that shares and epochs speak
        of them; all by default.
    """
    rows = Readable(source, to_row, bad, kept)
    return grain.MapDataset.source(rows).filter(lambda row: row.length <= longest)


def supervised(
    datasets: Sequence[grain.MapDataset],
    shares: Sequence[float],
    batch_size: int,
    collate: Collate,
    *,
    seed: int,
    host: int = 0,
    hosts: int = 1,
) -> grain.IterDataset:
    """An endless shuffled stream of learner batches, mixed from several row data sets by share.

    Args:
      batch_size: rows per host.
      host, hosts: which of how many this is; each reads its own rows.
    """
    # Hosts take their part of the shuffled stream, so each sees other rows in every epoch. Each
    # data set has a seed of its own, or two of equal length would be shuffled alike.
    streams = [
        dataset.seed(seed + i).shuffle().repeat()[host::hosts] for i, dataset in enumerate(datasets)
    ]
    mixed = streams[0] if len(streams) == 1 else grain.MapDataset.mix(streams, shares)
    # Two batches ahead: the device does not wait while images are cut into patches.
    rows = mixed.to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=2 * batch_size)
    )
    return rows.batch(batch_size, drop_remainder=True, batch_fn=collate)


def held_out(
    dataset: grain.MapDataset, batch_size: int, batches: int, collate: Collate
) -> list[dict[str, np.ndarray]]:
    """The first few batches of a data set, in order, for a held-out loss."""
    rows = _unread(dataset).batch(batch_size, drop_remainder=True, batch_fn=collate)
    return list(itertools.islice(rows, batches))


def prompts(
    charts: RandomAccess[Chart],
    batch_size: int,
    processor: Processor,
    bad: BadRows,
    *,
    seed: int,
    host: int = 0,
    hosts: int = 1,
) -> grain.IterDataset:
    """An endless shuffled stream of lists of charts, `batch_size` per host.

    Nothing is prefetched below the rollout, which must see today's policy. Charts whose image
    cannot be read are left out, and `bad` counts them.
    """

    def whole(chart: Chart) -> Chart:
        processor.image(chart.image)  # which the rollout then finds in the cache
        return chart

    source = Readable(charts, whole, bad)
    stream = grain.MapDataset.source(source).seed(seed).shuffle().repeat()[host::hosts]
    return _unread(stream).batch(batch_size, drop_remainder=True, batch_fn=list)


def _unread(dataset: grain.MapDataset) -> grain.IterDataset:
    """A stream that reads an item when it is asked for and none before, in this thread."""
    return dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))


def learner_batch(rows: Sequence[TokenRow], collate: Collate) -> dict[str, np.ndarray]:
    """One update's trajectories as a learner batch, by the transform that supervised rows take."""
    return grain.MapDataset.source(list(rows)).batch(len(rows), batch_fn=collate)[0]
