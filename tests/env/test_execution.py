"""Claims of an untrusted process, and the facts that outrank them."""

import dataclasses
import json
import random
import time

import numpy as np
import pytest

from mmrecoder_jax.benchmarks.plot2code import text_match
from mmrecoder_jax.env.chartmimic import ScoreMode, score
from mmrecoder_jax.env.execution import EnvConfig, clean_text, decode
from mmrecoder_jax.env.records import OfficialRecord, Plot2CodeRecord, Record
from mmrecoder_jax.env.wire import End, Finding, Outcome, RecordKind, Status

CONFIG = EnvConfig(max_pixels=1000)
EXIT = Outcome(End.EXIT, code=0, seconds=1.0, cpu_seconds=0.5)
RECORD = {
    "texts": ["a", "a"],
    "layout": [[1, 2, 0, 0, 1, 1]],
    "types": {"bar": 2},
    "colors": ["bar--#FF0000"],
}
CLAIM = {"status": "ok", "error": "", "record": RECORD, "size": [3, 2], "flags": []}


def _decode(pixels=bytes(24), **changes):
    return decode(EXIT, json.dumps({**CLAIM, **changes}).encode(), pixels, CONFIG)


def test_a_claim_with_a_bad_record_is_a_failure():
    assert _decode(record={**RECORD, "extra": 1}).status == Status.KILLED
    assert _decode(record=RECORD).record == Record.from_json(RECORD)


@pytest.mark.parametrize(
    ("kind", "data", "cls"),
    [
        (RecordKind.TRAINING, RECORD, Record),
        (RecordKind.OFFICIAL_CALLS, RECORD, OfficialRecord),
        (
            RecordKind.PLOT2CODE,
            {"texts": [], "size": [4, 3], "white": False, "fig1": None},
            Plot2CodeRecord,
        ),
    ],
)
def test_the_record_is_of_the_kind_that_was_asked_for(kind, data, cls):
    claim = json.dumps({**CLAIM, "record": data, "size": None}).encode()
    assert type(decode(EXIT, claim, b"", CONFIG, kind).record) is cls
    other = RecordKind.TRAINING if cls is Plot2CodeRecord else RecordKind.PLOT2CODE
    assert decode(EXIT, claim, b"", CONFIG, other).status == Status.KILLED


def test_transparent_pixels_are_put_on_white():
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[0, 0] = 10, 20, 30, 255
    rgba[1, 2] = 0, 0, 0, 51
    image = _decode(rgba.tobytes()).image
    assert image.shape == (2, 3, 3)
    assert (
        image[0, 0].tolist() == [10, 20, 30]
        and image[0, 1].tolist() == [255] * 3
        and image[1, 2].tolist() == [204] * 3
    )


@pytest.mark.parametrize(
    "change",
    [
        {"size": [3, 3]},
        {"size": [-3, -2]},
        {"size": [1 << 30, 1 << 30]},
        {"size": [float("nan"), 2]},
        {"size": [3.0, 2]},
        {"size": "32"},
        {"status": "timeout"},
        {"status": "no_code"},
        {"status": "great"},
        {"status": "error"},
        {"error": 3, "status": "error"},
        {"flags": ["trusted"]},
    ],
)
def test_a_bad_claim_is_a_failure(change):
    result = _decode(**change)
    assert result.status == Status.KILLED and result.image is None and result.record is None


def test_deep_json_and_noise_never_raise():
    claims = [
        b"",
        b"null",
        b"[]",
        b"{",
        b"[" * 100_000,
        b'{"status":' * 30_000,
        b"\xff\xfe",
        b'{"status": "ok"}',
        b"NaN",
    ]
    rng = random.Random(0)
    good = json.dumps(CLAIM).encode()
    for _ in range(2000):
        noisy = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            noisy[rng.randrange(len(noisy))] = rng.randrange(256)
        claims.append(bytes(noisy[: rng.randint(0, len(noisy))]))
    for claim in claims:
        result = decode(EXIT, claim, bytes(24), CONFIG)
        assert result.image is None or result.image.shape == (2, 3, 3)


@pytest.mark.parametrize(
    ("end", "code", "status", "words"),
    [
        (End.WALL, 9, Status.TIMEOUT, "ran longer than 30 seconds"),
        (End.DISK, 9, Status.KILLED, "too many or too large files"),
        (End.SIGNAL, 11, Status.KILLED, "SIGSEGV"),
        (End.SIGNAL, 24, Status.TIMEOUT, "more than 15 seconds of CPU time"),
        (End.SIGNAL, 25, Status.KILLED, "too many or too large files"),
        (End.SIGNAL, 99, Status.KILLED, "signal 99"),
    ],
)
def test_how_the_process_ended_outranks_what_it_said(end, code, status, words):
    outcome = dataclasses.replace(EXIT, end=end, code=code)
    result = decode(outcome, json.dumps(CLAIM).encode(), bytes(24), CONFIG)
    assert result.status == status and result.image is None and words in result.error
    assert (result.seconds, result.cpu_seconds) == (1.0, 0.5)


def test_any_signal_after_the_cpu_limit_is_a_time_out():
    outcome = dataclasses.replace(EXIT, end=End.SIGNAL, code=9, cpu_seconds=CONFIG.cpu_seconds)
    assert decode(outcome, b"", b"", CONFIG).status == Status.TIMEOUT


@pytest.mark.parametrize(
    ("finding", "replay", "flags"),
    [
        (None, "", ()),
        (Finding(0), "done", ()),
        (Finding.HIDDEN_TEXT, "done", ("hidden_text",)),
        (Finding.HIDDEN_TEXT | Finding.FORGED, "done", ("hidden_text", "forged")),
        (Finding.UNDECIDED, "undecided", ()),
    ],
)
def test_what_a_replay_found_becomes_flags(finding, replay, flags):
    outcome = dataclasses.replace(EXIT, replay=finding)
    result = decode(outcome, json.dumps(CLAIM).encode(), bytes(24), CONFIG)
    assert (result.replay, result.flags) == (replay, flags)


def test_error_text_is_bounded_and_clean():
    result = _decode(status="error", error="x" * 5000 + "the end", pixels=b"", size=None)
    assert len(result.error) == CONFIG.feedback_chars and result.error.endswith("the end")
    assert clean_text("a\x00b\ud800\nc", 100) == "a?b?\nc"
    assert clean_text(f"in {np.__file__}: no", 100) == "in numpy/__init__.py: no"


# What no recorder sends, in places where a number, a text or a list belongs.
HOSTILE = [
    *("10" * 200, "-" + "9" * 400, "9" * 5000, "1e999", "-0.0", "5e-324", "1.7e308"),
    *("1" + "0" * 308, "2147483647", "2147483648", "NaN", "Infinity", "true", "null", "1.5"),
    *('""', '"\\ud800"', '"\\u0000"', '"a--b--c"', '"--"', '"bar--#FF0000"', '"bar--#12345"'),
    *('"' + "x" * 3000 + '"', "[" * 5000 + "]" * 5000, '{"a":' * 900 + "1" + "}" * 900),
    *("[]", "{}", "[[]]", '{"a": 1, "a": 2}', "[1, 2, 0, 0, 1, 1]", "[0, 0, 0, 0, 0, 0]"),
    *('["t", 1e308, -1e308]', '["t", null, 5]', "[1e-320, 1e308]", "[3, 2]"),
]


def _hostile_record(rng: random.Random, names: str) -> str:
    def value(depth: int = 0) -> str:
        kind = rng.random()
        if depth > 2 or kind < 0.4:
            return rng.choice(HOSTILE)
        items = [value(depth + 1) for _ in range(rng.randint(0, 4))]
        if kind < 0.8:
            return "[" + ", ".join(items * rng.choice([1, 1, 1, 50])) + "]"
        keys = [rng.choice(['"bar"', '"\\ud800"', '""', f'"{rng.random()}"']) for _ in items]
        return "{" + ", ".join(map("{}: {}".format, keys, items)) + "}"

    good = {
        "texts": ['["a", "\\ud800", "a"]', '[["t", 1, 1e308], ["t", null, 2]]'],
        "layout": ["[[1, 2, 0, 0, 1, 1]]", "[[2147483647, 0, 0, 0, 0, 0]]"],
        "types": ['{"bar": 2147483647, "bar": 3}'],
        "colors": ['["bar--#FF0000", "--", "x", "bar--\\ud800"]'],
        "size": ["[5e-324, 1e308]", "[1e308, 5e-324]"],
        "white": ["false"],
        "fig1": ["null"],
    }
    fields = [
        f'"{name}": {value() if rng.random() < 0.2 else rng.choice(good[name])}'
        for name in names.split()
    ]
    return "{" + ", ".join(fields) + "}"


def _scores_of_a_chart(record) -> list[float]:
    record, target = Record(**vars(record)), Record.from_json(RECORD)
    return [score(record, target, mode).overall for mode in ScoreMode]


def _scores_of_a_figure(record) -> list[float]:
    target = Plot2CodeRecord(texts=(("t", 1.0, 2.0), ("t", None, 1.0)))
    return [text_match(record, target), text_match(target, record), text_match(record, record)]


@pytest.mark.parametrize(
    ("kind", "names", "scores"),
    [
        (RecordKind.TRAINING, "texts layout types colors", _scores_of_a_chart),
        (RecordKind.OFFICIAL_CALLS, "texts layout types colors", _scores_of_a_chart),
        (RecordKind.PLOT2CODE, "texts size white fig1", _scores_of_a_figure),
    ],
)
def test_no_claim_ends_a_scoring_run(kind, names, scores):
    rng = random.Random(1)
    parsed = 0
    for _ in range(300):
        record = _hostile_record(rng, names)
        claim = f'{{"status": "ok", "error": "", "record": {record}, "size": null, "flags": []}}'
        result = decode(EXIT, claim.encode(), b"", CONFIG, kind)
        if result.record is not None:
            parsed += 1
            assert all(0 <= score <= 1 for score in scores(result.record))
    assert parsed > 30


def test_an_endless_error_costs_no_time():
    start = time.process_time()
    for text in (
        "/" * 900_000,
        "/a" * 450_000,
        "/mmrecoder-env-" * 60_000,
        "/x/lib/python3." * 60_000,
    ):
        result = _decode(status="error", error=text, pixels=b"", size=None)
        assert len(result.error) <= CONFIG.feedback_chars
    assert time.process_time() - start < 10  # minutes, where it grows with the square
