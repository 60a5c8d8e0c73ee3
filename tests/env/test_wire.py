"""Frames and messages between trainer, zygote and child."""

import json
import socket
import struct
import threading

import pytest

from mmrecoder_jax.env import wire
from mmrecoder_jax.env.wire import End, Finding, Outcome, RecordKind, Request, Settings

SETTINGS = Settings(
    directory="/tmp/x",
    rc_params={"figure.figsize": [1.0, 2.0]},
    preload=("numpy",),
    dpi=100,
    max_pixels=1000,
    wall_seconds=1.0,
    cpu_seconds=2.0,
    memory_mb=3,
    partial=False,
    sandbox="auto",
    landlock_abi=None,
)


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    ours.settimeout(5)
    theirs.settimeout(5)
    with ours, theirs:
        yield ours, theirs


@pytest.mark.parametrize(
    "message",
    [
        SETTINGS,
        Request("x = 1\ud800", RecordKind.OFFICIAL_CALLS),
        Outcome(End.SIGNAL, 9, 1.5, 0.5),
        Outcome(End.EXIT, 0, 1.5, 0.5, Finding.FORGED | Finding.HIDDEN_TEXT),
    ],
)
def test_messages_survive_json(message):
    assert type(message).from_json(json.loads(json.dumps(message.to_json()))) == message


def test_a_frame_arrives_whole(pair):
    ours, theirs = pair
    pixels = bytes(range(256)) * 10_000  # more than a socket's buffer takes at once
    sender = threading.Thread(target=wire.send, args=(ours, {"a": 1}, b"claim", pixels))
    sender.start()
    assert wire.receive(theirs, 10, len(pixels)) == ({"a": 1}, b"claim", pixels)
    sender.join()


def test_frames_over_their_limits_are_refused_before_they_are_read(pair):
    ours, theirs = pair
    wire.send(ours, {}, b"claim")
    with pytest.raises(ValueError, match="over the limit"):
        wire.receive(theirs, max_claim=4)
    wire.send(ours, {}, b"", b"pixels")
    theirs.recv(100)  # the rest of the first frame, and the second
    ours.sendall(struct.pack("<III", 2**32 - 1, 0, 0))
    with pytest.raises(ValueError, match="over the limit"):
        wire.receive(theirs)


def test_a_peer_that_goes_is_noticed(pair):
    ours, theirs = pair
    ours.sendall(b"\0\0")
    ours.close()
    with pytest.raises(EOFError):
        wire.receive(theirs)


def result(claim: bytes, pixels: bytes, display: bytes, answer: bytes = wire.WANTED) -> bytearray:
    """What a zygote has read of a child that it has answered so."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(answer)
        wire.write_result(ours.fileno(), claim, pixels, lambda: display)
        ours.shutdown(socket.SHUT_WR)
        return bytearray(theirs.makefile("rb").read())


def test_a_childs_result_is_taken_apart_as_it_was_written():
    data = result(b"claim", b"pixels", b"list")
    assert wire.split_result(data, 100) == (b"claim", b"pixels", b"list")
    assert wire.split_result(result(b"", b"", b""), 100) == (b"", b"", b"")


def test_the_display_list_is_made_when_it_is_wanted_and_after_the_claim():
    def never() -> bytes:
        raise AssertionError("it is not wanted")

    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(wire.UNWANTED)
        wire.write_result(ours.fileno(), b"claim", b"pixels", never)
        assert wire.has_claim(bytearray(theirs.recv(100)))
    data = result(b"claim", b"pixels", b"list")
    whole = len(data) - len(b"list")
    assert wire.has_claim(data[:whole])
    assert not any(wire.has_claim(data[:end]) for end in range(whole))
    assert not wire.has_claim(result(b"claim", b"", b""))  # such a child asks nothing


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"short",
        bytes(result(b"claim", b"pixels", b"")),  # a byte too many
        bytes(result(b"claim", b"pixe", b"")[:-1]),
        struct.pack("<II", 2**32 - 1, 2**32 - 1),
        struct.pack("<II", wire.MAX_CLAIM_BYTES + 1, 0) + bytes(wire.MAX_CLAIM_BYTES + 1),
    ],
)
def test_a_result_whose_lengths_do_not_fit_is_empty(data):
    assert wire.split_result(bytearray(data), 5) == (b"", b"", b"")
