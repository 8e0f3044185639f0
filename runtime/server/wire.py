"""Messages as bytes between a server and an engine in another process: four bytes of length, then msgpack.
Knows no process and no engine."""

from __future__ import annotations

import asyncio
import socket
from typing import TypeVar

import msgspec

T = TypeVar("T")
_LENGTH_BYTES = 4


def frame(message: object) -> bytes:
    """One message as it is sent."""
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(_LENGTH_BYTES, "little") + body


async def read_frame(reader: asyncio.StreamReader, decoder: msgspec.msgpack.Decoder[T]) -> T | None:
    """The next message; None when the other side has gone, even in the middle of one."""
    try:
        length = int.from_bytes(await reader.readexactly(_LENGTH_BYTES), "little")
        return decoder.decode(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def receive_frame(connection: socket.socket, decoder: msgspec.msgpack.Decoder[T]) -> T | None:
    """`read_frame` without an event loop: waits."""
    head = _receive(connection, _LENGTH_BYTES)
    if head is None:
        return None
    body = _receive(connection, int.from_bytes(head, "little"))
    return None if body is None else decoder.decode(body)


def _receive(connection: socket.socket, size: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(min(size - len(parts), 2**20))
        if not part:
            return None
        parts += part
    return bytes(parts)
