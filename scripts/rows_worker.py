"""Trains an RL stage whose updates have their rows together, apart or padded (`rows_apart.py`)."""

from collections.abc import Sequence

import numpy as np
from absl import flags
from jaxtyping import Bool, Int
from ml_collections import ConfigDict

from mmrecoder_jax import cli, pipeline
from mmrecoder_jax.data import batching
from mmrecoder_jax.data.batching import TokenRow

KINDS = ("together", "apart", "padded")
Slots = tuple[Int[np.ndarray, " L"], Bool[np.ndarray, " L"]]


class Apart:
    """Slots for the tokens of rows of which each has its own; see `batching.DistinctTokens`."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, row: TokenRow) -> Slots:
        """(slot of each token of a row, whether the token is new: all are)."""
        first, self.count = self.count, self.count + self.cost(row)
        return np.arange(first, first + row.length, dtype=np.int32), np.ones(row.length, bool)

    def cost(self, row: TokenRow) -> int:
        """How many slots a row takes."""
        return row.length


def padded(lengths: Sequence[int]) -> type[Apart]:
    """Slots for rows behind each of which is padding: up to the shortest bucket that has room."""

    class Padded(Apart):
        def cost(self, row: TokenRow) -> int:
            return batching.bucket(row.length, lengths, "a row length (data.lengths)")

    return Padded


def main(config: ConfigDict, workdir: str) -> None:
    """Runs a stage with the rows that `--rows` asks for."""
    kind = flags.FLAGS.rows
    if kind != "together":
        slots = Apart if kind == "apart" else padded(tuple(config.data.lengths))
        vars(batching)["DistinctTokens"] = slots
    pipeline.run_stage(config, workdir)


if __name__ == "__main__":
    flags.DEFINE_enum("rows", "together", KINDS, "How the rows of an update stand.")
    cli.run(("stage1", "stage2"), main)
