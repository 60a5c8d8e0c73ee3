"""Scores a chart script against a reference script by ChartMimic's low-level metrics.

    python examples/score_one_chart.py

Both scripts run in the sandbox, each in a pool of its own. A recorder notes what they draw: texts,
layout, chart types and colours. The metrics compare the two records; they never read the code. For
many pairs in a file use `python -m mmrecoder_jax.env.score`.
"""

from mmrecoder_jax.env.chartmimic import score
from mmrecoder_jax.env.execution import EnvConfig
from mmrecoder_jax.env.pools import separate_pools

REFERENCE = """
import matplotlib.pyplot as plt
plt.bar(["north", "south"], [3, 5], color="#336699")
plt.title("Harvest")
plt.ylabel("tonnes")
plt.show()
"""
# One of the two texts is wrong; everything else is right.
GENERATED = REFERENCE.replace("Harvest", "Rainfall")


def main() -> None:
    with separate_pools(EnvConfig(workers=1, preload=("numpy", "matplotlib"))) as pools:
        reference = pools.references.submit(REFERENCE).result()
        generated = pools.answers.submit(GENERATED).result()
    if reference.record is None:
        raise SystemExit(f"the reference script failed: {reference.error}")
    # A script that fails makes no picture, so it scores 0 on every part.
    scores = score(generated.record if generated.ok else None, reference.record)
    for part in ("text", "layout", "type", "color", "overall"):
        print(f"{part:8} {getattr(scores, part):.3f}")


if __name__ == "__main__":
    main()
