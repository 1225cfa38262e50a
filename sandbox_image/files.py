"""Files of a session, asked for by the supervisor, which opens none of them itself.

    supervisor --request; contents of a write--> helper (file_helper.py) --header, contents of a read--> supervisor

What the helper says is untrusted like all that runs under the session's uid: the session may have killed it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
from typing import Any

from sandbox_image import proc
from sandbox_image.file_helper import DEADLINE_S, HEADER_BYTES, TROUBLES, FileTrouble
from sandbox_image.processes import Forker

MAX_BYTES = 32 << 20
"""Largest file in or out."""
_CHUNK = 1 << 20
_PATH_BYTES = 4096


async def touch(
    attendant: Forker, request: dict[str, Any], *, content: bytes = b"", room: int = 0
) -> tuple[dict[str, Any], bytes]:
    """The helper's header, and up to `room` bytes behind it. Raises `FileTrouble`, `ForkerDied`."""
    if len(request.get("path", "").encode("utf-8", "surrogateescape")) > _PATH_BYTES:
        raise FileTrouble("invalid", f"a path has at most {_PATH_BYTES} bytes")
    if len(content) > MAX_BYTES:
        raise FileTrouble("too_large", f"a file has at most {MAX_BYTES} bytes")
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours:
        try:
            with theirs:
                helper = await attendant.request({"op": "file", "size": len(content), **request}, (theirs.fileno(),))
        except BlockingIOError as error:
            raise FileTrouble("no_room", str(error)) from None
        said = bytearray()
        try:
            async with asyncio.timeout(DEADLINE_S):
                with contextlib.suppress(OSError):  # it has refused already: its header says why
                    await loop.sock_sendall(ours, content)
                with contextlib.suppress(ConnectionResetError):  # its end, when it has not read all of the contents
                    while len(said) <= room + HEADER_BYTES and (data := await loop.sock_recv(ours, _CHUNK)):
                        said += data
        except TimeoutError:
            raise FileTrouble("no_room", f"the transfer did not end within {DEADLINE_S:g} s") from None
        finally:
            if not helper.exit.done():
                proc.send(helper.pid, signal.SIGKILL)
    head, newline, body = bytes(said).partition(b"\n")
    try:
        header = json.loads(head) if newline else {}
    except ValueError:
        header = {}
    if not isinstance(header, dict) or ("size" not in header and header.get("trouble") not in TROUBLES):
        raise FileTrouble("no_room", "the session's own processes ended the transfer")
    if "trouble" in header:
        raise FileTrouble(header["trouble"], str(header.get("text", ""))[:1000])
    if len(body) != header["size"] or len(body) > room:
        raise FileTrouble("no_room", "the transfer was cut short")
    return header, body


def listed(body: bytes) -> list[tuple[str, int, float]]:
    """Path, size and modification time of each file. Raises `FileTrouble` when that is not what was sent."""
    try:
        return [(str(path), max(0, int(size)), float(modified)) for path, size, modified in json.loads(body)]
    except (ValueError, TypeError, RecursionError):
        raise FileTrouble("no_room", "the session's own processes disturbed the listing") from None
