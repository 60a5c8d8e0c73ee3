"""What judges share: equal pairs are asked once, scores are kept, failures in a row end the run."""

import json
import math
import os

import numpy as np
import pytest

from mmrecoder_jax.rl.judge import base
from mmrecoder_jax.rl.judge.base import Judge, JudgeDown, Verdict, VerdictCache


class ScriptedJudge(Judge):
    """Gives the scores it is told, at once; None is a failure."""

    def __init__(self, scores, cache=None, max_failures=2):
        super().__init__("scripted", "v1", cache or VerdictCache(), max_failures)
        self.scores = list(scores)

    def ask(self, target, render, answer):
        score = self.scores.pop(0)
        answer(Verdict(score, problem="" if score is not None else "no idea"))


def pixels(value):
    return np.full((4, 5, 3), value, np.uint8)


def test_equal_pairs_are_asked_once_and_failures_again():
    judge = ScriptedJudge([0.5, None, 0.25])
    assert judge.submit(b"t", pixels(1)).result().score == 0.5
    assert judge.submit(b"t", pixels(1)).result().score == 0.5
    assert judge.submit(b"t", pixels(2)).result().score is None
    assert judge.submit(b"t", pixels(2)).result().score == 0.25
    stats = judge.stats()
    assert (stats["requests"], stats["cache_hits"], stats["scored"], stats["unscorable"]) == (
        4,
        1,
        2,
        1,
    )


def test_failures_in_a_row_are_limited():
    judge = ScriptedJudge([None, 0.5, None, None, 0.5])
    assert [judge.submit(b"t", pixels(i)).result().score for i in range(3)] == [None, 0.5, None]
    with pytest.raises(
        JudgeDown,
        match=r"2 pairs in a row without a score \(judge.max_failures\); the last: no idea",
    ):
        judge.submit(b"t", pixels(3)).result()
    with pytest.raises(JudgeDown):
        judge.submit(b"t", pixels(4)).result()


def test_a_resumed_run_asks_nothing_twice(tmp_path):
    directory = str(tmp_path / "judge")
    with ScriptedJudge([0.5, 0.75], VerdictCache(directory)) as judge:
        judge.submit(b"t", pixels(1)).result()
    with open(tmp_path / "judge" / "verdicts-0.jsonl", "a") as file:
        file.write('{"key": "torn')  # a killed writer
    with ScriptedJudge([0.25], VerdictCache(directory)) as judge:
        assert judge.submit(b"t", pixels(1)).result().score == 0.5
        assert judge.submit(b"u", pixels(1)).result().score == 0.25  # another target
    with ScriptedJudge([], VerdictCache(directory, "1")) as judge:
        assert judge.submit(b"u", pixels(1)).result().score == 0.25
        assert judge.submit(b"t", pixels(1)).result().score == 0.5


def rows_of(directory):
    text = (directory / "verdicts-0.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines() if line]


BROKEN = [
    *({"score": value} for value in (math.nan, math.inf, -0.1, 1.1, 10**400, None, True, "0.5")),
    *({"points": value} for value in (None, [], 5, {"type": math.nan}, {"type": -1})),
    *({"points": {"type": value}} for value in ("18", True, None, [18], 10**400, 1e9)),
    {"key": 7},
    {"key": None},
    {"extra": 1},
]


@pytest.mark.parametrize("broken", BROKEN)
def test_a_line_that_is_no_verdict_is_skipped(tmp_path, broken):
    with ScriptedJudge([0.5, 0.75], VerdictCache(str(tmp_path))) as judge:
        judge.submit(b"t", pixels(1)).result()
        judge.submit(b"t", pixels(2)).result()
    first, second = rows_of(tmp_path)
    lines = [json.dumps(second), json.dumps(first | broken)]
    (tmp_path / "verdicts-0.jsonl").write_text("\n".join(lines))
    with ScriptedJudge([0.25], VerdictCache(str(tmp_path))) as judge:
        assert judge.submit(b"t", pixels(1)).result().score == 0.25
        assert judge.submit(b"t", pixels(2)).result().score == 0.75


def test_files_that_are_no_caches_are_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\x00\xff" * 100_000)
    (tmp_path / "b.jsonl").write_text("[" * 100_000 + "\n" + '{"a":' * 5_000 + "\n3\nnull\n")
    (tmp_path / "c.jsonl").mkdir()
    os.mkfifo(tmp_path / "d.jsonl")
    (tmp_path / "e.jsonl").symlink_to(tmp_path / "nowhere")
    (tmp_path / "f.jsonl").write_text('{"key": "' + "k" * 1_000_000)
    with ScriptedJudge([0.25], VerdictCache(str(tmp_path))) as judge:
        assert judge.submit(b"t", pixels(1)).result().score == 0.25


def test_memory_and_files_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "_MOST_KNOWN", 10)
    monkeypatch.setattr(base, "_LARGEST_FILE", 3000)
    cache = VerdictCache(str(tmp_path))
    for i in range(100):
        cache.put(f"{i:0150}", Verdict(i / 100))
    cache.close()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2 * 3000
    again = VerdictCache(str(tmp_path))
    for known in (cache, again):
        found = [known.get(f"{i:0150}") for i in range(100)]
        assert [i for i, verdict in enumerate(found) if verdict] == list(range(90, 100))
        assert found[99].score == 0.99
    again.close()


def test_a_large_file_is_read_from_its_end(tmp_path, monkeypatch):
    cache = VerdictCache(str(tmp_path))
    for i in range(100):
        cache.put(f"{i:0150}", Verdict(i / 100))
    cache.close()
    monkeypatch.setattr(base, "_LARGEST_FILE", 2000)
    with_end = VerdictCache(str(tmp_path))
    assert with_end.get(f"{99:0150}").score == 0.99 and with_end.get(f"{0:0150}") is None
    with_end.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
def test_a_full_disk_loses_no_verdict(tmp_path):
    (tmp_path / "verdicts-0.jsonl").symlink_to("/dev/full")
    with ScriptedJudge([0.5, 0.75], VerdictCache(str(tmp_path))) as judge:
        assert judge.submit(b"t", pixels(1)).result(timeout=30).score == 0.5
        assert judge.submit(b"t", pixels(1)).result(timeout=30).score == 0.5
        assert judge.submit(b"t", pixels(2)).result(timeout=30).score == 0.75


@pytest.mark.parametrize("score", [math.nan, -0.01, 1.01, math.inf, 10**400])
def test_a_score_out_of_range_is_none(tmp_path, score):
    with ScriptedJudge([score, np.float64(0.5)], VerdictCache(str(tmp_path))) as judge:
        found = judge.submit(b"t", pixels(1)).result(timeout=30)
        assert found.score is None and "a score is a number from 0 to 1" in found.problem
        assert judge.submit(b"t", pixels(2)).result(timeout=30).score == 0.5
    assert [row["score"] for row in rows_of(tmp_path)] == [0.5]


def test_a_judge_that_raises_has_no_score():
    with ScriptedJudge([0.5]) as judge:
        assert judge.submit(b"t", pixels(1)).result(timeout=30).score == 0.5
        found = judge.submit(b"t", pixels(2)).result(timeout=30)  # it is told no further score
        assert found.score is None and "IndexError: pop from empty list" in found.problem
