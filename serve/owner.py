"""An owner: the name under which a pool holds sessions and cells, and what of them survives the pool's process.

    ROOT/OWNER/lock          locked while a pool lives; its time of modification is the end of the owner's lease
    ROOT/OWNER/backend       the name of the backend that made the cells
    ROOT/OWNER/sessions/ID   a session's journal
    ROOT/OWNER/CELL/         a cell's socket, mounted into it; what only we may write lies beside it: CELL.log, ...

A pool that is killed leaves all of this behind. The next pool of the node takes the name and adopts it; when nobody has
come before the lease ends, the janitor takes the lock and removes it. Who holds the lock may change the directory, and
nobody else may: so a successor and the janitor never both have it, and a pool that is merely slow loses nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO

_NODE = re.compile(r"[A-Za-z0-9_-]{1,16}")
_NUMBERS = 256  # pools of one node


class Owner:
    """A locked owner's directory. Made by `claim` and `abandoned`."""

    def __init__(self, directory: Path, lock: IO[bytes]) -> None:
        self.directory = directory
        self._lock = lock

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def sessions(self) -> Path:
        return self.directory / "sessions"

    @property
    def backend(self) -> str:
        """Whose cells these are; "" when none was ever started."""
        try:
            return (self.directory / "backend").read_text()
        except FileNotFoundError:
            return ""

    @backend.setter
    def backend(self, name: str) -> None:
        (self.directory / "backend").write_text(name)

    def renew(self, lease_s: float) -> None:
        """Alive until `lease_s` from now, should this process end without a word."""
        end = time.time() + lease_s
        os.utime(self._lock.fileno(), (end, end))

    def forget_cells(self, *, but: Collection[str] = ()) -> None:
        """Remove the files of every cell but those. The cells themselves have ended."""
        keep = {"lock", "backend", "sessions"}
        for path in self.directory.iterdir():
            if path.name not in keep and path.stem not in but:
                _remove(path)

    def erase(self) -> None:
        """The end of the name: no file is left. The lock goes last, and whoever makes it anew meanwhile keeps his."""
        self.forget_cells()
        _remove(self.sessions)
        _remove(self.directory / "backend")
        _remove(self.directory / "lock")
        with contextlib.suppress(OSError):  # not empty: the name has its next owner
            self.directory.rmdir()
        self.leave()

    def leave(self) -> None:
        """Unlock, and leave all as it is."""
        self._lock.close()


def claim(root: Path, node: str, *, lease_s: float) -> Owner:
    """The name NODE-NUMBER that no live pool of the node has; one that somebody left behind comes first.

    Raises ValueError for a node whose name does not fit into a session id and a socket's path.
    """
    if not _NODE.fullmatch(node):
        raise ValueError(f"node={node!r}: 1 to 16 letters, digits, - or _")
    names = [f"{node}-{number}" for number in range(_NUMBERS)]
    for name in sorted(names, key=lambda name: not (root / name).is_dir()):  # stable: else by number
        directory = root / name
        directory.mkdir(mode=0o700, exist_ok=True)
        lock = try_lock(directory / "lock")
        if lock is not None:
            owner = Owner(directory, lock)
            owner.renew(lease_s)
            owner.sessions.mkdir(mode=0o700, exist_ok=True)
            return owner
    raise ValueError(f"{_NUMBERS} sandbox pools already run on node {node} ({root})")


def names(root: Path) -> list[str]:
    """Owners that have a directory, dead or alive."""
    return sorted(path.parent.name for path in root.glob("*/lock"))


def abandoned(root: Path) -> Iterator[Owner]:
    """Owners whose lease has ended and whose lock nobody holds; each is locked until the next one is asked for."""
    for name in names(root):
        path = root / name / "lock"
        try:
            if path.stat().st_mtime > time.time():
                continue  # not even tried: a lock held for a moment would turn a successor away
            lock = try_lock(path)
        except FileNotFoundError:
            continue
        if lock is not None:
            with lock:
                yield Owner(path.parent, lock)


def try_lock(path: Path) -> IO[bytes] | None:
    """The file, made if need be and locked until it is closed; None while another process holds it."""
    try:
        file = open(path, "ab")  # noqa: SIM115 - held open for as long as the lock is needed
    except FileNotFoundError:  # its directory was removed meanwhile
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    file.close()  # another's, or a file that was removed between open and lock
    return None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
