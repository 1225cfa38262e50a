"""Validation beside the training: asked of the same pool, told apart in its one stream, over before the weights change.

    submit train (step v+1) | submit val (version v) --> engines, in this order --> Inbox --train--> the learner's step
                                                                              |
                                                                              +--val--> over() --> publish v+1

`aster eval` shares the sampling (`evaluate`), without a training beside it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from aster.config import Recipe
from aster.leftovers import Leftovers
from aster.roles import RolloutPool
from aster.types import PromptRow, RolloutWork, TrajectoryGroup


@dataclass
class Inbox:
    """Sorts the pool's finished groups by kind. Several may wait at once; whoever is first in line reads for all."""

    stream: AsyncIterator[TrajectoryGroup]
    waiting: dict[str, deque[TrajectoryGroup]] = field(default_factory=lambda: {"train": deque(), "val": deque()})
    _reading: asyncio.Lock = field(default_factory=asyncio.Lock)
    _failure: BaseException | None = None  # a stream that raised has ended; whoever asks later must not wait for it

    async def next(self, kind: str) -> TrajectoryGroup:
        while not self.waiting[kind]:
            async with self._reading:
                if not self.waiting[kind]:
                    await self._read()
        return self.waiting[kind].popleft()

    async def _read(self) -> None:
        if self._failure is not None:
            raise self._failure
        try:
            group = await anext(self.stream)
        except BaseException as error:
            self._failure = error
            raise
        self.waiting[group.kind].append(group)


async def evaluate(
    recipe: Recipe,
    pool: RolloutPool,
    inbox: Inbox,
    rows: Sequence[PromptRow],
    *,
    step: int,
    leftovers: Leftovers | None = None,
    done: Callable[[TrajectoryGroup], None] | None = None,
) -> list[TrajectoryGroup]:
    """Sample `rows` under the evaluation budget; groups in order of `rows`. Shared by training and `aster eval`.

    Trajectories that a killed run left behind go on from their `leftovers`. `done` hears of each group as it ends.
    """
    n = recipe.eval.samples
    for row in rows:
        pool.submit(
            RolloutWork(
                row=row,
                group_size=n,
                budget=recipe.eval_budget(),
                sampling=recipe.eval_sampling(),
                step=step,
                seed=recipe.run.seed,
                kind="val",
                tools_enabled=recipe.tool.enabled,
                past=leftovers.past_of(row, step=step, kind="val", samples=n) if leftovers else {},
            )
        )
    groups = []
    for _ in rows:
        groups.append(await inbox.next("val"))
        if done is not None:
            done(groups[-1])
    order = {row.row_id: index for index, row in enumerate(rows)}
    return sorted(groups, key=lambda g: order[g.row.row_id])


class Validation:
    """One at a time. All its tokens are of one version if `over` is awaited before other weights are published."""

    def __init__(
        self,
        recipe: Recipe,
        pool: RolloutPool,
        inbox: Inbox,
        rows: Sequence[PromptRow],
        *,
        leftovers: Leftovers,
        record: Callable[[int, Sequence[TrajectoryGroup], float], Awaitable[None]],
    ) -> None:
        """`record(version, groups, seconds)` gets what was sampled."""
        self._recipe, self._pool, self._inbox, self._rows = recipe, pool, inbox, rows
        self._leftovers, self._record = leftovers, record
        self._due: int | None = None
        self._running: asyncio.Task[None] | None = None

    def ask(self, version: int) -> None:
        """Due for the weights of `version`; it begins with `begin` or `over`."""
        if self._rows:
            self._due = version

    def begin(self, beside: asyncio.TaskGroup) -> None:
        """Sample it now, if it is due. Engines take work in the order it is submitted: ask for the training first."""
        version, self._due = self._due, None
        if version is not None:
            self._running = beside.create_task(self._sample(version), name=f"validation of version {version}")

    async def over(self, beside: asyncio.TaskGroup) -> float:
        """Until none is due or under way; the seconds that took."""
        began = time.monotonic()
        self.begin(beside)
        running, self._running = self._running, None
        if running is not None:
            await running
        return time.monotonic() - began

    async def _sample(self, version: int) -> None:
        began = time.monotonic()
        groups = await evaluate(
            self._recipe, self._pool, self._inbox, self._rows, step=version, leftovers=self._leftovers
        )
        await self._record(version, groups, time.monotonic() - began)
