"""The connection of trainer and host: proofs, and frames that nobody on the way can change."""

import contextlib
import itertools
import json
import random
import socket
import struct
import threading
import time

import pytest

from mmrecoder_jax.env import channel
from mmrecoder_jax.env.channel import Channel, Refused, SecretError, read_secret

SECRET = b"a secret of more than sixteen characters"


@contextlib.contextmanager
def connected():
    """Two ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
    with one, other:
        yield one, other


@contextlib.contextmanager
def relayed(change):
    """A host's and a trainer's channel after the proofs, and a list of all that crossed.

    What the host sends later passes through `change`, frame by frame: it yields what goes on.
    """
    crossed = []

    def forward(source, sink, greetings, touch):
        with contextlib.suppress(OSError, ValueError):
            for number in itertools.count():
                frame = read_frame(source, has_proof=number >= greetings)
                if not frame:
                    break
                crossed.append(frame)
                for part in touch(frame) if number >= greetings else [frame]:
                    sink.sendall(part)
            sink.shutdown(socket.SHUT_RDWR)

    with connected() as (host, far), connected() as (near, trainer):
        ways = [(far, near, 2, change), (near, far, 1, lambda frame: [frame])]
        threads = [threading.Thread(target=forward, args=way, daemon=True) for way in ways]
        for thread in threads:
            thread.start()
        ends = Channel(host), Channel(trainer)
        greet(*ends, SECRET, SECRET)
        yield *ends, crossed
        for each in (host, far, near, trainer):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()


def read_frame(sock, has_proof):
    head = sock.recv(12, socket.MSG_WAITALL)
    if len(head) < 12:
        return b""
    rest = sum(struct.unpack("<III", head)) + 32 * has_proof
    return head + sock.recv(rest, socket.MSG_WAITALL)


def greet(host, trainer, hosts_secret, trainers_secret):
    """Both sides' proofs; the host's refusal, or None."""
    refusals = []

    def admit():
        try:
            host.admit(hosts_secret, 5.0)
        except Refused as problem:
            refusals.append(problem)

    thread = threading.Thread(target=admit)
    thread.start()
    try:
        trainer.enter(trainers_secret, 5.0)
    finally:
        thread.join()
    return refusals[0] if refusals else None


def test_frames_cross_in_both_directions():
    with connected() as (one, other):
        host, trainer = Channel(one), Channel(other)
        assert greet(host, trainer, SECRET, SECRET) is None
        for number in range(3):
            trainer.send({"number": number})
            assert host.receive() == ({"number": number}, b"", b"")
            host.send({"answer": number}, b"claim", bytes(number))
            assert trainer.receive(most=(99, 5, 2)) == ({"answer": number}, b"claim", bytes(number))


def test_another_secret_is_refused_and_never_said():
    with relayed(untouched) as (_, _, crossed):
        assert len(crossed) == 3 and not any(SECRET in frame for frame in crossed)
    with connected() as (one, other):
        with pytest.raises(Refused) as refused:
            greet(Channel(one), Channel(other), SECRET, b"another one of many characters")
        assert str(refused.value) == "it has another secret"


def test_a_host_that_does_not_know_the_secret_is_refused():
    def pretend(sock):
        for words in ({"mmrecoder": 1, "challenge": "0" * 64}, {"proof": "0" * 64}):
            text = json.dumps(words).encode()
            sock.sendall(struct.pack("<III", len(text), 0, 0) + text)

    with connected() as (one, other):
        pretend(one)
        with pytest.raises(Refused, match="it does not know the secret"):
            Channel(other).enter(SECRET, 5.0)


def test_a_proof_of_another_connection_or_of_ourselves_is_worth_nothing():
    with relayed(untouched) as (_, _, crossed):
        proof = crossed[1]  # of a trainer
    with connected() as (one, other):
        other.sendall(proof)
        with pytest.raises(Refused):
            Channel(one).admit(SECRET, 5.0)
    with connected() as (one, other):
        host = Channel(one)
        thread = threading.Thread(target=lambda: other.sendall(read_frame(other, False)))
        thread.start()  # a trainer that sends the host's own challenge back
        with pytest.raises(ValueError, match="no proof"):
            host.admit(SECRET, 5.0)
        thread.join()


def untouched(frame):
    return [frame]


def swapping():
    """Holds the first frame back until the second one has passed."""
    held = []

    def swap(frame):
        held.append(frame)
        return held[::-1] if len(held) == 2 else []

    return swap


def of_first(change):
    """Does that to the first frame alone."""
    seen = []

    def touch(frame):
        seen.append(frame)
        return change(frame) if len(seen) == 1 else [frame]

    return touch


@pytest.mark.parametrize(
    "change",
    [
        of_first(lambda frame: [frame[:-1] + bytes([frame[-1] ^ 1])]),
        of_first(lambda frame: [frame.replace(b'"number": 1', b'"number": 2')]),
        of_first(lambda frame: [frame[:-33] + bytes([frame[-33] ^ 1]) + frame[-32:]]),
        # a byte of the claim becomes one of the picture
        of_first(lambda f: [struct.pack("<III", len(f) - 12 - 32 - 3, 1, 2) + f[12:]]),
        of_first(lambda frame: [frame, frame]),
        of_first(lambda frame: []),
        swapping(),
    ],
    ids=["proof", "words", "picture", "lengths", "repeated", "left out", "swapped"],
)
def test_a_frame_that_was_touched_on_the_way_is_no_frame(change):
    with relayed(change) as (host, trainer, _):
        host.send({"number": 1}, b"cl", b"p")
        host.send({"number": 3}, b"cl", b"p")
        with pytest.raises(ValueError, match="changed on the way"):
            for _ in range(2):
                trainer.receive(5.0, (99, 2, 2))


def test_frames_that_nobody_touched_arrive():
    with relayed(untouched) as (host, trainer, crossed):
        host.send({"number": 1}, b"cl", b"p")
        assert trainer.receive(5.0, (99, 2, 2)) == ({"number": 1}, b"cl", b"p")
        assert len(crossed) == 4


def test_what_is_sent_does_not_come_back_as_an_answer():
    with connected() as (one, other):
        host, trainer = Channel(one), Channel(other)
        greet(host, trainer, SECRET, SECRET)
        trainer.send({"want": True})
        one.sendall(read_frame(one, has_proof=True))
        with pytest.raises(ValueError, match="changed on the way"):
            trainer.receive()


@pytest.mark.parametrize(
    "greeting",
    [
        struct.pack("<III", 4097, 0, 0),
        struct.pack("<III", 2, 1, 0) + b"{}x",
        struct.pack("<III", 2, 0, 0) + b"{}",
        struct.pack("<III", 2, 0, 0) + b"[]",
        struct.pack("<III", 4000, 0, 0) + b"[" * 4000,
        struct.pack("<III", 2, 0, 0) + b"\xff\xfe",
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
def test_greetings_that_cannot_be(greeting):
    for side in (Channel.admit, Channel.enter):
        with connected() as (one, other):
            one.sendall(greeting)
            one.shutdown(socket.SHUT_WR)
            with pytest.raises((ValueError, EOFError)):
                side(Channel(other), SECRET, 5.0)


def test_who_sends_byte_by_byte_has_no_more_time():
    over = threading.Event()

    def drip(sock):
        with contextlib.suppress(OSError):
            while not over.wait(0.02):
                sock.sendall(b"\0")

    with connected() as (one, other):
        thread = threading.Thread(target=drip, args=(one,))
        thread.start()
        try:
            with pytest.raises(TimeoutError):
                Channel(other).enter(SECRET, 0.2)
        finally:
            over.set()
            thread.join()


def test_silence_ends_a_wait(monkeypatch):
    monkeypatch.setattr(channel, "SILENCE_SECONDS", 0.1)
    with connected() as (one, other):
        host, trainer = Channel(one), Channel(other)
        greet(host, trainer, SECRET, SECRET)
        with pytest.raises(TimeoutError):
            trainer.receive()
        start = time.monotonic()
        threading.Timer(0.2, lambda: host.send({"late": True})).start()
        assert trainer.receive(silence=10.0)[0] == {"late": True}
        assert time.monotonic() - start >= 0.2


def test_who_reads_late_finds_what_came_in_time():
    with connected() as (one, other):
        host, trainer = Channel(one), Channel(other)
        greet(host, trainer, SECRET, SECRET)
        host.send({"early": True})
        time.sleep(0.2)
        assert trainer.receive(0.0)[0] == {"early": True}
        with pytest.raises(TimeoutError):
            trainer.receive(0.0)


def test_pictures_are_packed_and_bounded():
    picture = bytes(range(256)) * 40
    noise = random.Random(0).randbytes(9000)
    for pixels in (picture, noise, b"", b"x"):
        packed = channel.pack(pixels)
        assert channel.unpack(packed, len(pixels)) == pixels
        assert len(packed) <= channel.longest_packed(len(pixels))
    packed = channel.pack(picture)
    assert len(packed) < len(picture) / 10
    for bad in (packed[:-1], packed + b"x", packed[1:]):
        with pytest.raises(ValueError, match="a picture that"):
            channel.unpack(bad, len(picture))
    with pytest.raises(ValueError, match="too long"):
        channel.unpack(packed, len(picture) - 1)


def test_secrets_of_files(tmp_path):
    file = tmp_path / "secret"
    file.write_bytes(SECRET + b" \r\n")
    assert read_secret(str(file), "--secret") == SECRET
    assert read_secret("", "--secret") == b""
    file.write_bytes(b"too short\n")
    with pytest.raises(SecretError) as short:
        read_secret(str(file), "env.secret")
    assert "env.secret=" in str(short.value) and "9 characters" in str(short.value)
    assert "too short" not in str(short.value)
    with pytest.raises(SecretError, match="No such file"):
        read_secret(str(tmp_path / "missing"), "env.secret")
    with pytest.raises(SecretError, match="Is a directory"):
        read_secret(str(tmp_path), "env.secret")
