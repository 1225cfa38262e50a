"""Cells in bubblewrap namespaces around the host's interpreter: needs no daemon, no image; works as root and as a user.

As root the cell holds K sessions, each under a uid of its own. A user has one uid only, so nothing would separate two
sessions from each other: then every session gets a cell of its own, in which the supervisor is PID 1 (which the kernel
protects from its own namespace) and not traceable.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
from pathlib import Path

from serve.cells import (
    BackendUnavailable,
    Cell,
    CellSettings,
    new_directory,
    new_uid_base,
    supervisor_arguments,
)
from serve.cells.host import CELL_ENVIRONMENT, HostPython, compiled_packages, host_python
from serve.cells.process import ending, spawn, stop, sweep_directories

_PACKAGE = "/aster/sandbox_image"
_BYTECODE = "/aster/bytecode"
_PACKAGES = "/aster/packages"
_SHARED = ("/tmp", "/dev/shm")
_OWN = ("/tmp", "/dev", "/proc", "/run", "/s")  # a cell's own file systems hide what lies there
_CAPABILITIES = ("CAP_SETUID", "CAP_SETGID", "CAP_KILL", "CAP_CHOWN")
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64")
_FILES = ("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives", "/etc/localtime")
_PROBE_S = 10.0
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
        out = ["--die-with-parent", "--new-session", "--as-pid-1", "--hostname", "cell", "--cap-drop", "ALL"]
        out += ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
        if self._root:
            for capability in _CAPABILITIES:
                out += ["--cap-add", capability]
        else:
            out += ["--unshare-user", "--disable-userns"]
        return out

    def command(self, directory: Path) -> list[str]:
        """The whole command line of one cell whose socket directory is `directory`."""
        out = [self._bwrap, *self._namespaces(), *_system_binds(), *_python_binds(self._python, self._packages)]
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
        return [*out, self._python.executable, "-s", "-m", "sandbox_image.supervisor", *arguments, "--seccomp"]

    async def start(self) -> Cell:
        cell_id, directory = new_directory(self.settings)
        process = spawn(self.command(directory), environment={"PATH": os.defpath}, directory=directory)
        return Cell(cell_id, directory, process)

    async def ending(self, cell: Cell) -> str:
        return ending(cell)

    async def remove(self, cell: Cell) -> None:
        # the whole namespace dies with its PID 1, which is bubblewrap's own child: bubblewrap reaps it and ends
        for pid in _children(cell.handle.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await stop(cell.handle, first=0)
        shutil.rmtree(cell.directory, ignore_errors=True)

    async def sweep(self) -> int:
        return sweep_directories(self.settings)

    async def close(self) -> None:
        pass


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


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
