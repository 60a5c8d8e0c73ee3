"""Micro-batches of distinct tokens, looked at row by row."""

import numpy as np


def by_row(batch, values):
    """What `values` `[P, T]` say of the tokens of each row of a micro-batch, in order."""
    rows, parts = np.asarray(batch["rows"]), len(values)
    own = len(rows) // parts
    return [np.asarray(values)[r // own][row[row >= 0]] for r, row in enumerate(rows)]


def written(batch, values):
    """The same of the tokens that carry loss."""
    pairs = zip(by_row(batch, values), by_row(batch, batch["weights"]), strict=True)
    return [of_row[weights != 0] for of_row, weights in pairs]


def first_micro(batch):
    """The first micro-batch of a batch."""
    return {name: x[0] for name, x in batch.items()}
