"""The similarity of the pixels, for machines without a judge."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image
from scipy import ndimage

from mmrecoder_jax.images import decode
from mmrecoder_jax.rl.judge.base import Answer, Judge, Verdict, VerdictCache


class VisualJudge(Judge):
    """Scores with `similarity`: no model, no dimensions."""

    def __init__(self, cache: VerdictCache):
        # the number changes with the definition of the similarity: old scores are then unknown
        super().__init__("visual", "visual similarity 1", cache, max_failures=1)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="judge")

    def ask(self, target: bytes, render: np.ndarray, answer: Answer) -> None:
        def judge() -> None:
            try:
                found = Verdict(similarity(np.asarray(decode(target)), render))
            except Exception as problem:  # whatever it is, the trainer waits for a verdict
                text = f"{type(problem).__name__}: {problem}"
                found = Verdict(None, problem=text, of_pair=True)
            answer(found)

        self._thread.submit(judge)

    def close(self) -> None:
        self._thread.shutdown()
        super().close()


_SIDE = 192  # both pictures are scaled to so many pixels per side
_BINS = 4  # per colour channel
_INK = 24  # a pixel is inked if it differs from the background by more levels (of 255)


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """How alike two pictures are, from 0 to 1 for equal ones.

    The mean of two numbers, times the ratio of the aspect ratios: the structural similarity (Wang
    et al. 2004) over the pixels that either picture has inked, and the overlap of the colour
    histograms of the inked pixels. White paper counts for nothing. Deterministic.

    Args:
      a, b: uint8 pixels `[height, width, 3]`; the sizes may differ.
    """
    if a.shape == b.shape and np.array_equal(a, b):
        return 1.0
    aspects = sorted((a.shape[1] / a.shape[0], b.shape[1] / b.shape[0]))
    small = [
        np.asarray(Image.fromarray(x).resize((_SIDE, _SIDE), Image.Resampling.BOX), np.float64)
        for x in (a, b)
    ]
    # the median is the background: a chart is mostly paper
    inks = [np.abs(x - np.median(x, axis=(0, 1))).max(-1) > _INK for x in small]
    if not inks[0].any() or not inks[1].any():
        return 0.0
    where = ndimage.binary_dilation(inks[0] | inks[1], iterations=2)
    structure = _structure(*(x @ (0.299, 0.587, 0.114) for x in small))[where].mean()
    histograms = [_histogram(x[ink]) for x, ink in zip(small, inks, strict=True)]
    color = np.minimum(*histograms).sum()
    return float(np.clip((max(structure, 0.0) + color) / 2 * aspects[0] / aspects[1], 0.0, 1.0))


def _structure(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The structural similarity of two grey pictures around each pixel (windows of 7 pixels)."""

    def mean(z: np.ndarray) -> np.ndarray:
        return ndimage.uniform_filter(z, 7)

    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    # the constants of the paper, for 255 levels: they keep flat windows from dividing by zero
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return (2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))


def _histogram(pixels: np.ndarray) -> np.ndarray:
    """The shares of the _BINS**3 colours among pixels `[n, 3]`."""
    bins = (pixels / 256 * _BINS).astype(int) @ (1, _BINS, _BINS * _BINS)
    return np.bincount(bins, minlength=_BINS**3) / len(pixels)
