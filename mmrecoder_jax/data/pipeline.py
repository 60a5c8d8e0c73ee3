"""grain pipelines: charts and dialogues -> token rows -> learner batches; charts -> prompts.

Supervised rows and sampled trajectories become batches through the same two steps, rows
(`TokenRow`) and `batching.Collate`. Iterators are checkpointed with the parameters, so a resumed
run sees the batches an uninterrupted one would have seen.
"""

from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from mmrecoder_jax.data.batching import Collate, Piece, TokenRow
from mmrecoder_jax.data.sources import Chart, Dialogue
from mmrecoder_jax.data.synthetic import response_text, think_text
from mmrecoder_jax.models.processor import Processor


def single_turn_row(chart: Chart, processor: Processor) -> TokenRow:
    """(image, code) as one turn to learn; the thought is a plain description of the code (no
    teacher).
    """
    prompt = processor.first_prompt(chart.instruction, processor.image(chart.image))
    response = processor.response(response_text(think_text(chart.code), chart.code))
    return TokenRow((Piece.shown(prompt), Piece(response, 1)), loss_turns=(1,))


def dialogue_row(dialogue: Dialogue, processor: Processor) -> TokenRow:
    """A two-turn dialogue; only the last turn is learnt, the first is what went wrong."""
    pieces = [
        Piece.shown(
            processor.first_prompt(
                dialogue.chart.instruction, processor.image(dialogue.chart.image)
            )
        )
    ]
    turns = len(dialogue.responses)
    for turn, response in enumerate(dialogue.responses, start=1):
        pieces.append(Piece(processor.response(response), turn))
        if turn < turns:
            image = dialogue.feedback_image[turn - 1]
            image = processor.image(image) if image else None
            pieces.append(
                Piece.shown(
                    processor.feedback_prompt(dialogue.feedback_text[turn - 1], image, closed=True)
                )
            )
    return TokenRow(tuple(pieces), loss_turns=(turns,))


def rows_of(
    source: Sequence[Any], to_row: Callable[[Any], TokenRow], longest: int
) -> grain.MapDataset:
    """Token rows of a random-access source; rows longer than the largest bucket are left out
    (cutting code would teach broken code).
    """
    return grain.MapDataset.source(source).map(to_row).filter(lambda row: row.length <= longest)


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
    """An endless shuffled stream of learner batches of `batch_size` rows a host, mixed from several
    row data sets by share.
    """
    streams = [
        dataset.seed(seed + i).shuffle().repeat()[host::hosts] for i, dataset in enumerate(datasets)
    ]
    mixed = streams[0] if len(streams) == 1 else grain.MapDataset.mix(streams, shares)
    rows = mixed.to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=2 * batch_size)
    )
    return rows.batch(batch_size, drop_remainder=True, batch_fn=collate)


def held_out(
    dataset: grain.MapDataset, batch_size: int, batches: int, collate: Collate
) -> list[dict[str, np.ndarray]]:
    """The first few batches of a data set, in order, for a held-out loss."""
    rows = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)).batch(
        batch_size, drop_remainder=True, batch_fn=collate
    )
    iterator = iter(rows)
    return [batch for _, batch in zip(range(batches), iterator, strict=False)]


def prompts(
    charts: Sequence[Chart], batch_size: int, *, seed: int, host: int = 0, hosts: int = 1
) -> grain.IterDataset:
    """An endless shuffled stream of `batch_size` charts a host. Nothing is prefetched below the
    rollout, which must see today's policy.
    """
    stream = grain.MapDataset.source(charts).seed(seed).shuffle().repeat()[host::hosts]
    return stream.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)).batch(
        batch_size, drop_remainder=True, batch_fn=list
    )


def learner_batch(rows: Sequence[TokenRow], collate: Collate) -> dict[str, np.ndarray]:
    """One update's trajectories as a learner batch, through the transform that supervised rows
    take.
    """
    return grain.MapDataset.source(list(rows)).batch(len(rows), batch_fn=collate)[0]
