import json
import random

import numpy as np
import pytest

from mmrecoder_jax.env.execution import EnvConfig, Record, Status, clean_text, decode

CONFIG = EnvConfig(max_pixels=1000)
EXIT = {"end": "exit", "code": 0, "seconds": 1.0, "cpu_seconds": 0.5}
RECORD = {
    "texts": ["a", "a"],
    "layout": [[1, 2, 0, 0, 1, 1]],
    "types": {"bar": 2},
    "colors": ["bar--#FF0000"],
}
CLAIM = {"status": "ok", "error": "", "record": RECORD, "size": [3, 2], "flags": []}


def _decode(pixels=bytes(24), **changes):
    return decode(EXIT, json.dumps({**CLAIM, **changes}).encode(), pixels, CONFIG)


def test_a_record_survives_json():
    record = Record.from_json(RECORD)
    assert record.texts == ("a", "a") and record.layout == ((1, 2, 0, 0, 1, 1),)
    assert Record.from_json(json.loads(json.dumps(record.to_json()))) == record


@pytest.mark.parametrize(
    "change",
    [
        {"texts": "abc"},
        {"texts": [1]},
        {"texts": ["x"] * 5001},
        {"texts": ["x" * 2001]},
        {"layout": [[1, 2, 3]]},
        {"layout": [[1, 2, 0, 0, 1, -1]]},
        {"layout": [[True, 2, 0, 0, 1, 1]]},
        {"types": {"bar": 1.5}},
        {"types": {"bar": 1 << 40}},
        {"types": []},
        {"colors": [None]},
        {"extra": 1},
    ],
)
def test_a_bad_record_is_refused(change):
    with pytest.raises(ValueError, match=r"record|layout"):
        Record.from_json({**RECORD, **change})
    assert _decode(record={**RECORD, **change}).status == Status.KILLED


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


def test_how_the_process_ended_outranks_what_it_said():
    claim = json.dumps(CLAIM).encode()
    for end, code, status in (
        ("wall", 9, Status.TIMEOUT),
        ("disk", 9, Status.KILLED),
        ("signal", 11, Status.KILLED),
        ("signal", 24, Status.TIMEOUT),
    ):
        result = decode({**EXIT, "end": end, "code": code}, claim, bytes(24), CONFIG)
        assert result.status == status and result.image is None and result.error
    assert "SIGSEGV" in decode({**EXIT, "end": "signal", "code": 11}, claim, b"", CONFIG).error


def test_error_text_is_bounded_and_clean():
    result = _decode(status="error", error="x" * 5000 + "the end", pixels=b"", size=None)
    assert len(result.error) == CONFIG.feedback_chars and result.error.endswith("the end")
    assert clean_text("a\x00b\ud800\nc", 100) == "a?b?\nc"
    assert clean_text(f"in {np.__file__}: no", 100) == "in numpy/__init__.py: no"
