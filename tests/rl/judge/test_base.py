"""What judges share: equal pairs are asked once, scores are kept, failures in a row end the run."""

import numpy as np
import pytest

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
