"""Length-prefixed JSON between supervisor and session. What a session sends is untrusted: size-capped, no pickle."""

from __future__ import annotations

import fcntl
import json
import socket
import struct
import termios
from typing import Any

HEADER = struct.Struct(">I")
_READ = 1 << 16
_FDS = struct.Struct("3i")


class BadFrame(ValueError):
    """The peer sent something that is not a frame of ours."""


def encode(message: dict[str, Any]) -> bytes:
    """Surrogates, which JSON can carry but UTF-8 cannot, become JSON's escapes of them."""
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


class Channel:
    """The session's end: blocking, one frame at a time. What was read survives an exception out of a signal handler."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._decoder = Decoder(limit=(1 << 32) - 1)  # the supervisor is believed
        self._fds: list[int] = []

    def wait(self) -> None:
        """Until there is something to be read, the end included; it stays there."""
        self.socket.recv(1, socket.MSG_PEEK)

    def receive(self) -> tuple[dict[str, Any], list[int]] | None:
        """A frame and the descriptors that came with it; None at end of file."""
        while True:
            data, ancillary, _, _ = self.socket.recvmsg(_READ, socket.CMSG_SPACE(_FDS.size))
            self._fds += [fd for _, _, packed in ancillary for fd in _FDS.unpack(packed)]
            if not data:
                return None
            for frame in self._decoder.feed(data):  # one at most: each is answered before the next is sent
                fds, self._fds = self._fds, []
                return frame, fds

    def is_pending(self) -> bool:
        """Something is there to be read."""
        return struct.unpack("i", fcntl.ioctl(self.socket.fileno(), termios.FIONREAD, b"\0\0\0\0"))[0] > 0

    def send(self, message: dict[str, Any]) -> None:
        self.socket.sendall(encode(message))
