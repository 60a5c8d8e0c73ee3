"""An authenticated connection between a trainer and an executor host.

Both know a secret. Each proves it with a challenge of the other's, so neither the secret nor a
proof that could be used again crosses the network:

    host -> trainer     {"mmrecoder": 1, "challenge": a}
    trainer -> host     {"challenge": b, "proof": HMAC(secret, "trainer" a b)}
    host -> trainer     {"proof": HMAC(secret, "host" a b)}, or what is "refused"

From then on every frame of `wire` is followed by its HMAC under a key that the secret and both
challenges give, one for each direction, and the frame's number in it: nobody on the way can change,
add, repeat or leave out a frame. A frame is not looked at before that is checked. Nothing is
encrypted. No byte from the network is unpickled or evaluated; every length is checked before memory
is taken, and before the proofs nothing longer than a few lines is read.
"""

import contextlib
import hashlib
import hmac
import json
import secrets
import select
import socket
import threading
import time
import zlib
from pathlib import Path
from typing import Any

from mmrecoder_jax.env import wire

BEAT_SECONDS = 1.0  # a host that works on something says so
SILENCE_SECONDS = 10.0  # after so long without a byte, the other side is gone or hangs
SEND_SECONDS = 60.0  # to hand one frame to the network
LEAST_SECRET = 16  # characters
BEAT = {"beat": True}
_VERSION = 1  # of all that is said between trainer and host
_LONGEST_GREETING = 4096  # bytes of a frame before the proofs
_LONGEST_WORDS = 500  # characters of what the other side says, or of what is wrong with it
_DIGEST = "sha256"
_DIGEST_BYTES = 32
_CHALLENGE_BYTES = 32
_FOREVER = 1e6  # seconds
_HOST, _TRAINER = b"host", b"trainer"


class SecretError(ValueError):
    """A secret that cannot be used; the message says why and what to do, and nothing of it."""


class Refused(Exception):
    """The other side does not let us in; the message says why."""


def read_secret(file: str, name: str) -> bytes:
    """The secret in a file, without the white space around it; b"" where no file is named.

    Args:
      name: what the user calls the setting.

    Raises:
      SecretError: there is none, or it is too short.
    """
    if not file:
        return b""
    try:
        secret = Path(file).read_bytes().strip()
    except OSError as problem:
        raise SecretError(
            f"{name}={file!r} cannot be read ({problem.strerror}): make one with "
            "`python -m mmrecoder_jax.env.serve --new-secret=FILE`"
        ) from problem
    if len(secret) < LEAST_SECRET:
        raise SecretError(
            f"{name}={file!r} holds {len(secret)} characters, and {LEAST_SECRET} are the least: "
            "make one with `python -m mmrecoder_jax.env.serve --new-secret=FILE`"
        )
    return secret


def printable(text: str) -> str:
    """Words of the other side as a user may be shown them."""
    return "".join(c if c.isprintable() else " " for c in text[:_LONGEST_WORDS])


def pack(pixels: bytes) -> bytes:
    """A picture for the network: a chart takes some tens of kilobytes instead of a megabyte."""
    return zlib.compress(pixels, 1) if pixels else b""


def unpack(packed: bytes, most: int) -> bytes:
    """The picture again; raises ValueError where it is none, or longer than `most`."""
    if not packed:
        return b""
    stream = zlib.decompressobj()
    try:
        pixels = stream.decompress(packed, most + 1)
    except zlib.error as problem:
        raise ValueError("a picture that cannot be unpacked") from problem
    if len(pixels) > most or not stream.eof or stream.unused_data:
        raise ValueError("a picture that is too long, or cut")
    return pixels


def longest_packed(most: int) -> int:
    """How long `pack` can make so many bytes."""
    return most + most // 1000 + 64


class Channel:
    """One end of the connection. One thread receives; any may send.

    Raises, from every method:
      EOFError: the other side is gone.
      ValueError: what it sends cannot be, or was changed on the way.
      OSError: it is silent for `SILENCE_SECONDS`, late, or takes nothing.
    """

    def __init__(self, sock: socket.socket):
        self._socket = sock
        sock.settimeout(SEND_SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # frames are whole
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._deadline = self._silence = _FOREVER
        self._sending = threading.Lock()
        self._keys: tuple[bytes, bytes] | None = None  # of what we send, of what we receive
        self._sent = self._received = 0

    def admit(self, secret: bytes, seconds: float) -> None:
        """The host's part of the proofs; raises Refused where the trainer has another secret."""
        self._limit(seconds, seconds)
        challenge = secrets.token_bytes(_CHALLENGE_BYTES)
        self._greet({"mmrecoder": _VERSION, "challenge": challenge.hex()})
        said = self._greeting()
        both = challenge + _bytes(said, "challenge")
        if not hmac.compare_digest(_bytes(said, "proof"), _sign(secret, _TRAINER + both)):
            self._greet({"refused": "secret"})
            raise Refused("it does not know the secret")
        self._greet({"proof": _sign(secret, _HOST + both).hex()})
        self._keys = _keys(secret, both, _HOST, _TRAINER)

    def enter(self, secret: bytes, seconds: float) -> None:
        """The trainer's part; raises Refused where the host has another secret, or version."""
        self._limit(seconds, seconds)
        said = self._greeting()
        if said.get("mmrecoder") != _VERSION:
            raise ValueError("no executor host of this version answers there")
        challenge = secrets.token_bytes(_CHALLENGE_BYTES)
        both = _bytes(said, "challenge") + challenge
        proof = _sign(secret, _TRAINER + both).hex()
        self._greet({"challenge": challenge.hex(), "proof": proof})
        said = self._greeting()
        if said == {"refused": "secret"}:
            raise Refused("it has another secret")
        if not hmac.compare_digest(_bytes(said, "proof"), _sign(secret, _HOST + both)):
            raise Refused("it does not know the secret")
        self._keys = _keys(secret, both, _TRAINER, _HOST)

    def send(self, control: dict[str, Any], claim: bytes = b"", pixels: bytes = b"") -> None:
        """Sends one frame."""
        assert self._keys is not None, "after the proofs"
        frame = wire.Frame(json.dumps(control).encode(), claim, pixels)
        with self._sending:
            mac = _of_frame(self._keys[0], self._sent, frame)
            self._sent += 1
            self._socket.sendall(frame.head() + frame.control)
            for part in (claim, pixels, mac):
                if part:
                    self._socket.sendall(part)

    def receive(
        self,
        seconds: float = _FOREVER,
        most: tuple[int, int, int] = (wire.MAX_CONTROL_BYTES, 0, 0),
        silence: float = -1.0,
    ) -> tuple[dict[str, Any], bytes, bytes]:
        """Receives one frame: control, claim, pixels.

        Args:
          seconds: for all of it.
          most: the largest lengths of the three parts.
          silence: between two bytes; below 0: `SILENCE_SECONDS`.
        """
        assert self._keys is not None, "after the proofs"
        self._limit(seconds, silence if silence >= 0 else SILENCE_SECONDS)
        frame = wire.receive_frame(self._read, most)
        mac = wire.exactly(self._read, _DIGEST_BYTES)
        if not hmac.compare_digest(mac, _of_frame(self._keys[1], self._received, frame)):
            raise ValueError("a frame was changed on the way")
        self._received += 1
        return _parse(frame.control), frame.claim, frame.pixels

    def wait(self, seconds: float) -> bool:
        """Whether something comes, or the other side goes, within so many seconds."""
        return bool(self._poll.poll(1000 * max(0.0, seconds)))

    def shut(self) -> None:
        """Ends all waiting of other threads, here and there; `close` has to follow."""
        with contextlib.suppress(OSError):  # it is shut
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Gives the connection up."""
        self._socket.close()

    def _limit(self, seconds: float, silence: float) -> None:
        self._deadline, self._silence = time.monotonic() + seconds, silence

    def _read(self, view: memoryview) -> int:
        # What is there came in time, however late this thread is. But a peer that sends byte by
        # byte has no more time than any other.
        left = self._deadline - time.monotonic()
        if not self.wait(0) and not self.wait(min(left, self._silence)):
            raise TimeoutError("nothing came in time")
        return self._socket.recv_into(view)

    def _greet(self, words: dict[str, Any]) -> None:
        frame = wire.Frame(json.dumps(words).encode(), b"", b"")
        self._socket.sendall(frame.head() + frame.control)

    def _greeting(self) -> dict[str, Any]:
        return _parse(wire.receive_frame(self._read, (_LONGEST_GREETING, 0, 0)).control)


def _parse(control: bytes) -> dict[str, Any]:
    try:
        words = json.loads(control)
    except RecursionError as problem:
        raise ValueError("words within words") from problem
    if not isinstance(words, dict):
        raise ValueError("no words")
    return words


def _bytes(words: dict[str, Any], name: str) -> bytes:
    """A challenge or a proof."""
    text = words.get(name)
    if not isinstance(text, str) or len(text) != 2 * _CHALLENGE_BYTES:
        raise ValueError(f"no {name}")
    return bytes.fromhex(text)


def _sign(key: bytes, message: bytes) -> bytes:
    return hmac.digest(key, message, _DIGEST)


def _keys(secret: bytes, both: bytes, ours: bytes, theirs: bytes) -> tuple[bytes, bytes]:
    """The keys of a connection, for each direction."""
    return _sign(secret, ours + b" sends" + both), _sign(secret, theirs + b" sends" + both)


def _of_frame(key: bytes, number: int, frame: wire.Frame) -> bytes:
    mac = hmac.new(key, number.to_bytes(8) + frame.head(), hashlib.sha256)
    for part in frame:
        mac.update(part)
    return mac.digest()
