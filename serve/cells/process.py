"""Cells without isolation: the supervisor is a plain child process. Never chosen by `auto`.

It dies with the pool that started it, so that a successor finds none alive; sessions are rebuilt from their journals.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
from pathlib import Path

from serve.cells import (
    BackendUnavailable,
    Cell,
    CellSettings,
    Ending,
    last_words,
    new_directory,
    supervisor_arguments,
)
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
        command = [self._python.executable, "-s", "-m", "sandbox_image.supervisor", *arguments, "--die-with-parent"]
        environment = {**CELL_ENVIRONMENT, "PATH": os.defpath, "PYTHONPATH": ":".join(paths)}
        return Cell(cell_id, directory, _spawn(command, environment, directory.with_suffix(".log")))

    async def ending(self, cell: Cell) -> Ending | None:
        code = cell.handle.poll()
        if code is None:
            return None
        return Ending(f"its supervisor ended with {code}{last_words(cell.directory.with_suffix('.log'))}")

    async def remove(self, cell: Cell) -> None:
        await _stop(cell.handle)
        cell.directory.with_suffix(".log").unlink(missing_ok=True)
        shutil.rmtree(cell.directory, ignore_errors=True)

    async def found(self) -> list[Cell]:
        return []

    async def sweep(self) -> int:
        return 0

    async def close(self) -> None:
        pass


def _spawn(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """From the event loop's own thread: "die with parent" means the thread that forked."""
    with open(log, "wb") as output:
        return subprocess.Popen(
            command,
            env=environment,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


async def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, so that the supervisor ends its sessions; SIGKILL when that takes too long."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        process.send_signal(number)
        deadline = asyncio.get_running_loop().time() + _STOP_S
        while process.poll() is None and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110 - no event in Popen
            await asyncio.sleep(0.01)
