"""Cells as Docker containers. The only file of the project that talks to Docker.

The SDK is control (create, inspect, remove), called in threads because it blocks; data goes over the Unix socket in a
bind-mounted directory. Containers carry labels that say whose they are, so that orphans can be told from a neighbour's.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import docker
import docker.errors
import requests

import sandbox_image
from serve.cells import (
    BackendUnavailable,
    Cell,
    CellSettings,
    new_directory,
    new_uid_base,
    socket_root,
    supervisor_arguments,
)
from serve.cells.host import CELL_ENVIRONMENT

T = TypeVar("T")

LABEL = "aster.sandbox"  # its value is the label format
_FORMAT = "1"
_API_S = 60
_THREADS = 8
_OVERHEAD_BYTES = 256 << 20  # supervisor and zygote of a cell
_PIDS_PER_SESSION = 40
_CAPABILITIES = ["SETUID", "SETGID", "KILL", "CHOWN"]


class DockerBackend:
    name = "docker"

    def __init__(self, settings: CellSettings) -> None:
        self.settings = settings
        self.slots = settings.sessions_per_cell
        try:
            self._client = docker.from_env(timeout=_API_S, max_pool_size=2 * _THREADS)
            self._client.ping()
        except (docker.errors.DockerException, requests.RequestException) as error:
            raise BackendUnavailable(f"docker: no daemon answers ({error}); start dockerd or set DOCKER_HOST") from None
        try:
            self._client.images.get(settings.image)
        except docker.errors.ImageNotFound:
            raise BackendUnavailable(f"docker: no image {settings.image!r}; build it with `make image`") from None
        self._seccomp = (Path(sandbox_image.__file__).parent / "seccomp.json").read_text("utf-8")
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="docker")
        self._owner = _owner_labels()

    async def _call(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def options(self, directory: Path) -> dict[str, Any]:
        """Everything but the image, for `containers.create`. Tested option by option from inside a session."""
        total = self.slots * self.settings.memory_bytes + _OVERHEAD_BYTES
        total = min(total, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        disk = f"rw,nosuid,nodev,size={self.settings.disk_bytes}"
        tmpfs = {f"/s/{slot}": f"{disk},mode=0711" for slot in range(self.slots)}
        tmpfs["/tmp"] = f"{disk},noexec,mode=1777"
        capabilities = list(_CAPABILITIES)
        if os.geteuid() != 0:
            # the socket directory belongs to us, not to the container's root; the supervisor drops this one at once
            capabilities.append("DAC_OVERRIDE")
        return {
            "command": supervisor_arguments(
                self.settings,
                socket="/run/cell/cell.sock",
                slots=self.slots,
                slot_root="/s",
                uid_base=new_uid_base(),
                shared=("/tmp", "/dev/shm"),
            ),
            "environment": CELL_ENVIRONMENT,
            "volumes": {str(directory): {"bind": "/run/cell", "mode": "rw"}},
            "tmpfs": tmpfs,
            "network_mode": "none",
            "read_only": True,
            "cap_drop": ["ALL"],
            "cap_add": capabilities,
            "security_opt": ["no-new-privileges", f"seccomp={self._seccomp}"],
            "pids_limit": _PIDS_PER_SESSION * self.slots + 32,
            "mem_limit": total,
            "memswap_limit": total,
            "shm_size": "1m",
            "ipc_mode": "private",
            "hostname": "cell",
            "runtime": self.settings.runtime,
            "log_config": {"type": "json-file", "config": {"max-size": "1m", "max-file": "1"}},
            "detach": True,
            "labels": {
                LABEL: _FORMAT,
                "aster.directory": str(directory),
                **self._owner,
                **{f"aster.{key}": value for key, value in self.settings.labels.items()},
            },
        }

    async def start(self) -> Cell:
        cell_id, directory = new_directory(self.settings)
        name = f"aster-cell-{cell_id}"

        def make() -> Any:
            container = self._client.containers.create(self.settings.image, name=name, **self.options(directory))
            container.start()
            return container

        making = asyncio.ensure_future(self._call(make))
        try:
            container = await asyncio.shield(making)
        except asyncio.CancelledError:  # the thread goes on: wait for what it makes, and take it away
            await asyncio.wait({making})
            await self._call(lambda: self._remove(name, directory))
            raise
        except (docker.errors.DockerException, requests.RequestException) as error:
            await self._call(lambda: self._remove(name, directory))
            raise BackendUnavailable(f"docker: cannot start a cell: {error}") from error
        return Cell(cell_id, directory, container.id)

    async def ending(self, cell: Cell) -> str:
        def look() -> str:
            try:
                state = self._client.api.inspect_container(cell.handle)["State"]
                if state["Running"]:
                    return ""
                log = self._client.api.logs(cell.handle, tail=20).decode("utf-8", "replace").strip()
            except docker.errors.NotFound:
                return "its container was removed by somebody else"
            why = "its container ran out of memory" if state.get("OOMKilled") else "its container ended"
            return f"{why} with {state['ExitCode']}" + (f": {log[-2000:]}" if log else "")

        return await self._call(look)

    async def remove(self, cell: Cell) -> None:
        await self._call(lambda: self._remove(cell.handle, cell.directory))

    def _remove(self, container: str, directory: Path) -> None:
        try:
            self._client.api.remove_container(container, force=True, v=True)
        except docker.errors.NotFound:
            pass
        except docker.errors.APIError as error:
            if error.status_code != 409:  # 409: its removal is under way already
                raise
        shutil.rmtree(directory, ignore_errors=True)

    async def sweep(self) -> int:
        """Remove containers that have ended or whose owner is dead; one that cannot be judged from here (another PID
        namespace) is left to its own idle time."""

        def work() -> int:
            swept = 0
            root = socket_root(self.settings)
            for container in self._client.containers.list(all=True, filters={"label": f"{LABEL}={_FORMAT}"}):
                if not _is_orphan(container.labels, container.status):
                    continue
                directory = Path(container.labels.get("aster.directory", ""))
                self._remove(container.id, directory if directory.parent == root else root / "none")
                swept += 1
            return swept

        return await self._call(work)

    async def close(self) -> None:
        self._threads.shutdown(wait=False)
        self._client.close()


def _owner_labels() -> dict[str, str]:
    """Who owns a cell, so that any later process on this machine can tell whether the owner still lives."""
    pid = os.getpid()
    return {
        "aster.host": socket.gethostname(),
        "aster.boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "aster.pidns": os.readlink("/proc/self/ns/pid"),
        "aster.pid": str(pid),
        "aster.pid_start": _start_time(pid),
    }


def _start_time(pid: int) -> str:
    """Field 22 of /proc/PID/stat; "" for a process that does not exist."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _is_orphan(labels: dict[str, str], status: str) -> bool:
    mine = _owner_labels()
    if labels.get("aster.pidns") != mine["aster.pidns"] or labels.get("aster.host") != mine["aster.host"]:
        return status in ("exited", "dead")
    if labels.get("aster.boot") != mine["aster.boot"]:
        return True
    try:
        pid = int(labels["aster.pid"])
    except (KeyError, ValueError):
        return True
    return _start_time(pid) != labels.get("aster.pid_start")
