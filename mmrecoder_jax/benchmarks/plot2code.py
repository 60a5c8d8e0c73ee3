"""Plot2Code's text-match and pass rate.

No model code runs in this process.

    pass          the script ran to its end, and its picture is not all white
    text-match    m / (m + unmatched texts of the reference + unmatched texts of the generated
                  figure), where m texts match; 1 where there are no texts at all

Texts match greedily in the reference's order: with the first equal text (case and outer blanks
apart) whose position, scaled by the ratio of the figures' sizes, is nearer than 22.3 (exp(-d / 100)
> 0.8). The official evaluator looks for the text with the smallest edit distance and takes it at a
distance of 0 only, which is the same. A generated script that has a figure called `fig1` is
compared with that, whatever the reference drew (`child.plot2code_recorder`). Text-match is reported
over passing scripts, and over all with 0 for the others.
"""

import math

from mmrecoder_jax.benchmarks.chartmimic_official import TargetFailed
from mmrecoder_jax.env.pools import Pools
from mmrecoder_jax.env.records import Plot2CodeRecord
from mmrecoder_jax.env.wire import RecordKind

SECONDS = 30.0  # the official limit of a script
_SIMILARITY, _SCALE = 0.8, 100.0


def text_match(generated: Plot2CodeRecord, target: Plot2CodeRecord) -> float:
    """The text-match score, in [0, 1]."""
    left = list(generated.texts)
    ratio = target.size[0] / generated.size[0], target.size[1] / generated.size[1]
    matched = 0
    for text, x, y in target.texts:
        for index, (other, u, v) in enumerate(left):
            if other != text or x is None or y is None or u is None or v is None:
                continue
            distance = math.hypot(x - u * ratio[0], y - v * ratio[1])
            if math.exp(-distance / _SCALE) > _SIMILARITY:
                del left[index]
                matched += 1
                break
    pairs = matched + (len(target.texts) - matched) + len(left)
    return matched / pairs if pairs else 1.0


def plot2code_pair(pools: Pools, gt_code: str, gen_code: str | None) -> tuple[bool, float]:
    """Whether the generated script passes, and its text-match: 0 where it does not pass.

    Raises:
      TargetFailed: the reference script did not run to its end.
    """
    target_run = pools.references.submit(gt_code, RecordKind.PLOT2CODE_TARGET)
    run = pools.answers.submit(gen_code, RecordKind.PLOT2CODE)
    target = target_run.result().record
    if target is None:
        raise TargetFailed(f"the reference script failed: {target_run.result().error}")
    record = run.result().record
    if record is None or record.white:
        return False, 0.0
    return True, text_match(record, record.fig1 or target)
