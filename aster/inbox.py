"""What the loop and a validation ask of the pool at the same time comes back in one stream; here it is told apart."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from aster.config import Recipe
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
    recipe: Recipe, pool: RolloutPool, inbox: Inbox, rows: Sequence[PromptRow], *, step: int
) -> list[TrajectoryGroup]:
    """Sample `rows` under the evaluation budget; groups in order of `rows`. Shared by training and `aster eval`."""
    for row in rows:
        pool.submit(
            RolloutWork(
                row=row,
                group_size=recipe.eval.samples,
                budget=recipe.eval_budget(),
                sampling=recipe.eval_sampling(),
                step=step,
                seed=recipe.run.seed,
                kind="val",
                tools_enabled=recipe.tool.enabled,
            )
        )
    groups = [await inbox.next("val") for _ in rows]
    order = {row.row_id: index for index, row in enumerate(rows)}
    return sorted(groups, key=lambda g: order[g.row.row_id])
