"""Cells as Docker containers. The only file of the project that talks to Docker.

The SDK is control (create, inspect, remove), called in threads because it blocks; data goes over the Unix socket in a
bind-mounted directory. Containers outlive the pool; their labels say whose they are, to a successor and to the janitor.
"""

from __future__ import annotations

import asyncio
import os
import shutil
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
    Ending,
    new_directory,
    new_uid_base,
    supervisor_arguments,
)
from serve.cells.host import CELL_ENVIRONMENT

T = TypeVar("T")

LABEL = "aster.sandbox"  # its value is the label format
_FORMAT = "2"
_DIRECTORY, _CELL = "aster.directory", "aster.cell"  # the owner's directory, and a cell's id in it
_API_S = 60
_THREADS = 8
_OVERHEAD_BYTES = 256 << 20  # supervisor and zygote of a cell
_PIDS_PER_SESSION = 104  # 96 of its uid (a family of copies shares one) and what a fork holds for a moment
_CAPABILITIES = ["SETUID", "SETGID", "KILL", "CHOWN"]


class DockerBackend:
    name = "docker"

    def __init__(self, settings: CellSettings) -> None:
        self.settings = settings
        self.slots = settings.sessions_per_cell
        self._client = _connect()
        try:
            self._client.images.get(settings.image)
        except docker.errors.ImageNotFound:
            raise BackendUnavailable(f"docker: no image {settings.image!r}; build it with `make image`") from None
        self._seccomp = (Path(sandbox_image.__file__).parent / "seccomp.json").read_text("utf-8")
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="docker")

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
                _DIRECTORY: str(directory.parent),
                _CELL: directory.name,
                "aster.owner": self.settings.owner,
                "aster.node": self.settings.owner.rpartition("-")[0],
                "aster.pid": str(os.getpid()),  # for people: an adopted cell keeps the one of its first owner
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

    async def ending(self, cell: Cell) -> Ending | None:
        def look() -> Ending | None:
            try:
                state = self._client.api.inspect_container(cell.handle)["State"]
                if state["Running"]:
                    return None
                log = self._client.api.logs(cell.handle, tail=20).decode("utf-8", "replace").strip()
            except docker.errors.NotFound:
                return Ending("its container was removed by somebody else")
            except (docker.errors.DockerException, requests.RequestException) as error:
                return Ending(f"the Docker daemon cannot say ({error})")
            starved = bool(state.get("OOMKilled"))
            why = "its container ran out of memory" if starved else "its container ended"
            return Ending(f"{why} with {state['ExitCode']}" + (f": {log[-2000:]}" if log else ""), starved)

        return await self._call(look)

    async def remove(self, cell: Cell) -> None:
        await self._call(lambda: self._remove(cell.handle, cell.directory))

    def _remove(self, container: str, directory: Path) -> None:
        _remove_container(self._client, container)
        shutil.rmtree(directory, ignore_errors=True)

    async def found(self) -> list[Cell]:
        def look() -> list[Cell]:
            containers = _containers(self._client, f"{_DIRECTORY}={self.settings.directory}")
            ids = [(c["Labels"][_CELL], c["Id"]) for c in containers]
            return [Cell(cell_id, self.settings.directory / cell_id, container) for cell_id, container in ids]

        return await self._call(look)

    async def sweep(self) -> int:
        """Containers that have ended and whose owner has no directory any more: somebody emptied the temporary
        directory. One that runs may belong to a pool whose files we cannot see; it is left to its idle end."""

        def work() -> int:
            ended = [
                container["Id"]
                for container in _containers(self._client, f"{LABEL}={_FORMAT}")
                if container["State"] in ("exited", "dead") and not Path(container["Labels"][_DIRECTORY]).exists()
            ]
            for container in ended:
                _remove_container(self._client, container)
            return len(ended)

        return await self._call(work)

    async def close(self) -> None:
        self._threads.shutdown(wait=False)
        self._client.close()


def remove_cells(owner: Path) -> int:
    """Remove every container of a dead owner; how many those were. Raises `BackendUnavailable`, docker's errors."""
    client = _connect()
    try:
        containers = _containers(client, f"{_DIRECTORY}={owner}")
        for container in containers:
            _remove_container(client, container["Id"])
        return len(containers)
    finally:
        client.close()


def _connect() -> Any:
    try:
        client = docker.from_env(timeout=_API_S, max_pool_size=2 * _THREADS)
        client.ping()
    except (docker.errors.DockerException, requests.RequestException) as error:
        raise BackendUnavailable(f"docker: no daemon answers ({error}); start dockerd or set DOCKER_HOST") from None
    return client


def _containers(client: Any, label: str) -> list[dict[str, Any]]:
    """One request, unlike `containers.list`, which inspects each and fails when one goes meanwhile."""
    return list(client.api.containers(all=True, filters={"label": label}))


def _remove_container(client: Any, container: str) -> None:
    try:
        client.api.remove_container(container, force=True, v=True)
    except docker.errors.NotFound:
        pass
    except docker.errors.APIError as error:
        if error.status_code != 409:  # 409: its removal is under way already
            raise
