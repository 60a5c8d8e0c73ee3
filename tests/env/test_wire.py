"""Frames and messages between trainer, zygote and child."""

import contextlib
import json
import socket
import struct
import threading
import time

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


def result(claim: bytes, pixels: bytes, display: bytes, answer: bytes = wire.WANTED) -> bytes:
    """What a child sends whom its zygote has answered so."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(answer)
        wire.write_result(ours.fileno(), claim, pixels, lambda: display)
        ours.shutdown(socket.SHUT_WR)
        return theirs.makefile("rb").read()


def taken(data: bytes, intake: wire.Intake | None = None) -> wire.Intake:
    """An intake, by default of 1 pixel and a display list of 5 bytes, after it has read `data`."""
    intake = intake or wire.Intake(1, 5)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender = threading.Thread(target=_send_what_is_taken, args=(theirs, data))
        sender.start()
        while intake.read(ours) and not intake.is_too_long():
            time.sleep(0.001)
        ours.close()
        sender.join()
    return intake


def _send_what_is_taken(connection: socket.socket, data: bytes) -> None:
    with connection, contextlib.suppress(OSError):
        connection.sendall(data)


def test_a_childs_result_is_taken_apart_as_it_was_written():
    assert taken(result(b"claim", b"rgba", b"list")).parts() == (b"claim", b"rgba", b"list")
    assert taken(result(b"", b"", b"")).parts() == (b"", b"", b"")


def test_the_display_list_is_made_when_it_is_wanted_and_after_the_claim():
    def never() -> bytes:
        raise AssertionError("it is not wanted")

    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(wire.UNWANTED)
        wire.write_result(ours.fileno(), b"claim", b"rgba", never)
        assert taken(theirs.recv(100)).has_claim()
    data = result(b"claim", b"rgba", b"list")
    whole = len(data) - len(b"list")
    assert taken(data[:whole]).has_claim()
    assert not any(taken(data[:end]).has_claim() for end in range(whole))
    assert not taken(result(b"claim", b"", b"")).has_claim()  # such a child asks nothing


TOO_MANY = wire.MAX_CLAIM_BYTES + 1


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<II", TOO_MANY, 0) + bytes(TOO_MANY),
        struct.pack("<II", TOO_MANY, 0),  # known before any of it comes
        struct.pack("<II", 2, 5) + bytes(7),
        struct.pack("<II", 2**32 - 1, 2**32 - 1),
        result(b"claim", b"rgba", b"a list"),
        result(b"claim", b"rgba", b"") + bytes(1 << 20),
    ],
)
def test_each_part_of_a_result_has_a_bound(data):
    intake = taken(data)
    assert intake.is_too_long() and intake.parts() == (b"", b"", b"")


@pytest.mark.parametrize("data", [b"", b"short", result(b"claim", b"rgba", b"")[:-1]])
def test_half_a_result_is_empty(data):
    intake = taken(data)
    assert not intake.is_too_long() and intake.parts() == (b"", b"", b"")


def test_nothing_of_a_result_is_left_in_memory():
    intake = taken(result(b"claim", b"rgba", b"list"))
    claim, _, _ = intake.parts()
    intake.forget()
    assert claim.tobytes() == bytes(5)
    assert taken(result(b"next", b"", b""), intake).parts() == (b"next", b"", b"")


def test_no_code_is_too_long_for_a_frame():
    longest = Request("\U0001f600" * wire.MAX_CODE_CHARACTERS, RecordKind.OFFICIAL_LAYOUT)
    assert len(json.dumps(longest.to_json())) < wire.MAX_CONTROL_BYTES
