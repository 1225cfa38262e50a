"""Cells: isolated supervisors with K session slots each, behind one interface with three backends.

A backend starts and removes cells; everything else (sessions, calls) goes over the cell's socket, alike for all three.

    docker   a container: network none, read-only root, all capabilities dropped but four, seccomp, cgroup limits
    bwrap    bubblewrap namespaces around the host's own interpreter: no network, read-only root; rlimits, no cgroup
    process  no isolation at all; for tests, and only when asked for by name
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import stat
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

BackendName = Literal["auto", "docker", "bwrap", "process"]

_SOCKET_ROOM = 40  # an AF_UNIX path has 107 bytes; "/aster-cells-1000/" + owner + cell id + "/cell.sock.new" need 65
_FINGERPRINT = 4
_LAST_WORDS = 2000
_UID_FLOOR, _UIDS_PER_CELL = 1 << 18, 1 << 16

logger = logging.getLogger(__name__)


class BackendUnavailable(RuntimeError):
    """This machine cannot run the backend; the message says what is missing and how to get it."""


@dataclass(frozen=True)
class CellSettings:
    """What every cell of a pool has in common."""

    owner: str = ""
    """Name of the pool; its cells are in the directory of that name."""
    sessions_per_cell: int = 8
    warm_sessions: int = 2
    """Sessions forked ahead in each cell."""
    memory_bytes: int = 1 << 30
    """Of one session; a Docker cell gets the sum, and all of its sessions share it."""
    disk_bytes: int = 64 << 20
    """tmpfs of one slot, and of the shared /tmp."""
    idle_ttl_s: float = 40.0
    """A supervisor that hears nothing for so long ends by itself."""
    image: str = "aster-sandbox:latest"
    runtime: str = "runc"
    socket_root: str | None = None
    """Directory for the sockets; null = under the temporary directory. Docker must see it under the same path."""

    @property
    def directory(self) -> Path:
        """Of the owner: there is one subdirectory for each cell."""
        assert self.owner, "only an owner has cells"
        return private_root(self) / self.owner

    @property
    def fingerprint(self) -> str:
        """Alike for cells that were made alike, whoever owns them."""
        return hashlib.sha256(repr(replace(self, owner="")).encode()).hexdigest()[:_FINGERPRINT]


@dataclass(frozen=True)
class Cell:
    """A started cell. `handle` belongs to its backend."""

    cell_id: str
    directory: Path
    handle: Any

    @property
    def socket(self) -> Path:
        return self.directory / "cell.sock"

    def is_made_for(self, settings: CellSettings) -> bool:
        """False: a predecessor made it under other settings."""
        return self.cell_id.startswith(settings.fingerprint)


@dataclass(frozen=True)
class Ending:
    """Why a cell ended."""

    reason: str
    out_of_memory: bool = False

    def __str__(self) -> str:
        return self.reason


class CellBackend(Protocol):
    name: str
    slots: int  # per cell; may be less than asked for, where nothing would separate sessions

    async def start(self) -> Cell:
        """A new cell; its socket appears when it is ready. Raises `BackendUnavailable`."""
        ...

    async def ending(self, cell: Cell) -> Ending | None:
        """Why the cell ended; None while it runs."""
        ...

    async def remove(self, cell: Cell) -> None:
        """Nothing of it is left afterwards. Idempotent."""
        ...

    async def found(self) -> list[Cell]:
        """Cells of this owner that an earlier process started, alive or not."""
        ...

    async def sweep(self) -> int:
        """Remove cells of ours that have ended and that no owner's directory tells of; how many those were."""
        ...

    async def close(self) -> None: ...


def new_directory(settings: CellSettings) -> tuple[str, Path]:
    """A fresh cell id, and its private directory."""
    cell_id = settings.fingerprint + secrets.token_hex(4)
    directory = settings.directory / cell_id
    directory.mkdir(mode=0o700)
    return cell_id, directory


def last_words(log: Path) -> str:
    """The end of a cell's log, as the end of a sentence about it."""
    try:
        words = log.read_text("utf-8", "replace").strip()
    except OSError:
        words = ""
    return f": {words[-_LAST_WORDS:]}" if words else ""


def socket_root(settings: CellSettings) -> Path:
    base = settings.socket_root or tempfile.gettempdir()
    if len(base) > _SOCKET_ROOM:
        if settings.socket_root:
            raise ValueError(f"socket_root={base!r} has {len(base)} characters, a socket path allows {_SOCKET_ROOM}")
        base = "/tmp"
    return Path(base) / f"aster-cells-{os.geteuid()}"


def private_root(settings: CellSettings) -> Path:
    """`socket_root`, made and ours alone: whoever could write it could put a socket of his own in a cell's place."""
    root = socket_root(settings)
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = root.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise BackendUnavailable(f"{root} is not a directory of uid {os.geteuid()} alone: remove it or set socket_root")
    return root


def new_uid_base() -> int:
    """A random range of uids: RLIMIT_NPROC counts per uid over the whole machine, so cells must not share them."""
    return _UID_FLOOR + _UIDS_PER_CELL * secrets.randbelow(16_000)


def supervisor_arguments(
    settings: CellSettings, *, socket: str, slots: int, slot_root: str, uid_base: int | None, shared: tuple[str, ...]
) -> list[str]:
    """Command line after `python -m sandbox_image.supervisor`."""
    out = ["--socket", socket, "--slots", str(slots), "--warm", str(min(settings.warm_sessions, slots))]
    out += ["--slot-root", slot_root, "--idle-ttl", str(settings.idle_ttl_s)]
    if uid_base is not None:
        out += ["--uid-base", str(uid_base)]
    for directory in shared:
        out += ["--shared", directory]
    return out


def choose_backend(name: BackendName, settings: CellSettings) -> CellBackend:
    """The backend by name; `auto` takes Docker where a daemon and the image are there, else bubblewrap.

    Blocking (it probes); raises `BackendUnavailable` with the cure of each that was tried.
    """
    from serve.cells.bwrap import BwrapBackend
    from serve.cells.docker import DockerBackend
    from serve.cells.process import ProcessBackend

    if name == "docker":
        return DockerBackend(settings)
    if name == "bwrap":
        return BwrapBackend(settings)
    if name == "process":
        logger.warning("SANDBOX WITHOUT ISOLATION: sessions are plain processes of this user on this machine")
        return ProcessBackend(settings)
    problems = []
    for kind in (DockerBackend, BwrapBackend):
        try:
            backend: CellBackend = kind(settings)
        except BackendUnavailable as error:
            problems.append(str(error))
        else:
            for problem in problems:
                logger.warning("sandbox backend: %s; using %s", problem, backend.name)
            return backend
    raise BackendUnavailable(
        "no sandbox backend works here: " + "; ".join(problems) + '. backend="process" runs without any isolation'
    )
