"""Defines a judge, and lets it compare a render with its target.

    python examples/judge_of_your_own.py

A judge gives the `Model` part of the reward. A subclass of `Judge` overrides `ask` alone; the base
class asks equal pairs once, keeps the verdicts and ends the run when too many pairs in a row have
no score. CONTRIBUTING.md says how a judge becomes a value of `reward.judge`.
"""

import io

import numpy as np
from PIL import Image

from mmrecoder_jax.rl.judge.base import Answer, Judge, Verdict, VerdictCache


class InkJudge(Judge):
    """Compares how much of the paper two charts cover: 1 for equal shares, 0 at the far end."""

    def __init__(self, cache: VerdictCache):
        # The identity is part of the cache's key: change it whenever the score changes.
        super().__init__("ink", identity="share of dark pixels, v1", cache=cache, max_failures=1)

    def ask(self, target: bytes, render: np.ndarray, answer: Answer) -> None:
        # A slow judge would start a thread here and call `answer` when it is done.
        with Image.open(io.BytesIO(target)) as image:
            difference = abs(ink(np.asarray(image.convert("RGB"))) - ink(render))
        answer(Verdict(score=1.0 - difference))


def ink(pixels: np.ndarray) -> float:
    """The share of pixels that are not nearly white, for uint8 pixels `[height, width, 3]`."""
    return float((pixels.min(axis=-1) < 250).mean())


def page(dark_columns: int) -> np.ndarray:
    """A white picture of 100 x 40 pixels whose first columns are black."""
    pixels = np.full((40, 100, 3), 255, np.uint8)
    pixels[:, :dark_columns] = 0
    return pixels


def main() -> None:
    target = io.BytesIO()
    Image.fromarray(page(50)).save(target, "PNG")
    with InkJudge(VerdictCache()) as judge:  # in memory; VerdictCache(directory) keeps verdicts
        for dark in (50, 20, 20):
            verdict = judge.submit(target.getvalue(), page(dark)).result()
            print(f"{dark} of 100 columns dark: score {verdict.score}")
        stats = judge.stats()
    print(f"{stats['requests']} requests, {stats['cache_hits']} answered from the cache")


if __name__ == "__main__":
    main()
