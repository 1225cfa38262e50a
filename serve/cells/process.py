"""Cells without isolation: the supervisor is a plain child process. Never chosen by `auto`."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
from pathlib import Path

from serve.cells import BackendUnavailable, Cell, CellSettings, new_directory, socket_root, supervisor_arguments
from serve.cells.host import CELL_ENVIRONMENT, host_python

_STOP_S = 10.0


class ProcessBackend:
    name = "process"

    def __init__(self, settings: CellSettings) -> None:
        self.settings = settings
        self.slots = settings.sessions_per_cell
        try:
            self._python = host_python()
        except ModuleNotFoundError as error:
            raise BackendUnavailable(f"process: {error}") from None

    async def start(self) -> Cell:
        cell_id, directory = new_directory(self.settings)
        slots = directory / "s"
        slots.mkdir(mode=0o700)
        paths = (str(self._python.package.parent), *map(str, self._python.search_path))
        arguments = supervisor_arguments(
            self.settings,
            socket=str(directory / "cell.sock"),
            slots=self.slots,
            slot_root=str(slots),
            uid_base=None,
            shared=(),
        )
        process = spawn(
            [self._python.executable, "-s", "-m", "sandbox_image.supervisor", *arguments, "--die-with-parent"],
            environment={**CELL_ENVIRONMENT, "PATH": os.defpath, "PYTHONPATH": ":".join(paths)},
            directory=directory,
        )
        return Cell(cell_id, directory, process)

    async def ending(self, cell: Cell) -> str:
        return ending(cell)

    async def remove(self, cell: Cell) -> None:
        await stop(cell.handle)
        shutil.rmtree(cell.directory, ignore_errors=True)

    async def sweep(self) -> int:
        """A supervisor dies with its owner; only its directory can be left."""
        return sweep_directories(self.settings)

    async def close(self) -> None:
        pass


def spawn(command: list[str], *, environment: dict[str, str], directory: Path) -> subprocess.Popen[bytes]:
    """From the event loop's own thread: "die with parent" means the thread that forked. Its log is in `directory`."""
    with open(directory / "log", "wb") as log:
        process = subprocess.Popen(
            command,
            env=environment,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    (directory / "pid").write_text(str(process.pid))
    return process


def ending(cell: Cell) -> str:
    code = cell.handle.poll()
    if code is None:
        return ""
    try:
        log = (cell.directory / "log").read_text("utf-8", "replace").strip()
    except OSError:
        log = ""
    return f"its supervisor ended with {code}" + (f": {log[-2000:]}" if log else "")


async def stop(process: subprocess.Popen[bytes], *, first: int = signal.SIGTERM) -> None:
    """SIGTERM, so that the supervisor ends its sessions (0: it is ending already); SIGKILL when that takes too long."""
    for number, wait_s in ((first, _STOP_S), (signal.SIGKILL, _STOP_S)):
        if process.poll() is not None:
            return
        process.send_signal(number)
        deadline = asyncio.get_running_loop().time() + wait_s
        while process.poll() is None and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110 - no event in Popen
            await asyncio.sleep(0.01)


def sweep_directories(settings: CellSettings) -> int:
    """Remove cell directories whose recorded process is gone."""
    swept = 0
    root = socket_root(settings)
    for directory in root.iterdir() if root.is_dir() else ():
        try:
            pid = int((directory / "pid").read_text())
        except (OSError, ValueError):
            continue  # another backend's, or one that is just being made
        if not Path(f"/proc/{pid}").exists():
            shutil.rmtree(directory, ignore_errors=True)
            swept += 1
    return swept
