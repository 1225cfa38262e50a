"""Length-prefixed JSON between supervisor and session. What a session sends is untrusted: size-capped, no pickle."""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

HEADER = struct.Struct(">I")


class BadFrame(ValueError):
    """The peer sent something that is not a frame of ours."""


def encode(message: dict[str, Any]) -> bytes:
    """Surrogates, which JSON can carry but UTF-8 cannot, become backslash escapes."""
    body = json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")
    return HEADER.pack(len(body)) + body


def decode(body: bytes) -> dict[str, Any]:
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadFrame(f"not JSON: {error}") from None
    if not isinstance(message, dict):
        raise BadFrame(f"not an object: {type(message).__name__}")
    return message


class Decoder:
    """Cuts a byte stream into frames; a length above `limit` is refused before its body is read."""

    def __init__(self, *, limit: int) -> None:
        self.limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        self._buffer += data
        out = []
        while len(self._buffer) >= HEADER.size:
            (length,) = HEADER.unpack_from(self._buffer)
            if length > self.limit:
                raise BadFrame(f"frame of {length} bytes, limit {self.limit}")
            end = HEADER.size + length
            if len(self._buffer) < end:
                break
            body = bytes(self._buffer[HEADER.size : end])
            del self._buffer[:end]
            out.append(decode(body))
        return out


def receive(sock: socket.socket) -> dict[str, Any] | None:
    """Blocking read of one frame; None at end of file."""
    header = _exactly(sock, HEADER.size)
    if header is None:
        return None
    body = _exactly(sock, HEADER.unpack(header)[0])
    return None if body is None else decode(body)


def _exactly(sock: socket.socket, size: int) -> bytes | None:
    chunks = bytearray()
    while len(chunks) < size:
        data = sock.recv(min(size - len(chunks), 1 << 20))
        if not data:
            return None
        chunks += data
    return bytes(chunks)
