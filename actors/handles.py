"""What the pool asks of an engine, of the publisher and of whoever makes engines. Duck-typed, so that no Ray is needed:
every await has a deadline on the other side."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

from aster.types import Past, PublishReport, Task, Trajectory

log = logging.getLogger(__name__)

CLOSE_S = 120.0  # of one engine


class EngineHandle(Protocol):
    """One engine. `lost` says why it is dead; "" = alive as far as anybody knows."""

    name: str
    capacity: int  # seats: trajectories at once
    kv_tokens: int  # tokens that its KV cache holds; 0 = not known
    lost: str

    async def run(self, task: Task) -> Trajectory: ...
    async def run_tree(self, task: Task) -> Sequence[Trajectory]: ...
    async def cancel_all(self) -> None: ...
    async def close(self) -> None: ...


Replace = Callable[[Any], Awaitable[EngineHandle]]
"""Ends what is left of a dead engine and starts another. Raises `EngineLost` when that one does not come up."""

Recall = Callable[[Task, str], Awaitable[Past | None]]
"""The turns of a task that the named engine had finished, and those before them; None where nothing is kept."""


class Publisher(Protocol):
    async def publish(self, source: Any, version: int) -> PublishReport: ...

    async def admit(self, engine: Any) -> bool:
        """Bring a new engine to the version that was published last. False: it has to wait for the next publication."""
        ...


async def within(seconds: float, doing: str, steps: Mapping[str, Awaitable[None]]) -> None:
    """All at once, each guarded: one engine that does not answer must not keep the others. What fails is logged."""
    waits = [asyncio.wait_for(step, seconds) for step in steps.values()]
    for name, result in zip(steps, await asyncio.gather(*waits, return_exceptions=True), strict=True):
        if isinstance(result, BaseException):
            log.error("%s %s: %r", doing, name, result)
