"""Work that nobody waits for: kept alive, its failures told, ended together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

logger = logging.getLogger("ray.serve")


class Background:
    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def run(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_log_failure)
        return task

    def every(self, seconds: float, work: Callable[[], Awaitable[None]]) -> None:
        """From `seconds` from now on. A round that fails is logged, and the next one tries again."""

        async def rounds() -> None:
            while True:
                await asyncio.sleep(seconds)
                try:
                    await work()
                except Exception:  # policy: one round lost, told, and the next one comes
                    logger.exception("a background task of the sandbox pool failed; next try in %g s", seconds)

        self.run(rounds())

    async def host(self, work: Coroutine[Any, Any, T], *, started: asyncio.Event) -> T:
        """The result of `work`, in a task of its own. A caller who hangs up before `started` takes the work along;
        after that it runs to its end without him."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not started.is_set():
                task.cancel()
            task.add_done_callback(lambda t: t.cancelled() or t.exception())  # nobody hears it any more
            raise

    async def wait(self, timeout_s: float) -> None:
        """Until all has ended, or the time is over."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("a background task of the sandbox pool failed", exc_info=error)


def is_cancelled() -> bool:
    """Whether somebody wants this task to end; otherwise a CancelledError came out of what it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
