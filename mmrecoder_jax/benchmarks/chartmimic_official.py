"""ChartMimic's official low-level scores of a pair of scripts, defects included, without running
model code in this process.

The official evaluator writes prefix + script + suffix to a file for each of four parts and runs it
in a new interpreter. Here a script is prepared the same way and run in the executors: once for the
text (ticks are removed in the middle of that script) and once for the other three parts. The four
are run one by one, as the official evaluator does, only for scripts where a hook can disturb
another part: where one raised, and where seaborn is used, which asks methods for their names.

Two readings of a script that crashes are published, and every report must say which one it used:

  code_pass   a crashed script scores 0 on every part
  no_filter   it is scored on what it drew before it crashed (the official wrapping in `try`, which also indents triple-quoted strings)
"""

import re
import textwrap

from mmrecoder_jax.env.chartmimic import Scores, score
from mmrecoder_jax.env.execution import Record
from mmrecoder_jax.env.pool import ExecutorPool

FILTERS = ("code_pass", "no_filter")
_CALLS = ("layout", "type", "color")
# the official prefixes are code too: a script that must come first (__future__) fails there
_PREFIX = "import warnings, sys\n"
_NO_GRID = (0, 0, 0, 0, 0, 0)  # `official_recorder` writes this for an axes without a grid position
_REMOVE_TICKS = textwrap.dedent("""
    all_axes = plt.gcf().get_axes()
    for ax in all_axes:
        ax.set_xticks([])
        ax.set_yticks([])
    """)


class TargetFailed(ValueError):
    """The reference script did not run to its end."""


def official_pair(
    pool: ExecutorPool, name: str, gt_code: str, gen_code: str, keep: str = "code_pass"
) -> tuple[bool, Scores]:
    """Scores a generated script against the reference script as the official evaluator does.

    Args:
      name: of the pair; one that starts with "graph" is scored by the official special rule for
        layouts.
      gt_code: the reference script; it saves its figure by `plt.savefig`.
      gen_code: the generated script; what follows its first `plt.savefig` or `plt.show` is dropped.
      keep: one of `FILTERS`.

    Returns:
      Whether the generated script ran to its end as it is, and the scores.

    Raises:
      ValueError: `keep` is unknown.
      TargetFailed: the reference script did not run to its end.
    """
    if keep not in FILTERS:
        raise ValueError(f"keep is {keep!r}; choose one of {', '.join(FILTERS)}")
    target_ran, target = official_record(
        pool, gt_code if "plt.savefig" in gt_code else prepare(gt_code), name
    )
    if not target_ran:
        raise TargetFailed("the reference script failed")
    ran, record = official_record(pool, prepare(gen_code), name)
    if keep == "no_filter" and not ran:
        record = official_record(pool, prepare(gen_code, guard=True), name)[1]
    elif not ran:
        return False, Scores()
    return ran, score(record, target, "official")


def prepare(code: str, guard: bool = False) -> str:
    """The generated script as the official post-processing leaves it; with `guard`, wrapped in
    `try`.
    """
    if guard:
        code = code.replace("\n", "\n    ")
    code = re.sub(r"plt\.savefig\(.*\n*", "", code, flags=re.DOTALL)
    code = re.sub(r"plt.show\(.*\n*", "", code, flags=re.DOTALL).strip()
    if guard:
        code = f"try:\n    {code}\nexcept Exception as e:\n    pass"
    return code + '\nplt.savefig("official.pdf")'


def official_record(pool: ExecutorPool, code: str, name: str = "") -> tuple[bool, Record]:
    """(whether the script ran to its end without hooks, its official record) of a prepared script.
    Parts that failed are empty.
    """
    plain = _PREFIX + code + "\n"
    text = pool.submit(_without_ticks(plain), record="text")
    calls = pool.submit(plain, record=",".join(_CALLS))
    parts = {"text": text.result().record}
    if parts["text"] is not None and calls.result().record is not None and "seaborn" not in code:
        parts |= dict.fromkeys(_CALLS, calls.result().record)
    else:
        alone = {part: pool.submit(plain, record=part) for part in _CALLS}
        parts |= {part: future.result().record for part, future in alone.items()}
    empty = Record()
    layout = (parts["layout"] or empty).layout
    if name.startswith("graph"):
        layout = ((1, 1, 0, 1, 0, 1),) * len(layout)
    record = Record(
        texts=(parts["text"] or empty).texts,
        layout=tuple(cell for cell in layout if cell != _NO_GRID),
        types=(parts["type"] or empty).types,
        colors=(parts["color"] or empty).colors,
    )
    return parts["layout"] is not None, record


def _without_ticks(code: str) -> str:
    """The script with the removal of ticks where "plt.savefig" first stands in it, inside a
    function, a comment or a string too.
    """
    start = code.find("plt.savefig")
    return code if start < 0 else code[:start] + _REMOVE_TICKS + code[start:]
