"""Charts that are made by running code: the synthetic ones, and what every such build shares."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmrecoder_jax.data.grammars import GRAMMARS
from mmrecoder_jax.data.sources import Chart, ChartDirectory, png_bytes
from mmrecoder_jax.data.synthetic import INSTRUCTION
from mmrecoder_jax.data.writers import ChartWriter
from mmrecoder_jax.env import EnvConfig, Execution, ExecutorPool, Record, interpreter

CHUNK = 256  # executions whose renders may be in memory at one time


def stream_in_chunks(
    pool: ExecutorPool, codes: Sequence[str | None], chunk: int = CHUNK
) -> Iterator[tuple[int, Execution]]:
    """`pool.stream` that holds at most `chunk` renders in memory."""
    for start in range(0, len(codes), chunk):
        for index, execution in pool.stream(codes[start : start + chunk]):
            yield start + index, execution


def drawn(execution: Execution) -> tuple[np.ndarray, Record]:
    """(pixels, record) of a script that drew a figure."""
    image, record = execution.image, execution.record
    assert image is not None and record is not None, f"not drawn: {execution.status}"
    return image, record


def environment_meta(config: EnvConfig) -> dict[str, Any]:
    """What of the environment decides how charts look.

    It is part of the meta of every data set that was rendered, so that charts of another style are
    never taken for these.
    """
    return {
        "dpi": config.dpi,
        "rc_params": dict(config.rc_params),
        "matplotlib": interpreter.find(config.python).releases["matplotlib"],
    }


def build_synthetic(
    directory: str | os.PathLike[str],
    split: str,
    count: int,
    seed: int,
    pool: ExecutorPool,
    progress: Callable[[int, int], None] | None = None,
    grammar: str = "words",
) -> ChartDirectory:
    """The first `count` synthetic charts of a split, rendered in `pool`.

    Nothing is done where they are there already.

    Args:
      progress: called with (charts done, charts in all) after each chart.
      grammar: one of `GRAMMARS`.

    Raises:
      ValueError: `directory` holds something else (another seed, count, grammar or style).
      RuntimeError: a chart of the grammar does not run in `pool`.
    """
    directory = Path(directory)
    codes = _codes(split, count, seed, grammar)
    meta = _meta(split, codes, seed, pool.config)
    if directory.exists():
        return _same_charts(directory, meta)
    writer = ChartWriter(directory, meta)
    todo = [name for name in codes if name not in writer.done]
    for index, execution in stream_in_chunks(pool, [codes[name] for name in todo]):
        name, code = todo[index], codes[todo[index]]
        if not execution.ok:
            raise RuntimeError(
                f"synthetic chart {name} does not run ({execution.status}): {execution.error}\n"
                f"{code}"
            )
        image, record = drawn(execution)
        chart = Chart(
            id=name,
            image=png_bytes(image),
            code=code,
            record=record,
            instruction=INSTRUCTION,
            source=f"synthetic seed {seed}",
            licence="Apache-2.0",
        )
        writer.add(chart)
        if progress:
            progress(len(writer.done), count)
    return writer.finish()


def check_synthetic(
    directory: str | os.PathLike[str],
    split: str,
    count: int,
    seed: int,
    config: EnvConfig,
    grammar: str,
) -> ChartDirectory:
    """The charts of `build_synthetic` that are in `directory`; nothing is executed.

    Raises:
      ValueError: `directory` holds something else (another seed, count, grammar or style).
    """
    return _same_charts(
        Path(directory), _meta(split, _codes(split, count, seed, grammar), seed, config)
    )


def _codes(split: str, count: int, seed: int, grammar: str) -> dict[str, str]:
    """The code of each chart of a split, by its id."""
    return {
        f"{split}-{index:06d}": GRAMMARS[grammar].chart_spec(seed, index, split).code()
        for index in range(count)
    }


def _meta(split: str, codes: dict[str, str], seed: int, config: EnvConfig) -> dict[str, Any]:
    return {
        "name": f"synthetic-{split}",
        "licence": "Apache-2.0",
        "seed": seed,
        "count": len(codes),
        "grammar": hashlib.sha256("\n".join(codes.values()).encode()).hexdigest()[:16],
    } | environment_meta(config)


def _same_charts(directory: Path, meta: dict[str, Any]) -> ChartDirectory:
    """The charts that are there; raises ValueError where their meta is another."""
    charts = ChartDirectory(directory)
    wanted = json.loads(json.dumps(meta))  # as it comes back from a file: tuples become lists
    wrong = [name for name in wanted if charts.meta.get(name) != wanted[name]]
    if wrong:
        raise ValueError(
            f"{directory} holds other charts ({', '.join(wrong)} differ); remove it or build "
            "elsewhere"
        )
    return charts
