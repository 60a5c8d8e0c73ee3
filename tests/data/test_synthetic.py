"""The chart grammar: deterministic, disjoint splits, code that says what the spec holds."""

import ast
import collections

import pytest

from mmrecoder_jax.data import splits, synthetic
from mmrecoder_jax.env.response import extract_code, has_format


def specs(count, split="train", seed=0):
    return [synthetic.chart_spec(seed, index, split) for index in range(count)]


def test_depends_on_seed_index_and_split_alone():
    assert specs(20) == specs(20)
    assert synthetic.chart_spec(0, 5) != synthetic.chart_spec(1, 5)
    assert synthetic.chart_spec(0, 5) != synthetic.chart_spec(0, 6)


def test_splits_never_share_a_chart():
    codes = {
        split: {spec.code() for seed in (0, 1) for spec in specs(600, split, seed)}
        for split in splits.SPLITS
    }
    assert not codes["train"] & codes["val"]
    assert not codes["train"] & codes["test"]
    assert not codes["val"] & codes["test"]
    assert all(splits.split_of(code) == split for split in codes for code in codes[split])
    assert min(map(len, codes.values())) > 1150, "charts repeat too often"


def test_unknown_split():
    with pytest.raises(ValueError, match="train, val, test"):
        synthetic.chart_spec(0, 0, "dev")


def test_code_compiles_and_has_one_order_of_lines():
    order = (
        "import",
        "fig",
        "x",
        "draw",
        "set_title",
        "set_xlabel",
        "set_ylabel",
        "grid",
        "legend",
        "show",
    )
    for spec in specs(200):
        lines = spec.code().splitlines()
        ast.parse(spec.code())
        names = [
            line.split("(")[0].split(".")[1] if line[0] in "ap" else line.split()[0].rstrip(",")
            for line in lines
        ]
        ranks = [order.index("draw" if name in synthetic.KINDS else name) for name in names]
        assert ranks == sorted(ranks), lines


def test_shares():
    many = specs(3000)
    kinds = collections.Counter(spec.kind for spec in many)
    assert set(kinds) == set(synthetic.KINDS)
    assert max(kinds.values()) < 1.25 * min(kinds.values())
    able = [spec for spec in many if spec.kind in synthetic.PAIRED_KINDS]
    assert sum(len(spec.values) == 2 for spec in able) / len(able) == pytest.approx(
        synthetic.PAIRED_SHARE, abs=0.04
    )
    axes = [spec for spec in many if spec.kind != "pie"]
    assert sum(spec.grid for spec in axes) / len(axes) == pytest.approx(
        synthetic.GRID_SHARE, abs=0.04
    )


def test_what_a_spec_may_hold():
    for spec in specs(500):
        assert synthetic.MIN_POINTS <= len(spec.categories) <= synthetic.MAX_POINTS
        assert all(
            len(values) == len(spec.categories) and all(1 <= value <= 9 for value in values)
            for values in spec.values
        )
        assert (
            len(set(spec.colors))
            == len(spec.colors)
            == (len(spec.categories) if spec.kind == "pie" else len(spec.values))
        )
        assert len(spec.labels) == (2 if len(spec.values) == 2 else 0)
        if spec.kind == "pie":
            assert not (spec.xlabel or spec.ylabel or spec.grid)
        if spec.kind == "fill_between" and len(spec.values) == 2:
            assert all(front < back for back, front in zip(*spec.values, strict=True))


def test_response_has_the_format_and_gives_its_code_back():
    for spec in specs(50):
        assert has_format(spec.response())
        assert extract_code(spec.response()).rstrip("\n") == spec.code()


def test_words_cover_the_strings_of_the_charts():
    known = set(synthetic.words())
    for spec in specs(200):
        strings = {
            node.value
            for node in ast.walk(ast.parse(spec.code()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert strings <= known
