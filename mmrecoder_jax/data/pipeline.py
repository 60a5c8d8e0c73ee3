"""grain pipelines: charts and dialogues -> token rows -> learner batches; charts -> prompts.

Supervised rows and sampled trajectories become batches through the same two steps, rows
(`TokenRow`) and `batching.Collate`, which hosts call together. Iterators are checkpointed with the
parameters, so a resumed run sees the batches an uninterrupted one would have seen.
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
    image, *more = map(look, chart.images)
    prompt = processor.first_prompt(chart.instruction, image, more)
    response = processor.response(response_text(think_text(chart.code), chart.code))
    return TokenRow((Piece.shown(prompt), Piece(response, 1)), loss_turns=(1,))


def dialogue_row(dialogue: Dialogue, processor: Processor, outline: bool = False) -> TokenRow:
    """A two-turn dialogue; only the last turn is learnt, the first is what went wrong.

    Args:
      outline: see `single_turn_row`.
    """
    look = processor.outline if outline else processor.image
    chart = dialogue.chart
    image, *more = map(look, chart.images)
    prompt = processor.first_prompt(chart.instruction, image, more)
    pieces = [Piece.shown(prompt), Piece(processor.response(dialogue.responses[0]), 1)]
    later = zip(
        dialogue.feedback_text, dialogue.feedback_images, dialogue.responses[1:], strict=True
    )
    for turn, (text, pngs, response) in enumerate(later, start=2):
        images = [look(png) for png in pngs]
        pieces.append(Piece.shown(processor.feedback_prompt(text, images, closed=True)))
        pieces.append(Piece(processor.response(response), turn))
    return TokenRow(tuple(pieces), loss_turns=(len(dialogue.responses),))


def rows_of(
    source: RandomAccess[Item],
    to_row: Callable[[Item], TokenRow],
    longest: int,
    widest: int,
    bad: BadRows,
    kept: np.ndarray | None = None,
) -> grain.MapDataset:
    """Token rows of a random-access source.

    Rows longer than the largest bucket are left out: cutting code would teach broken code. So are
    those with an image of more windows than the largest bucket, and bad ones, which `bad` counts.

    Args:
      longest, widest: the largest buckets.
      kept: numbers of the rows that are wanted (`survey.survey`), so that shares and epochs speak
        of them; all by default.
    """
    rows = Readable(source, to_row, bad, kept)

    def fits(row: TokenRow) -> bool:
        windows = max((image.patches.shape[0] for image in row.images), default=0)
        return row.length <= longest and windows <= widest

    return grain.MapDataset.source(rows).filter(fits)


def supervised(
    datasets: Sequence[grain.MapDataset],
    shares: Sequence[float],
    batch_size: int,
    *,
    seed: int,
    host: int = 0,
    hosts: int = 1,
) -> grain.IterDataset:
    """An endless shuffled stream of lists of rows, mixed from several row data sets by share.

    Args:
      batch_size: rows per host.
      host, hosts: which of how many this is; each reads its own rows.
    """
    # Each data set has a seed of its own, or two of equal length would be shuffled alike. Hosts
    # take their part of what one host would see, so that together they see the same batches.
    streams = [dataset.seed(seed + i).shuffle().repeat() for i, dataset in enumerate(datasets)]
    mixed = streams[0] if len(streams) == 1 else grain.MapDataset.mix(streams, shares)
    # Two batches ahead: the device does not wait while images are cut into patches.
    rows = mixed[host::hosts].to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=2 * batch_size)
    )
    return rows.batch(batch_size, drop_remainder=True, batch_fn=list)


def held_out(dataset: grain.MapDataset, batch_size: int, batches: int) -> list[list[TokenRow]]:
    """The rows of the first few batches of a data set, in order, for a held-out loss."""
    rows = _unread(dataset).batch(batch_size, drop_remainder=True, batch_fn=list)
    return list(itertools.islice(rows, batches))


def prompts(
    charts: RandomAccess[Chart],
    batch_size: int,
    processor: Processor,
    bad: BadRows,
    kept: np.ndarray | None = None,
    *,
    seed: int,
    host: int = 0,
    hosts: int = 1,
) -> grain.IterDataset:
    """An endless shuffled stream of lists of charts, `batch_size` per host.

    Nothing is prefetched below the rollout, which must see today's policy. Charts with an image
    that cannot be read are left out, and `bad` counts them.

    Args:
      kept: numbers of the charts that are wanted; all by default.
    """

    def whole(chart: Chart) -> Chart:
        for image in chart.images:
            processor.image(image)  # which the rollout then finds in the cache
        return chart

    source = Readable(charts, whole, bad, kept)
    stream = grain.MapDataset.source(source).seed(seed).shuffle().repeat()[host::hosts]
    return _unread(stream).batch(batch_size, drop_remainder=True, batch_fn=list)


def _unread(dataset: grain.MapDataset) -> grain.IterDataset:
    """A stream that reads an item when it is asked for and none before, in this thread."""
    return dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))


def learner_batch(rows: Sequence[TokenRow], collate: Collate) -> dict[str, np.ndarray]:
    """One update's trajectories as a learner batch, by the transform that supervised rows take."""
    return grain.MapDataset.source(list(rows)).batch(len(rows), batch_fn=collate)[0]
