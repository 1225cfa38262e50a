"""What the tests of the pool share: engines that answer by rule, a publisher that sends nothing, short ways to work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from actors.router import EnginePool
from aster.agent.ledger import lost_trajectory
from aster.agent.rewards import RewardPool
from aster.errors import WeightSyncError
from aster.types import (
    Budget,
    Cause,
    PromptRow,
    PublishReport,
    RolloutWork,
    Sampling,
    Task,
    Trajectory,
    TrajectoryGroup,
    Turn,
)

BUDGET = Budget(max_prompt_tokens=16, max_response_tokens=64, max_tool_calls=4, trajectory_timeout_s=120)


def work(row: str = "a", *, n: int = 2, kind: str = "train", step: int = 0, seed: int = 1) -> RolloutWork:
    prompt = PromptRow(row, ({"role": "user", "content": row},), "34", "fake")
    return RolloutWork(prompt, n, BUDGET, Sampling(), step, seed, kind)


def answered(task: Task, engine: str, text: str = "\\boxed{34}", cause: Cause = Cause.ANSWERED) -> Trajectory:
    ids = np.arange(3, dtype=np.int32)
    return Trajectory(
        uid=task.uid,
        row_id=task.row_id,
        sample=task.sample,
        prompt_ids=ids,
        ids=ids,
        mask=np.ones(3, bool),
        behaviour_logprobs=np.zeros(3, np.float32),
        versions=np.zeros(3, np.int32),
        turns=(Turn(0, 3, "stop", 0.0, 0.1),),
        cause=cause,
        final_text=text,
        engine=engine,
    )


Rule = Callable[[Task], "Trajectory | BaseException | float | asyncio.Event"]


@dataclass
class FakeEngine:
    """Runs tasks by rule: a record, an exception, seconds or an event to wait for before answering."""

    name: str
    rule: Rule = lambda task: 0.0
    capacity: int = 4
    kv_tokens: int = 0
    lost: str = ""
    ran: list[Task] = field(default_factory=list)
    now: int = 0
    most: int = 0
    closed: int = 0
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, task: Task) -> Trajectory:
        self.ran.append(task)
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            out = self.rule(task)
            if isinstance(out, BaseException):
                raise out
            if isinstance(out, Trajectory):
                return out
            if not isinstance(out, asyncio.Event):
                await asyncio.sleep(out)
                return answered(task, self.name)
            waits = {asyncio.ensure_future(out.wait()), asyncio.ensure_future(self.cancelled.wait())}
            _, rest = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in rest:
                wait.cancel()
            return answered(task, self.name, cause=Cause.ANSWERED if out.is_set() else Cause.CANCELLED)
        finally:
            self.now -= 1

    async def run_tree(self, task: Task) -> list[Trajectory]:
        return [await self.run(leaf) for leaf in (task, *task.leaves)]

    async def cancel_all(self) -> None:
        self.cancelled.set()

    async def close(self) -> None:
        self.closed += 1


class FakePublisher:
    def __init__(self) -> None:
        self.published: list[int] = []
        self.admitted: list[object] = []
        self.has_copy = True

    async def publish(self, source: object, version: int) -> PublishReport:
        if version < 0:
            raise WeightSyncError("bucket 3 differs")
        self.published.append(version)
        return PublishReport(version, bytes=1, seconds=0.0, engines=1)

    async def admit(self, engine: object) -> bool:
        self.admitted.append(engine)
        return self.has_copy


@pytest.fixture
async def make() -> AsyncIterator[Callable[..., EnginePool]]:
    pools: list[EnginePool] = []

    def build(*engines: FakeEngine, rewards: object = None, **more) -> EnginePool:
        pool = EnginePool(engines, rewards=rewards or RewardPool(math_verify=False), run_name="run", **more)
        pools.append(pool)
        return pool

    yield build
    for pool in pools:
        await asyncio.wait_for(pool.close(), 60)


async def take(pool: EnginePool, n: int) -> list[TrajectoryGroup]:
    groups = pool.groups()
    return [await asyncio.wait_for(anext(groups), 60) for _ in range(n)]


def lost(cause: Cause, error: str = "gone") -> Callable[[Task], Trajectory]:
    return lambda task: lost_trajectory(task, cause, error, engine="e0")
