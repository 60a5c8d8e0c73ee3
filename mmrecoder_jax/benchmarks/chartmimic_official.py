"""ChartMimic's official low-level scores of a pair of scripts, defects included.

No model code runs in this process. The official evaluator writes prefix + script + suffix to a file
for each of four parts and runs it in a new interpreter. Here a script is prepared the same way and
run in the executors: once for the text (ticks are removed in the middle of that script) and once
for the other three parts. The four are run one by one, as the official evaluator does, only for
scripts where a hook can disturb another part: where one raised, and where seaborn is used, which
asks methods for their names.

Two readings of a script that crashes are published (`Keep`), and every report must say which one it
used.
"""

import enum
import re
import textwrap

from mmrecoder_jax.env.chartmimic import ScoreMode, Scores, score
from mmrecoder_jax.env.pool import ExecutorPool
from mmrecoder_jax.env.pools import Pools
from mmrecoder_jax.env.records import OfficialRecord, Record
from mmrecoder_jax.env.wire import RecordKind

# the official prefixes are code too: a script that must come first (__future__) fails there
_PREFIX = "import warnings, sys\n"
_REMOVE_TICKS = textwrap.dedent("""
    all_axes = plt.gcf().get_axes()
    for ax in all_axes:
        ax.set_xticks([])
        ax.set_yticks([])
    """)
_GRAPH_CELL = (1, 1, 0, 1, 0, 1)  # of every axes in a pair whose name starts with "graph"


class Keep(enum.StrEnum):
    """What is kept of a generated script that crashes."""

    CODE_PASS = "code_pass"  # nothing: it scores 0 on every part
    # What it drew before it crashed: the script is wrapped in `try`, officially by an indent that
    # also changes its triple-quoted strings.
    NO_FILTER = "no_filter"


class TargetFailed(ValueError):
    """The reference script did not run to its end."""


def official_pair(
    pools: Pools,
    name: str,
    gt_code: str,
    gen_code: str,
    keep: str = Keep.CODE_PASS,
) -> tuple[bool, Scores]:
    """Scores a generated script against the reference script as the official evaluator does.

    Args:
      name: of the pair; one that starts with "graph" is scored by the official special rule for
        layouts.
      gt_code: the reference script; it saves its figure by `plt.savefig`.
      gen_code: the generated script; what follows its first `plt.savefig` or `plt.show` is dropped.
      keep: one of `Keep`.

    Returns:
      Whether the generated script ran to its end as it is, and the scores.

    Raises:
      ValueError: `keep` is unknown.
      TargetFailed: the reference script did not run to its end.
    """
    if keep not in tuple(Keep):
        raise ValueError(f"keep={keep!r}: choose one of {', '.join(Keep)}")
    target_ran, target = official_record(
        pools.references, gt_code if "plt.savefig" in gt_code else prepare(gt_code), name
    )
    if not target_ran:
        raise TargetFailed("the reference script failed")
    ran, record = official_record(pools.answers, prepare(gen_code), name)
    if not ran:
        if keep == Keep.CODE_PASS:
            return False, Scores()
        _, record = official_record(pools.answers, prepare(gen_code, guard=True), name)
    return ran, score(record, target, ScoreMode.OFFICIAL)


def prepare(code: str, guard: bool = False) -> str:
    """The generated script as the official post-processing leaves it.

    With `guard` it is wrapped in `try`.
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
    text_run = pool.submit(_without_ticks(plain), RecordKind.OFFICIAL_TEXT)
    calls_run = pool.submit(plain, RecordKind.OFFICIAL_CALLS)
    texts, calls = text_run.result().record, calls_run.result().record
    layout: OfficialRecord | None
    types: OfficialRecord | None
    colors: OfficialRecord | None
    if texts is not None and calls is not None and "seaborn" not in code:
        layout = types = colors = calls
    else:
        runs = (
            pool.submit(plain, RecordKind.OFFICIAL_LAYOUT),
            pool.submit(plain, RecordKind.OFFICIAL_TYPE),
            pool.submit(plain, RecordKind.OFFICIAL_COLOR),
        )
        layout, types, colors = (run.result().record for run in runs)
    empty = OfficialRecord()
    cells = (layout or empty).layout
    if name.startswith("graph"):
        cells = (_GRAPH_CELL,) * len(cells)
    record = Record(
        texts=(texts or empty).texts,
        layout=tuple(cell for cell in cells if cell is not None),
        types=(types or empty).types,
        colors=(colors or empty).colors,
    )
    return layout is not None, record


def _without_ticks(code: str) -> str:
    """The script with the removal of ticks where "plt.savefig" first occurs.

    That may be in a function, a comment or a string too: the official evaluator looks no closer.
    """
    start = code.find("plt.savefig")
    return code if start < 0 else code[:start] + _REMOVE_TICKS + code[start:]
