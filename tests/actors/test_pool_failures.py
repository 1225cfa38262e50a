"""Attempts that our own parts lost: run again, replaced or masked, and when the circuit opens."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from pools import FakeEngine, FakePublisher, lost, make, take, work
from waiting import until

from actors import router
from aster.agent.ledger import lost_trajectory
from aster.errors import CircuitOpen, ConfigError, EngineLost
from aster.types import (
    Cause,
    Past,
    Task,
    Trajectory,
)

__all__ = ["make"]  # a fixture


class TestOurFailures:
    async def test_the_next_attempt_goes_on_from_the_turns_that_were_kept(self, make) -> None:
        past, asked = Past("prompt", ()), []

        async def recall(task: Task, engine: str) -> Past:
            asked.append((task.uid, task.attempt, engine))
            await asyncio.sleep(0.01)
            return past

        engine = FakeEngine("e0", lambda task: 0.0 if task.attempt else EngineLost("gone"))
        pool = make(engine, recall=recall, max_infra_failed_rate=1.0)
        pool.submit(work("a", n=1))
        [group] = await take(pool, 1)
        assert group.trajectories[0].reward == 1.0
        assert asked == [("run/train/0/a/0", 0, "e0")]
        assert [(task.attempt, task.past) for task in engine.ran] == [(0, None), (1, past)]

    async def test_a_journal_that_hangs_costs_time_and_no_group(self, make, monkeypatch, caplog) -> None:
        async def recall(task: Task, engine: str) -> None:
            await asyncio.Event().wait()

        monkeypatch.setattr(router, "_RECALL_S", 0.02)
        engine = FakeEngine("e0", lambda task: 0.0 if task.attempt else EngineLost("gone"))
        pool = make(engine, recall=recall, max_infra_failed_rate=1.0)
        pool.submit(work("a", n=1))
        await take(pool, 1)
        assert "its finished turns were not read within" in caplog.text

    async def test_nothing_is_kept_of_a_tree(self, make) -> None:
        async def recall(task: Task, engine: str) -> Past:
            raise AssertionError("asked")

        engine = FakeEngine("e0", lambda task: 0.0 if task.attempt else EngineLost("gone"))
        pool = make(engine, recall=recall, max_infra_failed_rate=1.0)
        pool.submit(replace(work("a", n=2), tree_turns=(1,), tree_factor=2))
        [group] = await take(pool, 1)
        assert [t.reward for t in group.trajectories] == [1.0, 1.0]

    async def test_a_group_that_is_given_up_while_its_turns_are_read_does_not_come_back(self, make) -> None:
        reading, never = asyncio.Event(), asyncio.Event()

        async def recall(task: Task, engine: str) -> None:
            reading.set()
            await never.wait()

        engine = FakeEngine("e0", lambda task: EngineLost("gone") if task.row_id == "a" else 0.0)
        pool = make(engine, recall=recall, publisher=FakePublisher(), max_infra_failed_rate=1.0, max_staleness=0)
        pool.submit(work("a", n=1))
        await asyncio.wait_for(reading.wait(), 60)
        await pool.publish(None, 0)
        [group] = await take(pool, 1)
        assert [t.cause for t in group.trajectories] == [Cause.STALE]
        pool.submit(work("b", n=1))
        assert [g.row.row_id for g in await take(pool, 1)] == ["b"]
        assert [task.row_id for task in engine.ran] == ["a", "b"]

    async def test_a_lost_trajectory_runs_again_elsewhere_with_the_same_seed(self, make) -> None:
        bad = FakeEngine("e0", lost(Cause.SANDBOX_LOST), capacity=1)
        good = FakeEngine("e1", capacity=1)
        pool = make(bad, good)
        pool.submit(work("a", n=2))
        [group] = await take(pool, 1)
        [first], again = bad.ran, [t for t in good.ran if t.attempt == 1]
        assert len(again) == 1
        assert (again[0].uid, again[0].seed, again[0].sample) == (first.uid, first.seed, first.sample)
        assert [t.engine for t in group.trajectories] == ["e1", "e1"]
        assert [(t.sample, t.cause) for t in group.lost] == [(first.sample, Cause.SANDBOX_LOST)]
        assert len(group.scored) == 2

    async def test_a_retry_waits_for_another_engine_rather_than_going_back(self, make) -> None:
        busy = asyncio.Event()
        bad = FakeEngine("e0", lambda t: lost_trajectory(t, Cause.SANDBOX_LOST, "x", engine="e0"), capacity=4)
        good = FakeEngine("e1", lambda t: busy if t.row_id == "first" else 0.0, capacity=1)
        pool = make(good, bad)
        pool.submit(work("first", n=1))
        pool.submit(work("a", n=1))
        await until(lambda: pool.waiting == 1)
        await asyncio.sleep(0.05)
        assert (len(bad.ran), pool.waiting) == (1, 1)
        busy.set()
        assert [t.engine for g in await take(pool, 2) for t in g.trajectories] == ["e1", "e1"]

    async def test_the_only_engine_gets_its_own_losses_again(self, make) -> None:
        engine = FakeEngine(
            "e0", lambda t: 0.0 if t.attempt else lost_trajectory(t, Cause.ENGINE_LOST, "late", engine="e0")
        )
        pool = make(engine, max_infra_failed_rate=1.0)
        pool.submit(work("a", n=2))
        [group] = await take(pool, 1)
        assert (len(group.scored), len(group.lost)) == (2, 2)

    async def test_after_the_last_retry_it_is_masked_in_its_group(self, make) -> None:
        engine = FakeEngine("e0", lambda t: lost(Cause.ENGINE_LOST)(t) if t.sample == 1 else 0.0)
        pool = make(engine)
        pool.submit(work("a", n=4))
        [group] = await take(pool, 1)
        assert [t.reward for t in group.trajectories] == [1.0, None, 1.0, 1.0]
        assert group.trajectories[1].cause is Cause.ENGINE_LOST
        assert [task.attempt for task in engine.ran if task.sample == 1] == [0, 1]

    async def test_an_engine_that_raises_engine_lost_or_drops_a_trajectory_is_no_crash(self, make) -> None:
        def rule(task: Task) -> float | BaseException:
            return (EngineLost("died"), asyncio.CancelledError())[task.sample] if not task.attempt else 0.0

        pool = make(FakeEngine("e0", rule), max_infra_failed_rate=1.0)
        pool.submit(work("a", n=2))
        [group] = await take(pool, 1)
        assert sorted(t.cause for t in group.lost) == [Cause.CANCELLED, Cause.ENGINE_LOST]
        assert len(group.scored) == 2

    async def test_a_dead_engine_gets_no_more_work(self, make) -> None:
        dying = FakeEngine("e0", capacity=1)

        def die(task: Task) -> Trajectory:
            dying.lost = "actor died"
            return lost_trajectory(task, Cause.ENGINE_LOST, "actor died", engine="e0")

        dying.rule = die
        pool = make(dying, FakeEngine("e1", capacity=1))
        for i in range(8):
            pool.submit(work(str(i), n=1))
        groups = await take(pool, 8)
        assert len(dying.ran) == 1
        assert all(t.engine == "e1" for g in groups for t in g.trajectories)

    async def test_a_replacement_joins_under_the_name_of_the_dead_and_takes_work_at_once(self, make) -> None:
        stuck = FakeEngine("e0", lambda t: asyncio.Event(), capacity=1)
        pool = make(stuck)
        pool.submit(work("a", n=1))
        pool.submit(work("b", n=1))
        with pytest.raises(ConfigError, match="'e0' is alive"):
            pool.join(FakeEngine("e0"))
        stuck.lost = "OOM killed"
        replacement = FakeEngine("e0", capacity=2)
        pool.join(replacement)
        assert [g.row.row_id for g in await take(pool, 1)] == ["b"]
        assert [task.row_id for task in replacement.ran] == ["b"]

    async def test_when_every_engine_is_dead_the_pool_says_so(self, make) -> None:
        pool = make(FakeEngine("e0", lost="OOM killed"), FakeEngine("e1", lost="node went away"))
        pool.submit(work("a"))
        with pytest.raises(
            CircuitOpen, match=r"every engine is dead, 2 trajectories .*e0: OOM killed; e1: node went away"
        ):
            await take(pool, 1)

    async def test_too_many_losses_open_the_circuit_and_name_what_is_broken(self, make) -> None:
        engine = FakeEngine("e0", lost(Cause.SANDBOX_LOST, "sandbox session s lost: connection refused"))
        pool = make(engine, max_infra_failed_rate=0.5)
        pool.submit(work("a", n=8, step=3))
        with pytest.raises(CircuitOpen) as caught:
            await take(pool, 1)
        message = str(caught.value)
        assert message.startswith("train step 3: 5 of 8 trajectories were lost by our own failures, retries included")
        assert "rollout.max_infra_failed_rate=0.5" in message
        assert "Broken: the sandbox service (sandbox_lost 10: e0 10; last: sandbox session s lost:" in message
        with pytest.raises(CircuitOpen):  # and it stays open
            await take(pool, 1)
        with pytest.raises(CircuitOpen):
            await pool.publish(None, 1)

    async def test_a_few_early_failures_of_a_large_step_do_not_open_it(self, make) -> None:
        pool = make(FakeEngine("e0", lambda t: lost(Cause.SANDBOX_LOST)(t) if t.sample < 3 else 0.0), max_retries=0)
        pool.submit(work("a", n=8))
        [group] = await take(pool, 1)
        assert len(group.scored) == 5

    async def test_the_rate_is_per_step(self, make) -> None:
        def loses_the_first_of_step_0(t: Task) -> Trajectory | float:
            return lost(Cause.SANDBOX_LOST)(t) if t.sample == 0 and "/0/" in t.uid else 0.0

        pool = make(FakeEngine("e0", loses_the_first_of_step_0), max_retries=0, max_infra_failed_rate=0.6)
        for step in range(4):
            pool.submit(work("a", n=2, step=step))
        assert len(await take(pool, 4)) == 4
