"""Groups from which no step can learn any more are ended in flight, come home as STALE, and are nobody's failure."""

from __future__ import annotations

import asyncio

import pytest
from pools import FakeEngine, FakePublisher, make, take, work
from waiting import until

from aster.types import Cause, PublishReport

__all__ = ["make"]  # a fixture


@pytest.mark.parametrize("staleness", [0, 1, 2])
async def test_a_group_is_given_up_by_the_first_publication_that_makes_it_useless(make, staleness) -> None:
    engine = FakeEngine("e0", lambda task: 0.0 if task.sample == 0 else asyncio.Event())
    pool = make(engine, publisher=FakePublisher(), max_staleness=staleness)
    await pool.publish(None, 0)
    pool.submit(work("slow"))
    await until(lambda: (pool.in_flight, engine.now) == (1, 1))
    for version in range(1, staleness + 1):
        await pool.publish(None, version)
    await asyncio.sleep(0.02)
    assert (pool.in_flight, engine.now) == (1, 1)
    await pool.publish(None, staleness + 1)
    (group,) = await take(pool, 1)
    assert [t.cause for t in group.trajectories] == [Cause.STALE] * 2
    assert all(t.reward is None for t in group.trajectories)
    assert f"began under version 0, {staleness + 1} is out, max_staleness={staleness}" in group.trajectories[1].error
    await until(lambda: (pool.in_flight, engine.now) == (0, 0))
    assert pool.ledger.totals[Cause.STALE] == 2


@pytest.mark.parametrize("ran", [["slow", "next"], ["next"]])
async def test_its_place_goes_to_other_work_also_when_it_was_not_yet_running(make, ran) -> None:
    engine = FakeEngine("e0", lambda task: asyncio.Event() if "slow" in task.row_id else 0.0, capacity=1)
    pool = make(engine, publisher=FakePublisher(), max_staleness=0)
    await pool.publish(None, 0)
    pool.submit(work("slow", n=3))
    pool.submit(work("next", n=1))
    if "slow" in ran:
        await until(lambda: engine.ran)
    await pool.publish(None, 1)
    stale, other = await take(pool, 2)
    assert (stale.row.row_id, other.row.row_id) == ("slow", "next")
    assert len(stale.trajectories) == 3
    assert [task.row_id for task in engine.ran] == ran


async def test_what_had_not_begun_and_what_is_validated_stays(make) -> None:
    let_go = asyncio.Event()
    engine = FakeEngine("e0", lambda task: let_go, capacity=1)
    pool = make(engine, publisher=FakePublisher(), max_staleness=0)
    await pool.publish(None, 0)
    pool.submit(work("val", n=1, kind="val"))
    pool.submit(work("train", n=1))
    await pool.publish(None, 1)
    let_go.set()
    assert [g.trajectories[0].cause for g in await take(pool, 2)] == [Cause.ANSWERED] * 2


class SlowPublisher(FakePublisher):
    def __init__(self) -> None:
        super().__init__()
        self.asked, self.let_go = asyncio.Event(), asyncio.Event()

    async def publish(self, source: object, version: int) -> PublishReport:
        self.asked.set()
        await self.let_go.wait()
        return await super().publish(source, version)


async def test_what_starts_during_a_publication_is_taken_for_as_new_as_its_weights(make) -> None:
    publisher, done = SlowPublisher(), asyncio.Event()
    pool = make(FakeEngine("e0", lambda task: done), publisher=publisher, max_staleness=0)
    publishing = asyncio.create_task(pool.publish(None, 1))
    await publisher.asked.wait()
    pool.submit(work("row"))
    publisher.let_go.set()
    await publishing
    done.set()
    (group,) = await take(pool, 1)
    assert [t.cause for t in group.trajectories] == [Cause.ANSWERED] * 2


async def test_a_verdict_that_comes_too_late_is_not_booked(make) -> None:
    engine = FakeEngine("e0")
    pool = make(engine, publisher=FakePublisher(), max_staleness=0)
    asked, answer = asyncio.Event(), asyncio.Event()

    async def slow(text: str, truth: str):
        asked.set()
        await answer.wait()
        raise AssertionError("nobody waits for it")

    pool._rewards.score = slow
    await pool.publish(None, 0)
    pool.submit(work("row"))
    await asked.wait()
    await pool.publish(None, 1)
    (group,) = await take(pool, 1)
    answer.set()
    await asyncio.sleep(0.02)
    assert [t.cause for t in group.trajectories] == [Cause.STALE] * 2
    await until(lambda: pool.in_flight == 0)
