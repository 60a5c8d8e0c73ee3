"""Plot2Code's text-match and pass rate, without running model code in this process.

    pass          the script ran to its end, and its picture is not all white
    text-match    m / (m + unmatched texts of the reference + unmatched texts of the generated figure); 1 where there are none

Texts match greedily in the reference's order: with the first equal text (case and outer blanks
apart) whose position, scaled by the ratio of the figures' sizes, is nearer than 22.3 (exp(-d / 100)
> 0.8). The official evaluator looks for the text with the smallest edit distance and takes it at a
distance of 0 only, which is the same. Text-match is reported over passing scripts, and over all
with 0 for the others.
"""

import dataclasses
import json
import math

from mmrecoder_jax.benchmarks.chartmimic_official import TargetFailed
from mmrecoder_jax.env.execution import Record
from mmrecoder_jax.env.pool import ExecutorPool

SECONDS = 30.0  # the official limit of a script
_SIMILARITY, _SCALE = 0.8, 100.0


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What one script drew.

    Attributes:
      texts: (text, x, y) of every visible text, lower case; a position is None where it is no
        number.
      size: of the figure, (width, height) in inches.
      white: nothing but white was drawn.
    """

    texts: tuple[tuple[str, float | None, float | None], ...]
    size: tuple[float, float] = (6.4, 4.8)
    white: bool = False

    @classmethod
    def from_record(cls, record: Record) -> "Drawn":
        """Reads the claim of `plot2code_recorder`. Raises ValueError where it is not of that
        form.
        """
        texts = []
        for entry in record.texts:
            row = json.loads(entry)
            if not isinstance(row, list) or len(row) != 3 or not isinstance(row[0], str):
                raise ValueError(f"a text is [text, x, y], not {entry[:80]}")
            if not all(
                value is None or (type(value) in (int, float) and math.isfinite(value))
                for value in row[1:]
            ):
                raise ValueError(f"a position is two finite numbers, not {entry[:80]}")
            texts.append(tuple(row))
        width, height = (float(side) for side in "".join(record.colors).split("x"))
        if not (0 < width < math.inf and 0 < height < math.inf):
            raise ValueError(f"a figure of {width} x {height} inches")
        return cls(tuple(texts), (width, height), bool(record.types.get("white")))


def text_match(generated: Drawn, target: Drawn) -> float:
    """The text-match score, in [0, 1]."""
    left = list(generated.texts)
    ratio = target.size[0] / generated.size[0], target.size[1] / generated.size[1]
    matched = 0
    for text, x, y in target.texts:
        for index, (other, u, v) in enumerate(left):
            if other == text and None not in (x, y, u, v):
                distance = math.hypot(x - u * ratio[0], y - v * ratio[1])
                if math.exp(-distance / _SCALE) > _SIMILARITY:
                    del left[index]
                    matched += 1
                    break
    pairs = matched + len(target.texts) - matched + len(left)
    return matched / pairs if pairs else 1.0


def plot2code_pair(pool: ExecutorPool, gt_code: str, gen_code: str | None) -> tuple[bool, float]:
    """(whether the generated script passes, its text-match with the reference: 0 where it does not
    pass).

    Raises:
      TargetFailed: the reference script did not run to its end.
    """
    target, generated = (
        pool.submit(gt_code, record="plot2code_target"),
        pool.submit(gen_code, record="plot2code"),
    )
    drawn = _drawn(target.result().record)
    if drawn is None:
        raise TargetFailed(f"the reference script failed: {target.result().error}")
    found = _drawn(generated.result().record)
    if found is None or found.white:
        return False, 0.0
    return True, text_match(found, drawn)


def _drawn(record: Record | None) -> Drawn | None:
    """None for a script that failed, or that claims what cannot be."""
    try:
        return None if record is None else Drawn.from_record(record)
    except (ValueError, RecursionError):
        return None
