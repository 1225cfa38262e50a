"""Engines that die: who takes their work, when a new one joins, and with which weights."""

from __future__ import annotations

import asyncio

import pytest
from pools import FakeEngine, FakePublisher, make, take, work
from waiting import until

from aster.agent.ledger import lost_trajectory
from aster.errors import CircuitOpen, EngineLost, WeightSyncError
from aster.types import (
    Cause,
    PublishReport,
    Task,
    Trajectory,
)

__all__ = ["make"]  # a fixture


class TestReplacement:
    @staticmethod
    def dying(name: str) -> FakeEngine:
        engine = FakeEngine(name, capacity=4)

        def die(task: Task) -> Trajectory:
            engine.lost = "OOM killed"
            return lost_trajectory(task, Cause.ENGINE_LOST, "OOM killed", engine=name)

        engine.rule = die
        return engine

    async def test_a_dead_engine_is_replaced_with_current_weights_and_its_work_runs_there(self, make) -> None:
        publisher, order = FakePublisher(), []
        dead, successor = self.dying("e0"), FakeEngine("e0.1", lambda t: order.append("runs") or 0.0)

        async def spawn(engine: FakeEngine) -> FakeEngine:
            assert engine is dead
            await asyncio.sleep(0.02)
            order.append("spawned")
            return successor

        admit = publisher.admit

        async def watched(engine: object) -> bool:
            order.append("admitted")
            return await admit(engine)

        publisher.admit = watched
        pool = make(dead, publisher=publisher, replace_engine=spawn, max_infra_failed_rate=1.0)
        pool.submit(work("a", n=2))
        [group] = await take(pool, 1)
        assert order == ["spawned", "admitted", "runs", "runs"]
        assert [t.engine for t in group.trajectories] == ["e0.1", "e0.1"]
        assert {t.cause for t in group.lost} == {Cause.ENGINE_LOST}

    async def test_a_step_that_its_only_engine_lost_whole_stands_another_loss(self, make) -> None:
        unlucky: list[str] = []

        def loses_one(task: Task) -> Trajectory | float:
            if not unlucky:
                unlucky.append(task.uid)
                return lost_trajectory(task, Cause.SANDBOX_LOST, "gone", engine="e0.1")
            return 0.0

        async def spawn(engine: FakeEngine) -> FakeEngine:
            return FakeEngine("e0.1", loses_one, capacity=128)

        dead = self.dying("e0")
        dead.capacity = 128
        pool = make(dead, replace_engine=spawn, max_infra_failed_rate=0.5)
        for i in range(16):
            pool.submit(work(str(i), n=8))
        groups = await take(pool, 16)
        assert len(dead.ran) == 128
        assert sum(len(g.lost) for g in groups) == 128
        assert [t.uid for g in groups for t in g.trajectories if t.reward is None] == unlucky

    async def test_engines_that_die_again_and_again_open_the_circuit(self, make) -> None:
        """Each finishes something, so that each is replaced."""
        made: list[FakeEngine] = []

        def mortal(name: str) -> FakeEngine:
            engine = FakeEngine(name, capacity=16)

            def answer_one_and_die(task: Task) -> Trajectory | float:
                if len(engine.ran) == 1:
                    return 0.0
                engine.lost = "OOM killed"
                return lost_trajectory(task, Cause.ENGINE_LOST, "OOM killed", engine=name)

            engine.rule = answer_one_and_die
            return engine

        async def spawn(engine: FakeEngine) -> FakeEngine:
            made.append(mortal(f"e0.{len(made) + 1}"))
            return made[-1]

        pool = make(mortal("e0"), replace_engine=spawn, max_infra_failed_rate=0.5)
        for i in range(4):
            pool.submit(work(str(i), n=4))
        with pytest.raises(CircuitOpen, match=r"9 of 16 trajectories .*Broken: the rollout engines \(engine_lost"):
            await take(pool, 4)
        assert len(made) == 2

    async def test_without_a_copy_of_the_weights_it_works_after_the_next_publication(self, make) -> None:
        publisher = FakePublisher()
        publisher.has_copy = False
        successor = FakeEngine("e0.1")

        async def spawn(engine: FakeEngine) -> FakeEngine:
            return successor

        other = FakeEngine("e1", lambda t: 0.001)
        pool = make(self.dying("e0"), other, publisher=publisher, replace_engine=spawn, max_infra_failed_rate=1.0)
        for i in range(4):
            pool.submit(work(str(i)))
        await take(pool, 4)
        assert (publisher.admitted, successor.ran) == ([successor], [])
        await pool.publish(None, 1)
        for i in range(4):
            pool.submit(work(str(i), step=1))
        await take(pool, 4)
        assert successor.ran

    async def test_when_nobody_is_left_to_wait_for_the_pool_says_which_switch_would_have_helped(self, make) -> None:
        publisher = FakePublisher()
        publisher.has_copy = False

        async def spawn(engine: FakeEngine) -> FakeEngine:
            return FakeEngine("e0.1")

        pool = make(self.dying("e0"), publisher=publisher, replace_engine=spawn, max_infra_failed_rate=1.0)
        pool.submit(work("a"))
        with pytest.raises(CircuitOpen, match=r"1 replacements wait for weights .*rollout.weight_rollback=true"):
            await take(pool, 1)

    async def test_replacements_that_never_finish_anything_come_to_an_end(self, make) -> None:
        made: list[FakeEngine] = []

        async def spawn(engine: FakeEngine) -> FakeEngine:
            made.append(self.dying(f"e0.{len(made) + 1}"))
            return made[-1]

        pool = make(self.dying("e0"), replace_engine=spawn, max_retries=9, max_infra_failed_rate=1.0)
        pool.submit(work("a", n=1))
        with pytest.raises(CircuitOpen, match=r"every engine is dead, 1 trajectories .*e0.3: OOM killed"):
            await take(pool, 1)
        assert len(made) == 3

    async def test_engines_that_die_together_are_all_replaced(self, make) -> None:
        made: list[FakeEngine] = []

        async def spawn(engine: FakeEngine) -> FakeEngine:
            made.append(FakeEngine(f"{engine.name}.1"))
            return made[-1]

        dying = [self.dying(f"e{i}") for i in range(6)]
        pool = make(*dying, replace_engine=spawn, max_retries=9, max_infra_failed_rate=1.0)
        pool.submit(work("a", n=24))
        await take(pool, 1)
        assert sorted(engine.name for engine in made) == [f"e{i}.1" for i in range(6)]

    async def test_a_publication_waits_for_the_replacement_of_the_last_engine(self, make) -> None:
        here = asyncio.Event()

        class Choosy(FakePublisher):
            async def publish(self, source: object, version: int) -> PublishReport:
                if not self.admitted:
                    raise EngineLost("no living engine")
                return await super().publish(source, version)

        async def spawn(engine: FakeEngine) -> FakeEngine:
            await here.wait()
            return FakeEngine("e0.1")

        dead, publisher = FakeEngine("e0", lost="OOM killed"), Choosy()
        pool = make(dead, publisher=publisher, replace_engine=spawn, max_infra_failed_rate=1.0)
        publishing = asyncio.create_task(pool.publish(None, 3))
        await asyncio.sleep(0.02)
        assert not publishing.done()
        here.set()
        assert (await asyncio.wait_for(publishing, 60)).version == 3
        alone = make(FakeEngine("e0", lost="OOM killed"), publisher=Choosy())
        with pytest.raises(EngineLost, match="no living engine"):
            await alone.publish(None, 3)

    async def test_work_waits_for_the_publication_that_a_late_replacement_makes_possible(self, make) -> None:
        """The last engine dies under it, and no copy of the weights is held that its successor could have at once."""
        asked, dies, found_dead, spawned = (asyncio.Event() for _ in range(4))

        class Interrupted(FakePublisher):
            async def publish(self, source: object, version: int) -> PublishReport:
                if not self.admitted:
                    asked.set()
                    await found_dead.wait()
                    raise EngineLost("no living engine")
                return await super().publish(source, version)

        class Mortal(FakeEngine):
            async def run(self, task: Task) -> Trajectory:
                await dies.wait()
                self.lost = "OOM killed"
                found_dead.set()
                return lost_trajectory(task, Cause.ENGINE_LOST, "OOM killed", engine=self.name)

        async def spawn(engine: FakeEngine) -> FakeEngine:
            await spawned.wait()
            return FakeEngine("e0.1")

        publisher = Interrupted()
        publisher.has_copy = False
        pool = make(Mortal("e0"), publisher=publisher, replace_engine=spawn, max_infra_failed_rate=1.0)
        pool.submit(work("a"))
        publishing = asyncio.create_task(pool.publish(None, 1))
        await asyncio.wait_for(asked.wait(), 60)
        dies.set()
        await asyncio.wait_for(found_dead.wait(), 60)
        await until(lambda: pool.waiting == 2)
        spawned.set()
        assert (await asyncio.wait_for(publishing, 60)).version == 1
        [group] = await take(pool, 1)
        assert [t.engine for t in group.trajectories] == ["e0.1", "e0.1"]

    async def test_one_that_does_not_come_up_leaves_the_others_at_work(self, make, caplog) -> None:
        async def spawn(engine: FakeEngine) -> FakeEngine:
            raise EngineLost("not ready within 900 s")

        pool = make(self.dying("e0"), FakeEngine("e1"), replace_engine=spawn, max_infra_failed_rate=1.0)
        pool.submit(work("a", n=4))
        [group] = await take(pool, 1)
        assert {t.engine for t in group.trajectories} == {"e1"}
        assert "e0 was not replaced: not ready within 900 s" in caplog.text

    async def test_one_that_does_not_get_the_weights_is_closed_again(self, make) -> None:
        publisher, successor = FakePublisher(), FakeEngine("e0.1")

        async def refuse(engine: object) -> bool:
            raise WeightSyncError("version 3 does not verify on e0.1")

        async def spawn(engine: FakeEngine) -> FakeEngine:
            return successor

        publisher.admit = refuse
        pool = make(
            self.dying("e0"), FakeEngine("e1"), publisher=publisher, replace_engine=spawn, max_infra_failed_rate=1.0
        )
        pool.submit(work("a", n=4))
        await take(pool, 1)
        assert (successor.closed, successor.ran) == (1, [])

    async def test_closing_the_pool_ends_a_replacement_under_way(self, make) -> None:
        spawning, ended = asyncio.Event(), asyncio.Event()

        async def spawn(engine: FakeEngine) -> FakeEngine:
            spawning.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()
            raise AssertionError

        pool = make(self.dying("e0"), replace_engine=spawn, max_infra_failed_rate=1.0)
        pool.submit(work("a", n=1))
        await asyncio.wait_for(spawning.wait(), 60)
        await asyncio.wait_for(pool.close(), 60)
        assert ended.is_set()
