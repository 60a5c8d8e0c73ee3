"""ChartMimic's official low-level scores of a pair of scripts, defects included.

No model code runs in this process. The official evaluator makes two files of a generated script.
The plain one only says whether the script runs to its end. What is scored is the other, the script
in `try`, indented, whether it raises or not: lines within its triple quotes are indented too, and
it is no Python where it begins with `from __future__`.

For each of four parts the evaluator writes prefix + file + suffix and runs that in a new
interpreter. Here a script is prepared the same way and run in the executors: once for the text
(ticks are removed in the middle of that script) and once for the other three parts. The four are
run one by one, as the official evaluator does, only for scripts where a hook can disturb another
part: where anything raised, and where seaborn is used, which asks methods for their names.

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
_SAVE = '\nplt.savefig("official.pdf")'
_REMOVE_TICKS = textwrap.dedent("""
    all_axes = plt.gcf().get_axes()
    for ax in all_axes:
        ax.set_xticks([])
        ax.set_yticks([])
    """)
# The names that an answer to the customized task finds imported.
_CUSTOMIZED_IMPORTS = "; ".join(
    (
        "import warnings",
        *(
            f"warnings.filterwarnings('ignore', category={category})"
            for category in ("UserWarning", "FutureWarning")
        ),
        *("import matplotlib.pyplot as plt", "import pandas as pd", "import numpy as np"),
        *("np.random.seed(0)", "import math", "import colorsys"),
        *("import networkx as nx", "import seaborn as sns", "from matplotlib_venn import venn2"),
        *("from matplotlib import cm", "import matplotlib.colors as mcolors"),
        *("from matplotlib.colors import LogNorm", "import matplotlib.gridspec as gridspec"),
        *("from matplotlib.gridspec import GridSpec", "from scipy.stats import gaussian_kde"),
        "from scipy.stats import multivariate_normal, norm",
    )
)
_BANNER = "# ===================\n# Part {}\n# ===================\n"
_DATA = re.compile(
    re.escape(_BANNER.format("2: Data Preparation"))
    + "(.*?)"
    + re.escape(_BANNER.format("3: Plot Configuration and Rendering").rstrip()),
    re.DOTALL,
)
_GRAPH_CELL = (1, 1, 0, 1, 0, 1)  # of every axes in a pair whose name starts with "graph"


class Keep(enum.StrEnum):
    """What is kept of a generated script that crashes."""

    CODE_PASS = "code_pass"  # nothing: it scores 0 on every part
    NO_FILTER = "no_filter"  # what it drew before it crashed


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
        pools.references,
        gt_code.removeprefix("\ufeff") if "plt.savefig" in gt_code else prepare(gt_code),
        name,
    )
    if not target_ran:
        raise TargetFailed("the reference script failed")
    ran = pools.answers.submit(prepare(gen_code), RecordKind.OFFICIAL_RUN).result().ok
    if not ran and keep == Keep.CODE_PASS:
        return False, Scores()
    guarded, unguarded = wrap(gen_code), wrap(gen_code, catch=False)
    _, record = official_record(pools.answers, guarded, name, unguarded)
    return ran, score(record, target, ScoreMode.OFFICIAL)


def customized_prefix(gt_code: str) -> str:
    """What the evaluator puts in front of every answer to the customized task: imports, and the
    reference's own data. So an answer runs that copies none of the data.

    Raises:
      ValueError: the reference has no such part.
    """
    part = _DATA.search(gt_code)
    if part is None:
        raise ValueError(
            "its code has no part between the lines '# Part 2: Data Preparation' and "
            "'# Part 3: Plot Configuration and Rendering', which would be put before an answer"
        )
    return f"{_CUSTOMIZED_IMPORTS}\n{part[1].strip()}\n"


def prepare(code: str) -> str:
    """The generated script as the official post-processing leaves it: the plain file."""
    return _cut(code) + _SAVE


def wrap(code: str, catch: bool = True) -> str:
    """The generated script in `try`: the file that is scored.

    Without `catch` it is the same file, but for an exception, which ends it.
    """
    body = _cut(code.removeprefix("\ufeff").replace("\n", "\n    "))
    if not catch:
        return f"if True:\n    {body}{_SAVE}"
    return f"try:\n    {body}\nexcept Exception as e:\n    pass{_SAVE}"


def _cut(code: str) -> str:
    """The script without what follows its first `plt.savefig` or `plt.show`.

    A byte-order mark is no part of it, but of the file that it came from.
    """
    code = re.sub(r"plt\.savefig\(.*\n*", "", code.removeprefix("\ufeff"), flags=re.DOTALL)
    return re.sub(r"plt.show\(.*\n*", "", code, flags=re.DOTALL).strip()


def official_record(
    pool: ExecutorPool, code: str, name: str = "", unguarded: str | None = None
) -> tuple[bool, Record]:
    """(whether the script ran to its end without hooks, its official record) of a prepared script.

    Parts that failed are empty.

    Args:
      name: of the pair.
      unguarded: the same script where an exception ends it; None: `code` is that. What it records
        of three parts in one run counts where nothing was raised.
    """
    plain = _PREFIX + code + "\n"
    joined = plain if unguarded is None else _PREFIX + unguarded + "\n"
    text_run = pool.submit(_without_ticks(plain), RecordKind.OFFICIAL_TEXT)
    calls_run = pool.submit(joined, RecordKind.OFFICIAL_CALLS)
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
