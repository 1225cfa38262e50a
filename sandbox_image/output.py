"""Output that may be endless: `HeadTail` keeps its two ends, `Tap` passes its beginning on while it is printed."""

from __future__ import annotations

import asyncio
import codecs
from collections import deque
from collections.abc import AsyncIterator


class HeadTail:
    """At most `limit` bytes of what was written: the first half and the last half.

    >>> b = HeadTail(8)
    >>> b.write(b"abcdefghijklmnop")
    >>> b.text()
    'abcd\\n[output truncated: 8 bytes]\\nmnop'
    """

    def __init__(self, limit: int) -> None:
        self.total = 0
        self.limit = limit
        self._head_limit = limit // 2
        self._tail_limit = limit - self._head_limit
        self._head = bytearray()
        self._tail: deque[bytes] = deque()
        self._tail_size = 0

    def write(self, data: bytes) -> None:
        self.total += len(data)
        room = self._head_limit - len(self._head)
        if room > 0:
            self._head += data[:room]
            data = data[room:]
        if not data:
            return
        self._tail.append(data[-self._tail_limit :])
        self._tail_size += len(self._tail[-1])
        while self._tail_size - len(self._tail[0]) >= self._tail_limit:
            self._tail_size -= len(self._tail.popleft())
        if len(self._tail) > 4096:  # many tiny writes: one object instead
            joined = b"".join(self._tail)
            self._tail = deque([joined])

    @property
    def truncated(self) -> bool:
        return self.total > self._head_limit + self._tail_limit

    def text(self) -> str:
        """UTF-8; bytes that are not are shown as backslash escapes. A cut never splits a character."""
        tail = b"".join(self._tail)
        if not self.truncated:
            return (bytes(self._head) + tail).decode("utf-8", "backslashreplace")
        head = _without_cut_end(bytes(self._head))
        tail = _without_cut_start(tail[-self._tail_limit :])
        omitted = self.total - len(head) - len(tail)
        return (
            head.decode("utf-8", "backslashreplace")
            + f"\n[output truncated: {omitted} bytes]\n"
            + tail.decode("utf-8", "backslashreplace")
        )


def _without_cut_end(data: bytes) -> bytes:
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte < 0x80:
            return data
        if byte >= 0xC0:  # a lead byte: complete only when all of its continuation bytes follow
            need = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return data if back >= need else data[:-back]
    return data


def _without_cut_start(data: bytes) -> bytes:
    start = 0
    while start < min(3, len(data)) and 0x80 <= data[start] < 0xC0:
        start += 1
    return data[start:]


class Tap:
    """A cell's output as it comes, for one reader: at most `limit` bytes, then nothing more. No character is split.

    Iteration yields (is_stderr, text) and ends after `finish`.
    """

    def __init__(self, limit: int) -> None:
        self._left = limit
        decoder = codecs.getincrementaldecoder("utf-8")
        self._decoders = (decoder("backslashreplace"), decoder("backslashreplace"))
        self._chunks: asyncio.Queue[tuple[bool, str] | None] = asyncio.Queue()  # holds `limit` bytes at most

    def write(self, data: bytes, *, is_stderr: bool) -> None:
        if self._left > 0:
            self._put(is_stderr, self._decoders[is_stderr].decode(data[: self._left]))
            self._left -= len(data)

    def finish(self) -> None:
        """The cell has ended: bytes that still wait for the rest of their character are no text."""
        if self._left > 0:
            for is_stderr in (False, True):
                self._put(is_stderr, self._decoders[is_stderr].decode(b"", final=True))
        self.close()

    def close(self) -> None:
        """Nobody reads on, or nothing more will come."""
        self._left = 0
        self._chunks.put_nowait(None)

    def _put(self, is_stderr: bool, text: str) -> None:
        if text:
            self._chunks.put_nowait((is_stderr, text))

    async def __aiter__(self) -> AsyncIterator[tuple[bool, str]]:
        while (chunk := await self._chunks.get()) is not None:
            yield chunk
