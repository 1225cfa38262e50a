"""Where and as whom a session runs: its directories, its uid, its descriptors; and how they are given back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

from sandbox_image.processes import Forker

_CLEAN_S = 10.0


@dataclass(frozen=True)
class Place:
    """Of one session. `uid` None: no uid of its own, killed by process tree."""

    directory: Path
    uid: int | None
    filtered: bool  # put the system call filter on the session
    shared: tuple[str, ...]  # directories that sessions share and that must be cleaned of one's files

    @property
    def home(self) -> str:
        return str(self.directory / "home")

    @property
    def tmp(self) -> str:
        return str(self.directory / "tmp")

    @property
    def directories(self) -> list[str]:
        return [self.home, self.tmp]

    def make(self) -> None:
        """Empty directories for a copy of a session; the zygote makes those of a fresh one."""
        self.directory.mkdir(mode=0o711)
        self.directory.chmod(0o711)
        for directory in self.directories:
            os.mkdir(directory, 0o700)
            if self.uid is not None:
                os.chown(directory, self.uid, self.uid)

    def remove(self) -> None:
        """The directory of a copy, once its own are gone."""
        with contextlib.suppress(OSError):
            os.rmdir(self.directory)

    async def clean(self, attendant: Forker, *, alone: bool) -> str:
        """Remove what the session left, as its own user; `alone` = nobody else lives under its uid, which ends too.
        Returns what could not be done, in words."""
        request = {
            "op": "clean",
            "uid": self.uid,
            "directories": self.directories,
            "shared": self.shared,
            "alone": alone,
        }
        cleaner = await attendant.request(request)
        done, _ = await asyncio.wait({cleaner.exit}, timeout=_CLEAN_S)
        if not done or cleaner.exit.result() != 0:
            return f"slot {self.directory.name} could not be cleaned"
        try:
            for directory in self.directories:
                os.rmdir(directory)
        except FileNotFoundError:  # it died before it had made them
            return ""
        except OSError as error:
            shutil.rmtree(self.directory, ignore_errors=True)
            return f"slot {self.directory.name} is not empty: {error}"
        return ""


@dataclass(frozen=True)
class Limits:
    memory_bytes: int
    processes: int
    file_bytes: int


class Wires:
    """Control socket, stdout and stderr of one session: our ends, and for a moment its own."""

    def __init__(self) -> None:
        self.control, self._control = socket.socketpair()
        self.control.setblocking(False)
        self.stdout, self._stdout = os.pipe()
        self.stderr, self._stderr = os.pipe()
        for fd in (self.stdout, self.stderr):
            os.set_blocking(fd, False)

    @property
    def theirs(self) -> tuple[int, int, int]:
        return self._control.fileno(), self._stdout, self._stderr

    def close_theirs(self) -> None:
        self._control.close()
        os.close(self._stdout)
        os.close(self._stderr)

    @property
    def closed(self) -> bool:
        return self.control.fileno() < 0

    def close(self) -> None:
        self.control.close()
        os.close(self.stdout)
        os.close(self.stderr)
