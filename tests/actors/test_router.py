"""The pool: which engine gets what and when, names and seeds, rewards, publications, the end."""

from __future__ import annotations

import asyncio
import traceback
from dataclasses import replace

import pytest
from pools import BUDGET, FakeEngine, FakePublisher, answered, lost, make, take, work
from waiting import until

from actors.attempts import Draw, Group, sample_seed
from actors.router import EnginePool
from aster.agent.ledger import lost_trajectory
from aster.agent.rewards import RewardPool
from aster.errors import ConfigError, EngineLost, RewardFailed, WeightSyncError
from aster.types import (
    Cause,
    RolloutWork,
    Task,
    Trajectory,
    Verdicts,
)

__all__ = ["make"]  # a fixture


class TestTrees:
    def tree_work(self, n: int = 8) -> RolloutWork:
        return replace(work("a", n=n), tree_turns=(1, 2), tree_factor=2)

    async def test_a_group_is_made_of_trees_that_each_run_on_one_engine(self, make) -> None:
        engines = [FakeEngine(f"e{i}") for i in range(2)]
        pool = make(*engines)
        pool.submit(self.tree_work())
        assert (pool.in_flight, pool.waiting) == (8, 0)
        [group] = await take(pool, 1)
        assert [t.sample for t in group.trajectories] == list(range(8))
        assert [t.reward for t in group.trajectories] == [1.0] * 8
        ran = sorted([task.sample for task in engine.ran] for engine in engines)
        assert ran == [[0, 1, 2, 3], [4, 5, 6, 7]]
        heads = [engine.ran[0] for engine in engines]
        assert all((len(h.leaves), h.tree_turns, h.tree_factor) == (3, (1, 2), 2) for h in heads)
        assert len({task.seed for engine in engines for task in engine.ran}) == 8
        flat = make(FakeEngine("e0"))
        flat.submit(work("a", n=8))
        [alone] = await take(flat, 1)
        assert [t.uid for t in alone.trajectories] == [t.uid for t in group.trajectories]

    async def test_a_tree_with_a_lost_leaf_runs_again_as_a_whole_and_then_only_that_leaf_is_masked(self, make) -> None:
        def third_is_lost(task: Task):
            return lost(Cause.SANDBOX_LOST)(task) if task.sample == 2 else 0.0

        engines = [FakeEngine("e0", third_is_lost), FakeEngine("e1", third_is_lost)]
        pool = make(*engines)
        pool.submit(self.tree_work(4))
        [group] = await take(pool, 1)
        assert [t.cause.is_ours for t in group.trajectories] == [False, False, True, False]
        assert [(t.sample, t.cause) for t in group.lost] == [(2, Cause.SANDBOX_LOST)]
        attempts = sorted((task.attempt, task.sample) for engine in engines for task in engine.ran)
        assert attempts == [(0, i) for i in range(4)] + [(1, i) for i in range(4)]
        assert {task.attempt for task in engines[0].ran} != {task.attempt for task in engines[1].ran}, "elsewhere"

    async def test_a_lost_engine_loses_every_leaf_once(self, make) -> None:
        engines = [FakeEngine("e0", lambda task: EngineLost("gone") if not task.attempt else 0.0)]
        pool = make(*engines, max_infra_failed_rate=1.0)
        pool.submit(self.tree_work(4))
        [group] = await take(pool, 1)
        assert [t.reward for t in group.trajectories] == [1.0] * 4
        assert [(t.sample, t.cause) for t in group.lost] == [(i, Cause.ENGINE_LOST) for i in range(4)]


class TestOrder:
    async def test_groups_come_back_in_order_of_completion_and_samples_in_order(self, make) -> None:
        slow = asyncio.Event()
        engine = FakeEngine("e0", lambda task: slow if task.row_id == "a" else 0.01 * (2 - task.sample))
        pool = make(engine, publisher=None)
        for row in "abc":
            pool.submit(work(row))
        groups = await take(pool, 2)
        assert [g.row.row_id for g in groups] == ["b", "c"]
        assert [[t.sample for t in g.trajectories] for g in groups] == [[0, 1], [0, 1]]
        slow.set()
        assert [g.row.row_id for g in await take(pool, 1)] == ["a"]

    async def test_an_engine_never_has_more_than_its_capacity_and_pulls_when_it_has_room(self, make) -> None:
        small, large = FakeEngine("e0", lambda t: 0.005, capacity=2), FakeEngine("e1", lambda t: 0.005, capacity=6)
        pool = make(small, large)
        for i in range(16):
            pool.submit(work(str(i), n=4))
        assert (pool.in_flight, pool.waiting) == (8, 56)
        groups = await take(pool, 16)
        assert sum(len(g.trajectories) for g in groups) == 64
        assert (small.most, large.most) == (2, 6)
        assert len(large.ran) > 2 * len(small.ran)

    async def test_a_slow_trajectory_does_not_hold_up_a_queue(self, make) -> None:
        slow = asyncio.Event()
        stuck = FakeEngine("e0", lambda task: slow if task.row_id == "a" else 0.0, capacity=1)
        free = FakeEngine("e1", lambda task: slow if task.row_id == "a" else 0.0, capacity=1)
        pool = make(stuck, free)
        pool.submit(work("a", n=1))
        for i in range(20):
            pool.submit(work(str(i), n=2))
        await take(pool, 20)
        slow.set()
        await take(pool, 1)

    async def test_training_and_validation_may_be_in_flight_together(self, make) -> None:
        pool = make(FakeEngine("e0", capacity=2))
        pool.submit(work("a", kind="val"))
        pool.submit(work("a", kind="train"))
        assert {g.kind for g in await take(pool, 2)} == {"train", "val"}

    async def test_submit_never_blocks(self, make) -> None:
        pool = make(FakeEngine("e0", lambda t: asyncio.Event(), capacity=1))
        for i in range(2000):
            pool.submit(work(str(i)))
        assert (pool.in_flight, pool.waiting) == (1, 3999)


class TestSeedsAndNames:
    async def test_seeds_come_from_the_place_in_the_run_and_nothing_else(self, make) -> None:
        ran: list[list[Task]] = []
        for capacity in (1, 4):
            engine = FakeEngine("e0", capacity=capacity)
            pool = make(engine)
            for row in "ab":
                pool.submit(work(row, seed=9))
            await take(pool, 2)
            ran.append(sorted(engine.ran, key=lambda task: task.uid))
        assert ran[0] == ran[1]
        assert len({task.seed for task in ran[0]}) == 4
        assert ran[0][0].seed == sample_seed(9, "train/0/a/0")
        assert ran[0][0].uid == "run/train/0/a/0"

    async def test_the_same_row_twice_in_a_step_has_other_names_and_seeds(self, make) -> None:
        engine = FakeEngine("e0")
        pool = make(engine)
        pool.submit(work("a"))
        pool.submit(work("a"))
        await take(pool, 2)
        assert len({task.uid for task in engine.ran}) == len({task.seed for task in engine.ran}) == 4

    async def test_names_are_remembered_while_a_step_may_be_in_flight_and_not_for_ever(self) -> None:
        draw = Draw("run")
        for step in range(1000):
            names = [attempt.task.uid for _ in "ab" for attempt in draw.attempts(Group(work("a", n=1, step=step)))]
            assert names == [f"run/train/{step}/a/0", f"run/train/{step}/a~2/0"]
        (after_a_rollback,) = draw.attempts(Group(work("a", n=1, step=990)))
        assert after_a_rollback.task.uid == "run/train/990/a~3/0"
        assert len(draw._seen) < 100

    async def test_the_ground_truth_stays_here(self, make) -> None:
        engine = FakeEngine("e0")
        pool = make(engine)
        pool.submit(work("a"))
        await take(pool, 1)
        assert all("34" not in str(task) for task in engine.ran)


class TestRewards:
    async def test_what_is_ours_is_not_scored_and_the_rest_is(self, make) -> None:
        def rule(task: Task) -> Trajectory:
            if task.sample == 2:
                return lost_trajectory(task, Cause.SANDBOX_LOST, "gone", engine="e0")
            return answered(task, "e0", ("\\boxed{34}", "\\boxed{35}")[task.sample])

        pool = make(FakeEngine("e0", rule), max_retries=0)
        pool.submit(work("a", n=3))
        [group] = await take(pool, 1)
        assert [t.reward for t in group.trajectories] == [1.0, 0.0, None]
        assert len(group.scored) == 2
        assert group.trajectories[0].verdicts == Verdicts(strict=True, pred="34")

    async def test_a_verifier_that_dies_is_asked_again_and_then_the_trajectory_is_masked_not_rerun(self, make) -> None:
        class Dying:
            asked = 0

            async def score(self, text: str, truth: str) -> tuple[float, Verdicts]:
                self.asked += 1
                if self.asked == 1 or text == "hang":
                    raise RewardFailed("silent for 10 s")
                return 1.0, Verdicts(strict=True)

        engine = FakeEngine("e0", lambda t: answered(t, "e0", "hang" if t.sample else "fine"))
        pool = make(engine, rewards=Dying())
        pool.submit(work("a", n=2))
        [group] = await take(pool, 1)
        assert [t.cause for t in group.trajectories] == [Cause.ANSWERED, Cause.REWARD_FAILED]
        assert [t.reward for t in group.trajectories] == [1.0, None]
        assert (group.trajectories[1].error, len(engine.ran), group.lost) == ("silent for 10 s", 2, ())

    async def test_an_engine_takes_more_work_while_an_answer_is_being_scored(self, make) -> None:
        scoring, go = asyncio.Event(), asyncio.Event()

        class Slow:
            async def score(self, text: str, truth: str) -> tuple[float, Verdicts]:
                scoring.set()
                await go.wait()
                return 1.0, Verdicts()

        engine = FakeEngine("e0", capacity=1)
        pool = make(engine, rewards=Slow())
        pool.submit(work("a", n=3))
        await asyncio.wait_for(scoring.wait(), 60)
        await until(lambda: len(engine.ran) == 3)
        go.set()
        await take(pool, 1)


class TestRoomInTokens:
    """Budget 16 + 64 = 80 tokens: 40 expected of a trajectory, give or take 20, before any has ended."""

    async def test_an_engine_takes_what_its_kv_cache_will_probably_hold(self, make) -> None:
        small, unknown = FakeEngine("e0", lambda t: asyncio.Event(), capacity=64, kv_tokens=400), FakeEngine("e1")
        pool = make(small, unknown)
        unknown.rule = small.rule
        for i in range(40):
            pool.submit(work(str(i), n=1))
        await until(lambda: unknown.now >= 4 and small.now >= 7)
        assert unknown.now == unknown.capacity == 4
        assert small.now == 7, "7 x 40 + 2 x sqrt(7) x 20 = 386; with the eighth 433"

    async def test_short_trajectories_make_room_for_more_at_once(self, make) -> None:
        engine = FakeEngine("e0", lambda t: 0.001, capacity=64, kv_tokens=400)
        pool = make(engine)
        for i in range(60):
            pool.submit(work(str(i), n=8))
        await take(pool, 60)
        assert engine.most > 30, "6 tokens each were observed, 40 assumed"
        assert (pool.in_flight, pool.waiting) == (0, 0)

    async def test_a_lone_trajectory_always_runs_and_nothing_waits_for_ever(self, make) -> None:
        engine = FakeEngine("e0", capacity=8, kv_tokens=80)  # 40 + 2 x 20 = 80: exactly one
        pool = make(engine)
        for i in range(6):
            pool.submit(work(str(i), n=2))
        assert pool.in_flight == 1
        assert len(await take(pool, 6)) == 6

    async def test_a_budget_that_no_engine_can_hold_is_refused_with_the_sum(self, make) -> None:
        pool = make(FakeEngine("e0", kv_tokens=64), FakeEngine("e1", kv_tokens=79))
        with pytest.raises(ConfigError, match=r"max_prompt_tokens=16 \+ max_response_tokens=64 = 80 .* holds 79"):
            pool.submit(work("a"))
        assert (pool.in_flight, pool.waiting) == (0, 0)

    async def test_the_first_in_line_is_not_overtaken_by_smaller_ones(self, make) -> None:
        go = asyncio.Event()
        engine = FakeEngine("e0", lambda t: go if t.row_id == "runs" else 0.0, capacity=8, kv_tokens=120)
        pool = make(engine)
        small = replace(work("small", n=1, kind="val"), budget=replace(BUDGET, max_response_tokens=4))
        pool.submit(work("runs", n=1))
        pool.submit(work("large", n=1))  # 2 x 40 + 2 x sqrt(2) x 20 = 137
        pool.submit(small)  # 40 + 10 + 2 x sqrt(400 + 25) = 91: would fit beside the first
        await until(lambda: engine.ran)
        await asyncio.sleep(0.01)
        assert [t.row_id for t in engine.ran] == ["runs"]
        go.set()
        assert len(await take(pool, 3)) == 3

    async def test_the_emptier_engine_by_what_is_scarcer_is_chosen(self, make) -> None:
        def never(t: Task) -> asyncio.Event:
            return asyncio.Event()

        seats, tokens = FakeEngine("e0", never, capacity=4), FakeEngine("e1", never, capacity=100, kv_tokens=800)
        pool = make(seats, tokens)
        for i in range(3):
            pool.submit(work(str(i), n=1))
        await until(lambda: seats.now + tokens.now == 3)
        assert (seats.now, tokens.now) == (1, 2), "one seat of four is 25 %; one of 800 tokens 10 %, two 17 %"


class TestBackgroundFailure:
    async def test_a_bug_in_a_trajectory_ends_groups_with_its_own_traceback(self, make) -> None:
        def buggy(task: Task) -> float:
            return 1 / task.sample

        pool = make(FakeEngine("e0", buggy))
        pool.submit(work("a"))
        with pytest.raises(ZeroDivisionError) as caught:
            await take(pool, 1)
        assert "buggy" in "".join(traceback.format_tb(caught.value.__traceback__))

    async def test_a_waiting_reader_is_woken(self, make) -> None:
        go = asyncio.Event()

        class Engine(FakeEngine):
            async def run(self, task: Task) -> Trajectory:
                await go.wait()
                raise ValueError("row 'a': the prompt has 9 tokens")

        pool = make(Engine("e0"))
        pool.submit(work("a"))
        reading = asyncio.create_task(take(pool, 1))
        await asyncio.sleep(0.01)
        go.set()
        with pytest.raises(ValueError, match="row 'a'"):
            await asyncio.wait_for(reading, 60)

    async def test_a_task_that_is_cancelled_from_outside_is_a_failure_not_a_hang(self, make) -> None:
        pool = make(FakeEngine("e0", lambda t: asyncio.Event()))
        pool.submit(work("a", n=1))
        await asyncio.sleep(0)
        next(iter(pool._running)).cancel()
        with pytest.raises(RuntimeError, match="run/train/0/a/0 on e0 was cancelled, and not by the pool"):
            await take(pool, 1)


class TestPublish:
    async def test_the_publisher_publishes_and_the_pool_remembers_the_version(self, make) -> None:
        publisher = FakePublisher()
        pool = make(FakeEngine("e0"), publisher=publisher)
        assert pool.version == -1
        report = await pool.publish(None, 3)
        assert (report.version, pool.version, publisher.published) == (3, 3, [3])
        with pytest.raises(WeightSyncError, match="bucket 3"):
            await pool.publish(None, -5)
        assert pool.version == 3

    async def test_without_a_publisher_it_says_so(self, make) -> None:
        with pytest.raises(ConfigError, match="without a publisher"):
            await make(FakeEngine("e0")).publish(None, 1)


class TestTheEnd:
    async def test_drain_hands_back_partials_and_the_finished_of_unfinished_groups(self, make) -> None:
        never = asyncio.Event()
        engine = FakeEngine("e0", lambda t: never if t.sample else 0.0, capacity=3)
        pool = make(engine)
        pool.submit(work("a", n=3))
        pool.submit(work("b", n=3))
        await until(lambda: (len(engine.ran), pool.ledger.totals[Cause.ANSWERED]) == (5, 2))
        partial = await asyncio.wait_for(pool.drain(), 60)
        assert sorted((t.row_id, t.sample, t.cause) for t in partial) == [
            ("a", 0, Cause.ANSWERED),
            ("a", 1, Cause.CANCELLED),
            ("a", 2, Cause.CANCELLED),
            ("b", 0, Cause.ANSWERED),
            ("b", 1, Cause.CANCELLED),
        ]
        assert next(t for t in partial if t.sample == 0).reward == 1.0
        assert (pool.in_flight, pool.waiting, len(engine.ran)) == (0, 0, 5)
        engine.rule = lambda t: 0.0
        engine.cancelled.clear()
        pool.submit(work("c"))
        assert [g.row.row_id for g in await take(pool, 1)] == ["c"]

    async def test_close_ends_everything_and_one_engine_that_fails_does_not_keep_the_others(self, make, caplog) -> None:
        class Stubborn(FakeEngine):
            async def close(self) -> None:
                raise OSError("gone")

        other = FakeEngine("e1", lambda t: asyncio.Event())
        pool = make(Stubborn("e0", lambda t: asyncio.Event()), other)
        pool.submit(work("a", n=8))
        await until(lambda: other.now == 4)
        await asyncio.wait_for(pool.close(), 60)
        assert (other.closed, other.now, pool.in_flight) == (1, 0, 0)
        assert "closing e0: OSError('gone')" in caplog.text
        await pool.close()
        assert other.closed == 1
        with pytest.raises(RuntimeError, match="closed"):
            pool.submit(work("b"))

    async def test_engines_need_names_of_their_own(self) -> None:
        with pytest.raises(ConfigError, match=r"\['e0', 'e0'\]"):
            EnginePool([FakeEngine("e0"), FakeEngine("e0")], rewards=RewardPool(math_verify=False))
