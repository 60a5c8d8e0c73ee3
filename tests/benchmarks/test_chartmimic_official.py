"""The official record and scores, against what ChartMimic's evaluators gave for the same scripts.

They ran at c9e149c6 with their pinned packages.
`official_records.jsonl` holds scripts and the official records, colours before thinning out, paths
cut after "site-packages/"; `official_pairs.jsonl` pairs and the official scores, without a filter.
"""

import dataclasses
import json
from pathlib import Path

import matplotlib
import pytest

from mmrecoder_jax.benchmarks import chartmimic_official
from mmrecoder_jax.env import interpreter, setup
from mmrecoder_jax.env.chartmimic import Scores
from mmrecoder_jax.env.execution import EnvConfig
from mmrecoder_jax.env.pool import ExecutorPool
from mmrecoder_jax.env.pools import separate_pools
from mmrecoder_jax.env.records import Record
from mmrecoder_jax.env.wire import Part


def rows(name: str) -> list[dict]:
    lines = Path(__file__).with_name(name).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


CASES, PAIRS = rows("official_records.jsonl"), rows("official_pairs.jsonl")
START = "import matplotlib.pyplot as plt\nfig, ax = plt.subplots()\n"
BAR = "matplotlib/__init__.py-bar"


@pytest.fixture(scope="module")
def pool():
    with ExecutorPool(
        EnvConfig(workers=2, preload=("numpy", "matplotlib"), wall_seconds=120)
    ) as pool:
        yield pool


# What matplotlib draws otherwise in later releases: the grid of a colorbar and the name of a map
# without one; the labels of minor ticks.
OF_3_8 = ("images", "patheff")


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_record_equals_the_official_one(pool, case):
    if case["id"] in OF_3_8 and not matplotlib.__version__.startswith("3.8."):
        pytest.skip("the official record is that of matplotlib 3.8.4")
    if "networkx" in case["code"]:
        pytest.importorskip("networkx")
    found = chartmimic_official.official_record(pool, case["code"], case["id"])[1]
    assert in_order(found) == in_order(Record.from_json(case["record"]))


def in_order(record: Record) -> Record:
    """The record with sorted texts: their order is that of drawing, and counts for nothing."""
    return dataclasses.replace(record, texts=tuple(sorted(record.texts)))


def unpublished(code: str) -> list[str]:
    """The libraries of a script, but matplotlib, whose releases are not those of the scores."""
    others = interpreter.find("").unpublished()
    names = ("seaborn", "networkx", "squarify", "matplotlib_venn", "pandas")
    used = {name.replace("_", "-") for name in names if name in code}
    if "seaborn" in code:
        used.add("pandas")
    return [text for text in others if text.split()[0] in used]


def scores_of(pools, pair: dict) -> dict:
    ran, scores = chartmimic_official.official_pair(
        pools, pair["id"], pair["gt_code"], pair["gen_code"], "no_filter"
    )
    return {"exec_ok": ran, **{part: getattr(scores, part) for part in Part}}


def official_scores(pair: dict) -> dict:
    return {"exec_ok": pair["exec_ok"]} | {
        part: pytest.approx(pair[part], abs=1e-6) for part in Part
    }


@pytest.mark.parametrize("pair", PAIRS, ids=[pair["id"] for pair in PAIRS])
def test_scores_equal_the_official_ones(pools, pair):
    if others := unpublished(pair["gt_code"] + pair["gen_code"]):
        pytest.skip(f"the official scores are of other releases: {', '.join(others)}")
    assert scores_of(pools, pair) == official_scores(pair)


@pytest.mark.slow
def test_all_of_them_on_the_published_releases(tmp_path):
    """In the environment that `env.setup` makes, from the package index."""
    assert setup.main([f"--out={tmp_path / 'charts'}"]) == 0
    python = str(tmp_path / "charts" / "bin" / "python")
    wrong = {}
    with separate_pools(EnvConfig(workers=1, python=python, wall_seconds=120)) as published:
        for case in CASES:
            record = chartmimic_official.official_record(
                published.answers, case["code"], case["id"]
            )[1]
            if record != Record.from_json(case["record"]):
                wrong[case["id"]] = record
        for pair in PAIRS:
            if (found := scores_of(published, pair)) != official_scores(pair):
                wrong[pair["id"]] = found
    assert not wrong


def test_a_graph_is_laid_out_by_name(pool):
    code = START + "fig.add_axes([0, 0, 0.1, 0.1])\nplt.savefig('a.pdf')"
    assert (
        chartmimic_official.official_record(pool, code, "graph_7")[1].layout
        == ((1, 1, 0, 1, 0, 1),) * 2
    )
    assert chartmimic_official.official_record(pool, code, "line_7")[1].layout == (
        (1, 1, 0, 0, 0, 0),
    )


def test_generated_code_ends_at_its_first_save_or_show():
    assert chartmimic_official.prepare("a\nplt.savefig('x')\nb") == 'a\nplt.savefig("official.pdf")'
    assert chartmimic_official.prepare("a\nplt.show()\nb") == 'a\nplt.savefig("official.pdf")'
    body = "    if a:\n        b"
    wrapped = f'try:\n{body}\nexcept Exception as e:\n    pass\nplt.savefig("official.pdf")'
    assert chartmimic_official.wrap("if a:\n    b\nplt.show()") == wrapped


def test_an_identical_pair(pools):
    code = START + "ax.bar([1], [1], color='red')\nax.set_title('T')\nplt.savefig('a.pdf')"
    assert chartmimic_official.official_pair(pools, "bar_1", code, code) == (
        True,
        Scores(1.0, 1.0, 1.0, 1.0),
    )


def test_a_crash_under_both_filters(pools):
    target = START + "ax.bar([1], [1], color='red')\nax.set_title('T')\nplt.savefig('a.pdf')"
    crash = START + "ax.bar([1], [1], color='red')\nax.set_titel('T')"
    assert chartmimic_official.official_pair(pools, "bar_1", target, crash, "code_pass") == (
        False,
        Scores(),
    )
    assert chartmimic_official.official_pair(pools, "bar_1", target, crash, "no_filter") == (
        False,
        Scores(0.0, 1.0, 1.0, 1.0),
    )


def test_a_caught_exception_closes_the_official_log(pool):
    code = START + "try:\n    ax.plot([1], [1, 2])\nexcept ValueError:\n    pass\nax.bar([1], [1])"
    _, record = chartmimic_official.official_record(pool, chartmimic_official.prepare(code))
    assert record.types == {"matplotlib/axes/_axes.py-plot": 1}


def test_a_hook_that_raises_costs_its_own_part_only(pool):
    ran, record = chartmimic_official.official_record(
        pool,
        chartmimic_official.prepare(
            START + "ax.bar([1], [1])\nax.plot([1, 2], color=('red', 0.5))\nax.set_title('T')"
        ),
    )
    assert ran
    assert (record.texts, record.colors) == (("T",), ())
    assert record.types == {BAR: 1, "matplotlib/axes/_axes.py-plot": 1}


def test_seaborn_sees_the_names_of_the_hooks(pool):
    pytest.importorskip("seaborn")
    ran, record = chartmimic_official.official_record(
        pool,
        chartmimic_official.prepare(
            "import seaborn as sns\nimport matplotlib.pyplot as plt\nsns.histplot(x=[1, 2, 3])"
        ),
    )
    assert ran
    # histplot needs the name of `Axes.bar`, which is "wrapper" in the official evaluator
    assert record.types == {}
    assert record.texts == ("Count",)


def test_a_reference_that_fails(pools):
    with pytest.raises(chartmimic_official.TargetFailed):
        chartmimic_official.official_pair(pools, "bar_1", "import nothing_like_this", START)


def test_unknown_filter(pools):
    with pytest.raises(ValueError, match="code_pass, no_filter"):
        chartmimic_official.official_pair(pools, "bar_1", START, START, "all")
