import json
from pathlib import Path

import numpy as np
import pytest

from mmrecoder_jax.data.sources import png_bytes
from mmrecoder_jax.reporting.trajectories import (
    ENTRY,
    ENTRY_PICTURES,
    FILTERS,
    MAX_TOKENS,
    TrajectoryView,
    TurnView,
    detail,
    entry,
    read_views,
)
from mmrecoder_jax.rl.correction import MARGIN

SMALL = png_bytes(np.full((4, 6, 3), 200, np.uint8))


def turn(code, overall=0.5, status="ok", render="b.png", **more):
    """A turn that wrote this code; without code, one that wrote a thought alone."""
    response = "why" if code is None else f"<think>why</think>\n```python\n{code}\n```"
    picture = Path(f"{code}{render}") if status == "ok" else None
    return TurnView(response, status, "", picture, {"overall": overall}, overall, **more)


def view(*turns):
    return TrajectoryView("s/trajectories/4/7", "test-1", Path("t.png"), list(turns))


@pytest.mark.parametrize(
    "first, last, labels",
    [
        (turn("a", 0.5), turn("b", 0.6), ["improved"]),
        (turn("a", 0.5), turn("b", 0.4), ["regressed"]),
        (turn("a", 0.5), turn("b", 0.5 + MARGIN / 2), []),  # rounding is no change
        (turn("a", 0.5), turn("b", 0.5 - MARGIN / 2), []),
        (turn("a", 0.5), turn(" a\n", 0.5), ["repeated"]),
        (turn("a", 0.5), turn("b", 0.0, "error"), ["regressed", "failed"]),
        (turn("a", 0.0, "timeout"), turn("b", 0.9), ["repaired", "failed"]),
        (turn(None, 0.0, "no_code"), turn(None, 0.0, "no_code"), ["failed"]),
        (turn("a", 0.5), turn("b", 0.5), []),
        (turn("a", flags=("tamper",)), turn("b"), ["flagged"]),
        (turn("a"), turn("b", replay="undecided"), ["undecided"]),
        (turn("a"), turn("b", replay="done"), []),
        (turn("a"), turn("b", finished=False), ["cut"]),
        (turn("a", judged=True), turn("b", judged=True, judge=0.5), ["unscored"]),
    ],
)
def test_labels(first, last, labels):
    assert view(first, last).labels() == labels


def test_the_same_picture_is_known_by_its_name():
    first, last = turn("a"), turn("b")
    same = TurnView(last.response, "ok", "", first.render, last.scores, 0.5)
    assert view(first, same).labels() == ["same picture"]


def test_improvement_and_disagreement_are_of_all_turns():
    one = view(turn("a", 0.5, judge=0.9), turn("b", 0.75, judge=0.7))
    assert one.improvement == 0.25 and one.disagreement == pytest.approx(0.4)
    assert view(turn("a")).disagreement is None


def test_an_entry_has_what_a_list_needs():
    failed = TurnView("x", "error", "line 1\nNameError: " + "y" * 200, None, {"overall": 0.0}, None)
    names = (*ENTRY, *ENTRY_PICTURES)
    found = dict(zip(names, entry(view(turn("a", 0.5), failed), str), strict=True))
    assert (found["number"], found["chart"], found["reward"], found["gain"]) == (
        *(7, "test-1", None),
        -0.5,
    )
    assert [list(FILTERS)[i] for i in found["labels"]] == ["regressed", "failed"]
    assert found["found"].startswith("NameError: yyy") and len(found["found"]) == 80
    assert (found["target"], found["render"]) == ("t.png", None)


def test_a_detail_has_code_thought_and_tokens_with_their_texts():
    one = turn("plot()", tokens=((5, -0.5), (6, -1.25)))
    long = turn("b", tokens=((1, -1.0),) * (MAX_TOKENS + 5))
    silent = turn(None, 0.0, "no_code")
    found = detail(view(one, long, silent), str, lambda token: f"<{token}>")["turns"]
    assert (found[0]["code"], found[0]["thought"]) == ("plot()\n", "why")
    assert found[0]["tokens"] == [["<5>", 5, -0.5], ["<6>", 6, -1.25]]
    assert found[1]["sampled"] == MAX_TOKENS + 5 and len(found[1]["tokens"]) == MAX_TOKENS
    assert found[2]["code"] is None and found[2]["thought"] == "why" and "tokens" not in found[2]


def written(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows))
    return path


TURN = {
    **{"response": "x", "status": "ok", "error": "", "render": "000004/ab12.png", "reward": 0.5},
    "scores": {"overall": 0.75},
}
OLD = {"chart": "a", "turns": [TURN | {"render": "ab12.png"}]}  # as the first versions wrote it
NEW = {
    **{"chart": "b", "target": "000004/cd34.png", "advantage": 0.5},
    "pieces": [{"turn": 0, "ids": [1]}, {"turn": 1, "ids": [5, 6]}],
    "turns": [TURN | {"logps": [-1.0, -2.0], "flags": ["tamper"], "judge": {"score": 0.25}}],
}


def test_rows_of_all_versions_are_read_and_the_others_left_out(tmp_path):
    broken = ['{"chart": "c", "turns": []}', '{"chart": "d"}', "[1]", '{"chart": "e", "tur']
    path = written(tmp_path / "s" / "000004.jsonl", [*map(json.dumps, (OLD, NEW)), *broken])
    charts = {"a": Path("charts/a.png")}
    old, new = read_views(path, "s/4", charts.get)
    assert (old.id, old.target, old.turns[0].tokens) == ("s/4/0", Path("charts/a.png"), None)
    renders = tmp_path / "s" / "renders"
    assert old.turns[0].render == renders / "ab12.png"
    assert (new.id, new.target, new.advantage) == ("s/4/1", renders / "000004/cd34.png", 0.5)
    (one,) = new.turns
    assert (one.tokens, one.flags, one.judge) == (((5, -1.0), (6, -2.0)), ("tamper",), 0.25)
    assert [v.id for v in read_views(path, "s/4", charts.get, 1)] == ["s/4/0"]


@pytest.mark.parametrize("name", ["../../secret.png", "/etc/x.png", "a/b.png", "x.svg", "x.png\n"])
def test_a_picture_of_a_name_that_no_run_gives_is_none(tmp_path, name):
    row = {"chart": "a", "target": name, "turns": [TURN | {"render": name}]}
    path = written(tmp_path / "000001.jsonl", [json.dumps(row)])
    (one,) = read_views(path, "s/1", lambda chart: None)
    assert one.target is None and one.turns[0].render is None
