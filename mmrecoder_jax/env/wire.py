"""Framing of messages between trainer and zygote, and between zygote and a script's process.

A frame is three lengths (little-endian uint32) and three byte strings: control (trusted JSON of the
zygote or trainer), claim and pixels (what the script's process sent; opaque to the zygote). Lengths
are checked before anything is allocated.
"""

import json
import socket
import struct
from typing import Any

HEADER = struct.Struct("<III")
MAX_CONTROL = 8 << 20


def send(
    sock: socket.socket,
    control: dict[str, Any],
    claim: bytes = b"",
    pixels: bytes | memoryview = b"",
) -> None:
    """Sends one frame; raises OSError when the peer is gone."""
    head = json.dumps(control).encode()
    sock.sendall(HEADER.pack(len(head), len(claim), len(pixels)) + head + claim)
    if len(pixels):
        sock.sendall(pixels)


def receive(
    sock: socket.socket, max_claim: int = 0, max_pixels: int = 0
) -> tuple[dict[str, Any], bytes, bytes]:
    """Receives one frame. Raises EOFError when the peer is gone, ValueError on a frame over its
    limits, OSError on a time-out.
    """
    lengths = HEADER.unpack(_exactly(sock, HEADER.size))
    if lengths[0] > MAX_CONTROL or lengths[1] > max_claim or lengths[2] > max_pixels:
        raise ValueError(f"frame of {lengths} bytes is over the limit")
    control, claim, pixels = (_exactly(sock, length) for length in lengths)
    return json.loads(control), claim, pixels


def _exactly(sock: socket.socket, length: int) -> bytes:
    buffer = bytearray(length)
    view = memoryview(buffer)
    done = 0
    while done < length:
        count = sock.recv_into(view[done:])
        if count == 0:
            raise EOFError("the other process is gone")
        done += count
    return bytes(buffer)
