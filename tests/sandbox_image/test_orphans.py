"""A session whose supervisor died while it was being forked ends by itself."""

import asyncio
import contextlib
import os
import signal
import socket
import time
from pathlib import Path

from sandbox_image.processes import Forker, Reaper


def _ends(process: Path, *, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while process.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not process.exists()


async def test_a_session_that_finds_its_supervisor_gone_does_not_wait_for_it(tmp_path: Path) -> None:
    reaper = Reaper()
    reaper.start()
    zygote = Forker("zygote", reaper)
    try:
        await zygote.ready(timeout_s=60)
        request = {"op": "fork", "uid": None, "filtered": False, "by_tree": False, "supervisor": 2**22 + 1}
        request |= {"home": str(tmp_path / "home"), "tmp": str(tmp_path / "tmp")}
        ours, theirs = socket.socketpair()
        with ours, theirs, open(os.devnull, "wb") as null:
            child = await zygote.request(request, (theirs.fileno(), null.fileno(), null.fileno()))
            left = not await asyncio.to_thread(_ends, Path(f"/proc/{child.pid}"), within_s=60.0)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)
        assert not left
    finally:
        os.kill(zygote.pid, signal.SIGKILL)
        asyncio.get_running_loop().remove_signal_handler(signal.SIGCHLD)
