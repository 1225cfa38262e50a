"""The first words of a copied session: who is it? Its pid comes from the kernel, never from what it says."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from typing import Any

from sandbox_image import frames

_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid of the sender, as our namespaces number them
_LIMIT = 64 << 10


def ask_who(control: socket.socket) -> None:
    """From now on, what is received on this end says who sent it."""
    control.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)


async def hello(control: socket.socket, *, uid: int | None, nonce: str) -> tuple[int, dict[str, Any]]:
    """The sender's pid and its frame. Raises `BadFrame` unless it is the right uid's and has the nonce."""
    decoder = frames.Decoder(limit=_LIMIT)
    while True:
        await _readable(control)
        try:
            data, ancillary, _, _ = control.recvmsg(_LIMIT, socket.CMSG_SPACE(_CREDENTIALS.size))
        except (BlockingIOError, InterruptedError):
            continue
        if not data or not ancillary:
            raise frames.BadFrame("it ended before its first word")
        pid, sender, _ = _CREDENTIALS.unpack(ancillary[0][2])
        if sender != (os.geteuid() if uid is None else uid):
            raise frames.BadFrame(f"somebody else's word, of uid {sender}")
        for frame in decoder.feed(data):
            if frame.get("nonce") != nonce:
                raise frames.BadFrame("a frame that answers no call of ours")
            control.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
            return pid, frame


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    arrived = asyncio.Event()
    loop.add_reader(sock.fileno(), arrived.set)
    try:
        await arrived.wait()
    finally:
        loop.remove_reader(sock.fileno())
