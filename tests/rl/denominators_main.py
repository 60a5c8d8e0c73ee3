"""What `test_denominators` starts: the same updates on eight devices, of one process or of several.

python -m tests.rl.denominators_main OUT

Writes OUT/<process>.npz: the table that each case of `CASES` ends with, and its losses.
"""

import os
import sys

import jax
import numpy as np

from mmrecoder_jax.learner import distributed
from tests.rl.denominators import AGGREGATIONS, GROUP, rows_of, trained

DEVICES, RATE = 8, 20.0  # that large, so that a wrong weight moves the table visibly
# name -> fields of rl, mini-batches, rows of a micro-batch over all hosts, budget of tokens
CASES = {
    **{f"whole {name}": ({"aggregation": name}, 1, 32, 0) for name in AGGREGATIONS},
    **{f"micro {name}": ({"aggregation": name}, 1, 16, 0) for name in AGGREGATIONS},
    **{f"mini {name}": ({"aggregation": name}, 2, 8, 0) for name in AGGREGATIONS},
    "budget": ({"aggregation": "token_mean", "kl_coef": 0.3}, 2, 16, 256),
    "gspo": ({"aggregation": "sequence_mean", "objective": "gspo"}, 2, 16, 0),
}


def main(out: str) -> None:
    hosts = int(os.environ.get("JAX_NUM_PROCESSES", "1"))
    jax.config.update("jax_num_cpu_devices", DEVICES // hosts)
    distributed.start()
    rows = rows_of(shared=True)
    groups = [rows[i : i + GROUP] for i in range(0, len(rows), GROUP)]
    own = [row for group in distributed.own_share(groups) for row in group]
    found = {}
    for name, (fields, parts, micro_rows, budget) in CASES.items():
        losses, table, _ = trained(own, fields, parts, micro_rows // hosts, budget, RATE)
        found |= {f"{name} losses": losses, f"{name} table": table}
    np.savez(os.path.join(out, f"{jax.process_index()}.npz"), **found)


if __name__ == "__main__":
    main(sys.argv[1])
