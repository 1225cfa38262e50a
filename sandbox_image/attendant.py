"""Tidies up after sessions and touches their files, as their own users; runs no user code, speaks no gRPC.

`python -m sandbox_image.attendant FD`: a process beside the zygote (`forks.py` has the protocol), since a fork
copies the page tables of whoever forks, and a process that has imported nothing has few.
"""

from __future__ import annotations

import os
import signal
import socket
import stat
import sys
import time
from typing import Any, NoReturn

from sandbox_image import file_helper, forks, limits, proc

_CLEAN_DEADLINE_S = 5.0


def main(fd: int) -> None:
    forks.serve(forks.take_up(fd), {"clean": _clean, "file": file_helper.serve}, packages={})


def _clean(request: dict[str, Any], control: socket.socket, fds: list[int]) -> NoReturn:
    """As the session's own user: kill what is left of it, remove its files. Exit status 0 = nothing is left.

    `alone`: nobody else lives under this uid, which then ends altogether; else only the directories are emptied.
    """
    control.close()
    uid: int | None = request["uid"]
    limits.drop_to(uid)
    if uid is not None and request["alone"] and not _kill_all_of(uid):
        os._exit(1)
    owner = os.geteuid()
    try:
        for directory in request["directories"]:
            if os.path.isdir(directory):
                wipe(directory)
        for shared in request["shared"] if request["alone"] else ():
            for entry in os.scandir(shared):
                if entry.stat(follow_symlinks=False).st_uid == owner:
                    if entry.is_dir(follow_symlinks=False):
                        wipe(entry.path)
                        os.rmdir(entry.path)
                    else:
                        os.unlink(entry.path)
    except OSError:
        os._exit(2)
    os._exit(0)


def _kill_all_of(uid: int) -> bool:
    """Everything of our uid but ourselves: one kill(-1) is atomic; then wait until the kernel has buried them."""
    deadline = time.monotonic() + _CLEAN_DEADLINE_S
    while time.monotonic() < deadline:
        try:
            os.kill(-1, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        others = (int(pid) for pid in os.listdir("/proc") if pid.isdigit() and int(pid) != os.getpid())
        if not any(proc.uid_of(pid) == uid and proc.is_live(pid) for pid in others):
            return True
        time.sleep(0.0005)
    return False


def wipe(directory: str) -> None:
    """Empty a directory of ours, whatever permissions its owner left in it. Follows no link."""
    pending, found = [directory], []
    while pending:
        path = pending.pop()
        found.append(path)
        os.chmod(path, stat.S_IRWXU)
        for entry in os.scandir(path):
            if entry.is_dir(follow_symlinks=False):
                pending.append(entry.path)
            else:
                os.unlink(entry.path)
    for path in reversed(found[1:]):
        os.rmdir(path)


if __name__ == "__main__":
    main(int(sys.argv[1]))
