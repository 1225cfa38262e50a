"""Waiting for what other tasks and processes do, instead of a pause that a slow machine outlasts."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable


async def until(happened: Callable[[], object], *, seconds: float = 60) -> None:
    """Until `happened()`, or what its coroutine returns, is true; `TimeoutError` after `seconds`, which no busy machine
    needs."""
    async with asyncio.timeout(seconds):
        while True:
            answer = happened()
            if await answer if inspect.isawaitable(answer) else answer:
                return
            await asyncio.sleep(0.01)
