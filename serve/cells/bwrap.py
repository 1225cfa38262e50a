"""Cells in bubblewrap namespaces around the host's interpreter: needs no daemon, no image; works as root and as a user.

As root the cell holds K sessions, each under a uid of its own. A user has one uid only, so nothing would separate two
sessions from each other: then every session gets a cell of its own, in which the supervisor is PID 1 (which the kernel
protects from its own namespace) and not traceable.

A cell is nobody's child and outlives the pool that started it; the next owner of the directory finds it by its record.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import subprocess
from pathlib import Path

from serve.cells import (
    BackendUnavailable,
    Cell,
    CellSettings,
    Ending,
    last_words,
    new_directory,
    new_uid_base,
    supervisor_arguments,
)
from serve.cells.detached import Detached, launch
from serve.cells.host import CELL_ENVIRONMENT, HostPython, compiled_packages, host_python

_PACKAGE = "/aster/sandbox_image"
_BYTECODE = "/aster/bytecode"
_PACKAGES = "/aster/packages"
_SHARED = ("/tmp", "/dev/shm")
_OWN = ("/tmp", "/dev", "/proc", "/run", "/s")  # a cell's own file systems hide what lies there
_CAPABILITIES = ("CAP_SETUID", "CAP_SETGID", "CAP_KILL", "CAP_CHOWN")
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64")
_FILES = ("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives", "/etc/localtime")
_PROBE_S = 10.0
_END_S = 10.0
_SHM_BYTES = 1 << 20

logger = logging.getLogger("ray.serve")


class BwrapBackend:
    name = "bwrap"

    def __init__(self, settings: CellSettings) -> None:
        self.settings = settings
        self._root = os.geteuid() == 0
        self.slots = settings.sessions_per_cell if self._root else 1
        found = shutil.which("bwrap")
        if found is None:
            raise BackendUnavailable("bwrap: not installed; install the package `bubblewrap`")
        self._bwrap = found
        try:
            self._python = host_python()
        except ModuleNotFoundError as error:
            raise BackendUnavailable(f"bwrap: {error}") from None
        self._probe()
        self._packages = _seen_at(self._python)
        try:
            self._bytecode: Path | None = compiled_packages(self._python)
            _link_moved(self._bytecode, self._packages)
        except (OSError, subprocess.SubprocessError) as error:
            logger.warning("bwrap: no byte code could be kept, so cells start slowly: %s", error)
            self._bytecode = None

    def _probe(self) -> None:
        command = [self._bwrap, *self._namespaces(), *_system_binds(), "--proc", "/proc", "--dev", "/dev", "true"]
        try:
            done = subprocess.run(command, capture_output=True, timeout=_PROBE_S, check=False)
        except subprocess.TimeoutExpired:
            raise BackendUnavailable(f"bwrap: `bwrap ... true` did not end within {_PROBE_S:g} s") from None
        if done.returncode != 0:
            raise BackendUnavailable(
                f"bwrap: cannot make namespaces here ({done.stderr.decode(errors='replace').strip()}); allow "
                "unprivileged user namespaces, or inside a container relax its seccomp profile"
            )

    def _namespaces(self) -> list[str]:
        out = ["--new-session", "--as-pid-1", "--hostname", "cell", "--cap-drop", "ALL"]
        out += ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
        if self._root:
            for capability in _CAPABILITIES:
                out += ["--cap-add", capability]
        else:
            out += ["--unshare-user", "--disable-userns"]
        return out

    def command(self, directory: Path, *, status_fd: int) -> list[str]:
        """The whole command line of one cell whose socket directory is `directory`; its end is told to `status_fd`."""
        out = [
            self._bwrap,
            "--json-status-fd",
            str(status_fd),
            *self._namespaces(),
            *_system_binds(),
            *_python_binds(self._python, self._packages),
        ]
        if self._bytecode is not None:
            out += ["--ro-bind", str(self._bytecode), _BYTECODE]
        out += ["--proc", "/proc", "--dev", "/dev", "--bind", str(directory), "/run/cell"]
        disk = str(self.settings.disk_bytes)
        out += ["--perms", "1777", "--size", disk, "--tmpfs", "/tmp"]
        out += ["--perms", "1777", "--size", str(_SHM_BYTES), "--tmpfs", "/dev/shm"]
        for slot in range(self.slots):
            out += ["--perms", "0711", "--size", disk, "--tmpfs", f"/s/{slot}"]
        out += ["--remount-ro", "/", "--chdir", "/", "--clearenv"]
        if self._bytecode is not None:
            out += ["--setenv", "PYTHONPYCACHEPREFIX", _BYTECODE]
        paths = ("/aster", *map(str, self._packages.values()))
        for key, value in {**CELL_ENVIRONMENT, "PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(paths)}.items():
            out += ["--setenv", key, value]
        arguments = supervisor_arguments(
            self.settings,
            socket="/run/cell/cell.sock",
            slots=self.slots,
            slot_root="/s",
            uid_base=new_uid_base() if self._root else None,
            shared=_SHARED,
        )
        # its parent is bubblewrap: if that alone is killed, the supervisor, and with it the namespace, does not stay
        arguments += ["--die-with-parent", "--seccomp"]
        return [*out, self._python.executable, "-s", "-m", "sandbox_image.supervisor", *arguments]

    async def start(self) -> Cell:
        cell_id, directory = new_directory(self.settings)

        def make() -> Detached:
            status = os.open(directory.with_suffix(".status"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                return launch(
                    self.command(directory, status_fd=status),
                    environment={"PATH": os.defpath},
                    record=directory.with_suffix(".process"),
                    log=directory.with_suffix(".log"),
                    fds=(status,),
                )
            finally:
                os.close(status)

        making = asyncio.ensure_future(asyncio.to_thread(make))
        try:
            return Cell(cell_id, directory, await asyncio.shield(making))
        except asyncio.CancelledError:  # the thread goes on: wait for what it makes, and take it away
            await asyncio.wait({making})
            await asyncio.to_thread(_remove, directory)
            raise
        except (OSError, subprocess.SubprocessError) as error:
            await asyncio.to_thread(_remove, directory)
            raise BackendUnavailable(f"bwrap: cannot start a cell: {error}") from error

    async def ending(self, cell: Cell) -> Ending | None:
        if cell.handle.alive:
            return None
        status = cell.directory.with_suffix(".status")
        return Ending(f"its supervisor ended with {_exit_code(status)}{last_words(cell.directory.with_suffix('.log'))}")

    async def remove(self, cell: Cell) -> None:
        await asyncio.to_thread(_remove, cell.directory)

    async def found(self) -> list[Cell]:
        cells = []
        for record in self.settings.directory.glob("*.process"):
            try:
                cells.append(Cell(record.stem, record.with_suffix(""), Detached.recorded(record)))
            except (OSError, ValueError):  # removed meanwhile; it is written whole or not at all
                continue
        return cells

    async def sweep(self) -> int:
        return 0

    async def close(self) -> None:
        pass


def remove_cells(owner: Path) -> int:
    """End every cell of a dead owner; how many those were."""
    records = list(owner.glob("*.process"))
    for record in records:
        _remove(record.with_suffix(""))
    return len(records)


def _remove(directory: Path) -> None:
    record = directory.with_suffix(".process")
    try:
        Detached.recorded(record).kill_namespace(timeout_s=_END_S)
    except FileNotFoundError:  # it was removed already, or never started
        pass
    for path in (directory.with_suffix(".log"), directory.with_suffix(".status"), record):
        path.unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


def _exit_code(status: Path) -> str:
    """From bubblewrap's JSON documents, one a line; it writes none when it was killed itself."""
    try:
        for line in status.read_text().splitlines():
            if "exit-code" in (told := json.loads(line)):
                return str(told["exit-code"])
    except (OSError, ValueError):
        pass
    return "an unknown status"


def _system_binds() -> list[str]:
    out = []
    for name in _SYSTEM:
        path = Path(name)
        if path.is_symlink():
            out += ["--symlink", os.readlink(name), name]
        elif path.is_dir():
            out += ["--ro-bind", name, name]
    for name in _FILES:
        out += ["--ro-bind-try", name, name]
    return out


def _seen_at(python: HostPython) -> dict[Path, Path]:
    """Package directory -> where a cell sees it: at its own place, unless a file system of the cell's own is there."""
    return {
        path: Path(_PACKAGES, str(index)) if any(map(path.is_relative_to, _OWN)) else path
        for index, path in enumerate(python.search_path)
    }


def _link_moved(bytecode: Path, packages: dict[Path, Path]) -> None:
    """Byte code is kept by the source's path: let a moved directory's be found under the new one."""
    for path, seen_at in packages.items():
        link = bytecode / seen_at.relative_to("/")
        if seen_at != path and not link.is_symlink():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(f"{_BYTECODE}{path}")


def _python_binds(python: HostPython, packages: dict[Path, Path]) -> list[str]:
    binds = {Path(_PACKAGE): python.package, python.prefix: python.prefix}
    binds |= {seen_at: path for path, seen_at in packages.items()}
    binds = {inside: outside for inside, outside in binds.items() if not inside.is_relative_to("/usr")}
    # bubblewrap makes the parents of a bind mount 0700, and a session's uid could not pass them
    parents = sorted({parent for path in binds for parent in path.parents if parent != Path("/")})
    out = [word for parent in parents for word in ("--perms", "0755", "--dir", str(parent))]
    for inside, outside in binds.items():
        out += ["--ro-bind", str(outside), str(inside)]
    return out
