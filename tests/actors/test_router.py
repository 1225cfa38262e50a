from __future__ import annotations

import asyncio
import traceback
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from waiting import until

from actors import router
from actors.attempts import Draw, Group, sample_seed
from actors.router import EnginePool
from aster.agent.ledger import lost_trajectory
from aster.agent.rewards import RewardPool
from aster.errors import CircuitOpen, ConfigError, EngineLost, RewardFailed, WeightSyncError
from aster.types import (
    Budget,
    Cause,
    Past,
    PromptRow,
    PublishReport,
    RolloutWork,
    Sampling,
    Task,
    Trajectory,
    TrajectoryGroup,
    Turn,
    Verdicts,
)

BUDGET = Budget(max_prompt_tokens=16, max_response_tokens=64, max_tool_calls=4, trajectory_timeout_s=20)


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
        await asyncio.wait_for(pool.close(), 10)


async def take(pool: EnginePool, n: int) -> list[TrajectoryGroup]:
    groups = pool.groups()
    return [await asyncio.wait_for(anext(groups), 5) for _ in range(n)]


def lost(cause: Cause, error: str = "gone") -> Callable[[Task], Trajectory]:
    return lambda task: lost_trajectory(task, cause, error, engine="e0")


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
        await asyncio.wait_for(scoring.wait(), 5)
        await until(lambda: len(engine.ran) == 3)
        go.set()
        await take(pool, 1)


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
        await asyncio.wait_for(reading.wait(), 5)
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
        assert message.startswith("train step 3: 7 of 13 attempts were lost by our own failures, more than")
        assert "rollout.max_infra_failed_rate=0.5" in message
        assert "Broken: the sandbox service (sandbox_lost 7: e0 7; last: sandbox session s lost: connection" in message
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
        rule = lambda t: lost(Cause.SANDBOX_LOST)(t) if t.sample == 0 and "/0/" in t.uid else 0.0  # noqa: E731
        pool = make(FakeEngine("e0", rule), max_retries=0, max_infra_failed_rate=0.6)
        for step in range(4):
            pool.submit(work("a", n=2, step=step))
        assert len(await take(pool, 4)) == 4


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
        never = lambda t: asyncio.Event()  # noqa: E731
        seats, tokens = FakeEngine("e0", never, capacity=4), FakeEngine("e1", never, capacity=100, kv_tokens=800)
        pool = make(seats, tokens)
        for i in range(3):
            pool.submit(work(str(i), n=1))
        await until(lambda: seats.now + tokens.now == 3)
        assert (seats.now, tokens.now) == (1, 2), "one seat of four is 25 %; one of 800 tokens 10 %, two 17 %"


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
        assert (await asyncio.wait_for(publishing, 5)).version == 3
        alone = make(FakeEngine("e0", lost="OOM killed"), publisher=Choosy())
        with pytest.raises(EngineLost, match="no living engine"):
            await alone.publish(None, 3)

    async def test_work_waits_for_the_publication_that_a_late_replacement_makes_possible(self, make) -> None:
        """The last engine dies under it, and no copy of the weights is held that its successor could have at once."""
        dies, found_dead, spawned = asyncio.Event(), asyncio.Event(), asyncio.Event()

        class Interrupted(FakePublisher):
            async def publish(self, source: object, version: int) -> PublishReport:
                if not self.admitted:
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
        await asyncio.sleep(0.01)
        dies.set()
        await found_dead.wait()
        await asyncio.sleep(0.01)
        assert pool.waiting == 2
        spawned.set()
        assert (await asyncio.wait_for(publishing, 5)).version == 1
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
        await asyncio.wait_for(spawning.wait(), 5)
        await asyncio.wait_for(pool.close(), 5)
        assert ended.is_set()


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
            await asyncio.wait_for(reading, 5)

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
        partial = await asyncio.wait_for(pool.drain(), 5)
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
        await asyncio.wait_for(pool.close(), 5)
        assert (other.closed, other.now, pool.in_flight) == (1, 0, 0)
        assert "closing e0: OSError('gone')" in caplog.text
        await pool.close()
        assert other.closed == 1
        with pytest.raises(RuntimeError, match="closed"):
            pool.submit(work("b"))

    async def test_engines_need_names_of_their_own(self) -> None:
        with pytest.raises(ConfigError, match=r"\['e0', 'e0'\]"):
            EnginePool([FakeEngine("e0"), FakeEngine("e0")], rewards=RewardPool(math_verify=False))
