"""The pool of engines: hands out trajectories, scores what comes home, and puts groups together.

    submit(work) --> waiting [retries | new, FIFO] --pull--> engine 0  <= seats and KV tokens; each stays there
                         ^                            +----> engine 1  ...  dead? --> replace, bring up to date --+
                         |                                       |   ^                                            |
                         |                                       |   +------------------ join <-------------------+
                         +------- lost by us: RETRY -- judge <-- + score (reward pool: own processes)
                                                        |
                                        KEEP | MASK     v
                                     group complete --> finished --> groups()   in order of completion

Where it presses back, from the end to the beginning:
- `finished` and `waiting` have no bound: the caller decides how many groups are outstanding, and `submit` never blocks.
- An engine pulls when it has room (`admission.Room`: a seat, and KV tokens for what will probably be needed), so a slow
  trajectory never holds up a queue. The first in line that fits nowhere keeps those behind it waiting: nothing starves.
- Scoring has no bound here: it holds no room on an engine, and the reward pool queues what its workers cannot take.

A lost attempt runs again elsewhere, with its seed, and goes on from the turns that its engine had finished (`recall`).
One asyncio task per trajectory, and one per engine that is being replaced. Whatever raises in a task ends `groups()`
with that exception and its traceback. No Ray here: engines are duck-typed handles whose awaits have deadlines.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import replace
from typing import Any

from actors.admission import Room
from actors.attempts import Attempt, Draw, Group
from actors.handles import CLOSE_S, EngineHandle, Publisher, Recall, Replace, within
from actors.replacement import Replacements
from aster.agent.ledger import Decision, Ledger, lost_trajectory
from aster.agent.rewards import RewardPool
from aster.agent.rollout import agent_loop
from aster.errors import CircuitOpen, ConfigError, EngineLost, RewardFailed
from aster.types import Cause, PromptRow, PublishReport, RolloutWork, Task, Trajectory, TrajectoryGroup

log = logging.getLogger(__name__)

_GRACE_S = 300.0  # an engine ends a late trajectory itself; this only catches one that does not
_CANCEL_S = 60.0
_RECALL_S = 60.0  # a file system that hangs


class EnginePool:
    """roles.RolloutPool over engine handles. All methods belong to one event loop; `close` ends the engines too."""

    def __init__(
        self,
        engines: Sequence[EngineHandle],
        *,
        rewards: RewardPool,
        publisher: Publisher | None = None,
        replace_engine: Replace | None = None,
        recall: Recall | None = None,
        max_retries: int = 1,
        max_infra_failed_rate: float = 0.5,
        max_staleness: int | None = None,
        run_name: str = "aster",
    ) -> None:
        """`recall`: where the next attempt at a lost trajectory goes on from; None = each begins afresh.
        `max_staleness`: training groups that began more than so many versions before the one that is published are
        given up; None = never."""
        names = [engine.name for engine in engines]
        if not engines or len(set(names)) != len(names):
            raise ConfigError(f"a pool needs engines of different names, got {names}")
        self.version = -1  # of the weights last published; -1 = those the engines started with
        self.ledger = Ledger(max_retries=max_retries, max_infra_failed_rate=max_infra_failed_rate)
        self._engines = list(engines)
        self._rewards = rewards
        self._publisher = publisher
        self._recall = recall
        self._replacements = Replacements(
            replace_engine, publisher=publisher, arrived=self._arrived, ended=self._replacement_ended
        )
        self._late: list[EngineHandle] = []  # replacements that wait for the next publication
        self._max_staleness = max_staleness
        self._coming: int | None = None  # version under publication
        self._draw = Draw(run_name)
        self._waiting: deque[Attempt] = deque()
        self._running: dict[asyncio.Task[None], tuple[Attempt, EngineHandle]] = {}
        self._seated: set[asyncio.Task[None]] = set()  # those that take room on their engine
        self._room = Room()
        self._open: dict[int, Group] = {}
        self._finished: asyncio.Queue[TrajectoryGroup | None] = asyncio.Queue()  # None wakes groups() to raise
        self._failure: BaseException | None = None
        self._draining = False
        self._closed = False

    @property
    def in_flight(self) -> int:
        """Trajectories on an engine or being scored."""
        return sum(len(attempt.tasks) for attempt, _ in self._running.values())

    @property
    def waiting(self) -> int:
        """Trajectories that no engine has had room for yet."""
        return sum(len(attempt.tasks) for attempt in self._waiting)

    @property
    def living(self) -> int:
        """Engines that are alive as far as anybody knows."""
        return sum(not engine.lost for engine in self._engines)

    def join(self, engine: EngineHandle) -> None:
        """Let another engine, a replacement perhaps, take work at once: it must hold the weights of `version`.

        An engine leaves by being `lost`. The publisher has to be told by whoever adds the engine; the pool does so for
        the replacements that it asks for itself.
        """
        if any(engine.name == other.name and not other.lost for other in self._engines):
            raise ConfigError(f"an engine named {engine.name!r} is alive in this pool already")
        self._engines = [other for other in self._engines if other.name != engine.name] + [engine]
        self._pull()

    def submit(self, work: RolloutWork) -> None:
        if self._closed or self._draining:
            raise RuntimeError("the pool is closed" if self._closed else "the pool is being drained")
        if work.group_size < 1:
            raise ValueError(f"group_size={work.group_size}: a group has at least one sample")
        self._expect(work)
        group = Group(work)
        self._open[id(group)] = group
        self.ledger.opened(work.kind, work.step, work.group_size)
        self._waiting.extend(self._draw.attempts(group))
        self._pull()

    async def groups(self) -> AsyncIterator[TrajectoryGroup]:
        """Endless, in order of completion. Raises the pool's own failure, now and whenever it is asked again."""
        while True:
            group = None if self._failure else await self._finished.get()
            if self._failure is not None:
                raise self._failure
            if group is not None:
                yield group

    async def publish(self, source: Any, version: int) -> PublishReport:
        """Hand version `version` of the weights to every engine. Raises what the publisher raises."""
        if self._failure is not None:
            raise self._failure
        if self._publisher is None:
            raise ConfigError("this pool was built without a publisher: its engines keep the weights they started with")
        # What starts from here on mostly waits at the engines' gates. A few tokens may come before these are shut; the
        # driver looks at tokens, and drops such a group itself.
        self._coming = version
        try:
            report = await self._deliver(self._publisher, source, version)
        finally:
            self._coming = None
            self._see_to_the_dead()
        self.version = version
        self._give_up_the_stale()
        late, self._late = self._late, []
        for engine in late:
            self.join(engine)
        return report

    async def _deliver(self, publisher: Publisher, source: Any, version: int) -> PublishReport:
        """Where every engine is dead and some are being replaced: once more when those are here."""
        while True:
            try:
                return await publisher.publish(source, version)
            except EngineLost:
                self._see_to_the_dead()
                if not self._replacements.under_way:
                    raise
                await asyncio.wait(self._replacements.under_way)  # each of its steps has a deadline

    async def drain(self) -> list[Trajectory]:
        """Stop everything and hand back what no group has delivered.

        That is: the partial trajectories (CANCELLED, whole turns only) and the finished ones of groups that are not
        complete. Work that had not begun is forgotten. The pool takes work again afterwards.
        """
        self._draining = True
        try:
            self._waiting.clear()
            await within(_CANCEL_S, "cancelling", {engine.name: engine.cancel_all() for engine in self._engines})
            if self._running:
                await asyncio.wait(self._running, timeout=_CANCEL_S)
            await self._cancel(self._running)
            unfinished = [t for group in self._open.values() for t in group.done.values()]
            self._open.clear()
            return unfinished
        finally:
            self._draining = False

    async def close(self) -> None:
        """Stop taking work, end the tasks, then the engines. Idempotent; what fails is logged, nothing is waited for
        without a deadline."""
        if self._closed:
            return
        self._closed = self._draining = True
        self._waiting.clear()
        await self._cancel(self._replacements.under_way)
        await self._cancel(self._running)
        self._engines += self._late
        await within(CLOSE_S, "closing", {engine.name: engine.close() for engine in self._engines})

    # the way of one trajectory ---------------------------------------------------------------------------------------

    def _expect(self, work: RolloutWork) -> None:
        """Raises `ConfigError` for a budget that no engine could ever hold."""
        need = work.budget.max_model_len
        capacities = [engine.kv_tokens for engine in self._engines if not engine.lost]
        if capacities and all(0 < tokens < need for tokens in capacities):
            raise ConfigError(
                f"a trajectory of kind {work.kind!r} may have budget.max_prompt_tokens={work.budget.max_prompt_tokens} "
                f"+ max_response_tokens={work.budget.max_response_tokens} = {need} tokens, and the largest KV cache of "
                f"an engine holds {max(capacities)}: lower the budget, or raise rollout.kv_cache_bytes, "
                "rollout.gpu_memory_utilization or rollout.tensor_parallel"
            )
        self._room.expect(work.kind, need)

    def _pull(self) -> None:
        """Give waiting attempts to engines with room, the emptiest first."""
        self._see_to_the_dead()
        alive = [engine for engine in self._engines if not engine.lost]
        if self._waiting and not alive:
            about_to_join = self._coming is not None and self._late
            if not self._replacements.under_way and not about_to_join:
                self._fail(CircuitOpen(self._nowhere_to_run()))
            return
        held: deque[Attempt] = deque()  # what only the engine it must avoid has room for
        while self._waiting and not self._failure:
            attempt = self._waiting.popleft()
            roomy = [e for e in alive if self._room.fits(e, attempt.group.work.kind)]
            others = [e for e in roomy if e.name != attempt.avoid] if len(alive) > 1 else roomy
            if others:
                self._start(attempt, min(others, key=self._room.share))
                continue
            held.append(attempt)
            if not roomy:
                break
        self._waiting.extendleft(reversed(held))

    def _nowhere_to_run(self) -> str:
        reasons = "; ".join(f"{engine.name}: {engine.lost}" for engine in self._engines)
        late = (
            f"; {len(self._late)} replacements wait for weights of which no copy is held (rollout.weight_rollback=true)"
            if self._late
            else ""
        )
        return f"every engine is dead, {len(self._waiting)} trajectories have nowhere to run: {reasons}{late}"

    def _start(self, attempt: Attempt, engine: EngineHandle) -> None:
        for _ in attempt.tasks:  # a tree may be more than what is free: the engine then queues its last leaves
            self._room.enter(engine.name, attempt.group.work.kind)
        if attempt.group.began is None:
            attempt.group.began = self.version if self._coming is None else self._coming
        running = asyncio.create_task(self._attempt(attempt, engine), name=f"{attempt.task.uid} on {engine.name}")
        self._running[running] = (attempt, engine)
        self._seated.add(running)
        running.add_done_callback(self._ended)

    def _ended(self, running: asyncio.Task[None]) -> None:
        self._leave(running)  # one that was cancelled before it ran has not
        attempt, _ = self._running.pop(running)
        given_up = id(attempt.group) not in self._open
        if running.cancelled():
            if not self._draining and not given_up:
                self._fail(RuntimeError(f"{running.get_name()} was cancelled, and not by the pool"))
        elif (error := running.exception()) is not None:
            self._fail(error)
        if not self._draining:
            self._pull()

    def _leave(self, running: asyncio.Task[None] | None) -> None:
        if running in self._seated:
            self._seated.remove(running)
            attempt, engine = self._running[running]
            for _ in attempt.tasks:
                self._room.leave(engine.name, attempt.group.work.kind)

    async def _attempt(self, attempt: Attempt, engine: EngineHandle) -> None:
        try:
            trajectories = await self._run(attempt.task, engine)
        finally:
            self._leave(asyncio.current_task())
        if not self._draining:
            self._pull()  # the engine has room while this one is being scored
        ended = []
        for trajectory in trajectories:
            if not trajectory.cause.is_ours:
                self._replacements.works()
                self._room.observe(attempt.group.work.kind, trajectory.num_tokens)
                trajectory = await self._score(trajectory, attempt.group.work.row)
            ended.append(trajectory)
        if self._settle(attempt, ended):
            await self._again(attempt, engine)

    async def _run(self, task: Task, engine: EngineHandle) -> Sequence[Trajectory]:
        limit = task.budget.trajectory_timeout_s + _GRACE_S
        try:
            if task.leaves:
                return await asyncio.wait_for(engine.run_tree(task), limit)
            return [await asyncio.wait_for(engine.run(task), limit)]
        except EngineLost as error:
            cause, why = Cause.ENGINE_LOST, str(error)
        except TimeoutError:
            cause, why = Cause.ENGINE_LOST, f"silent for {limit:g} s"
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is None or current.cancelling():
                raise
            cause, why = Cause.CANCELLED, "the engine dropped the trajectory"
        return [lost_trajectory(t, cause, why, engine=engine.name) for t in (task, *task.leaves)]

    async def _score(self, trajectory: Trajectory, row: PromptRow) -> Trajectory:
        """A verifier that dies is asked once more, in its successor: what hangs twice would hang elsewhere too."""
        try:
            return await self._scored(trajectory, row)
        except RewardFailed:
            pass  # policy: once more; the pool counts both, and the second one is the trajectory's cause
        try:
            return await self._scored(trajectory, row)
        except RewardFailed as error:
            return trajectory.failed(Cause.REWARD_FAILED, str(error))

    async def _scored(self, trajectory: Trajectory, row: PromptRow) -> Trajectory:
        """Raises `RewardFailed`."""
        reward = agent_loop(row.agent_name).reward
        asked = functools.partial(self._rewards.score_by, reward) if reward else self._rewards.score
        began = time.monotonic()
        scored = trajectory.with_reward(*await asked(trajectory.final_text, row.ground_truth))
        return replace(scored, timing=replace(scored.timing, score_s=time.monotonic() - began))

    def _settle(self, attempt: Attempt, trajectories: Sequence[Trajectory]) -> bool:
        """Book one ended attempt; complete its group if it was the last one missing. True: it has to run again.

        A tree runs again as a whole when one of its leaves has to; what is `lost` are the leaves that made it.
        """
        group, task = attempt.group, attempt.task
        work = group.work
        if id(group) not in self._open:  # given up
            return False
        if self._draining:
            group.done |= {t.sample: t for t in trajectories}
            return False
        decisions = []
        for t in trajectories:
            rerun = t.cause is not Cause.REWARD_FAILED  # it has been asked twice; the tokens are not at fault
            attempt_number = task.attempt if rerun else self.ledger.max_retries
            decisions.append(self.ledger.judge(t, kind=work.kind, step=work.step, attempt=attempt_number))
            if t.cause.is_ours:
                what = "again elsewhere" if decisions[-1] is Decision.RETRY else "masked"
                log.warning("%s: %s on %s, %s: %s", t.uid, t.cause, t.engine, what, t.error)
        if Decision.RETRY in decisions:
            group.lost += [t for t in trajectories if t.cause.is_ours]
            return True
        group.done |= {t.sample: t for t in trajectories}
        if group.is_complete:
            del self._open[id(group)]
            self._finished.put_nowait(group.finished())
        return False

    async def _again(self, attempt: Attempt, engine: EngineHandle) -> None:
        """Put a lost attempt first in line, with what is kept of its turns; those of a tree are not kept."""
        past = attempt.task.past
        if self._recall is not None and not attempt.task.leaves:
            try:
                past = await asyncio.wait_for(self._recall(attempt.task, engine.name), _RECALL_S)
            except TimeoutError:
                log.warning("%s: its finished turns were not read within %g s", attempt.task.uid, _RECALL_S)
        if id(attempt.group) in self._open and not self._draining:
            self._waiting.appendleft(attempt.again(avoid=engine.name, past=past))

    def _give_up_the_stale(self) -> None:
        """End the training groups from which no step can learn any more, so that their engines do something useful.

        By the version under which a group began: a driver that looks at its tokens may drop more of them. It comes home
        at once, all STALE, and is nobody's failure.
        """
        if self._max_staleness is None:
            return
        for group in list(self._open.values()):
            work = group.work
            if work.kind != "train" or group.began is None or group.began >= self.version - self._max_staleness:
                continue
            del self._open[id(group)]
            ours = {task.sample: task for attempt in self._waiting if attempt.group is group for task in attempt.tasks}
            self._waiting = deque(attempt for attempt in self._waiting if attempt.group is not group)
            for running, (attempt, _) in self._running.items():
                if attempt.group is group:
                    ours |= {task.sample: task for task in attempt.tasks}
                    running.cancel()
            why = f"began under version {group.began}, {self.version} is out, max_staleness={self._max_staleness}"
            stale = {sample: lost_trajectory(task, Cause.STALE, why) for sample, task in ours.items()}
            stale |= {sample: t.failed(Cause.STALE, why) for sample, t in group.done.items()}
            self.ledger.totals[Cause.STALE] += len(stale)
            log.warning("%s: %s", work.row.row_id, why)
            group.done = stale
            self._finished.put_nowait(group.finished())

    # engines that die ------------------------------------------------------------------------------------------------

    def _see_to_the_dead(self) -> None:
        if not self._closed and not self._failure:
            self._replacements.see_to(self._engines)

    def _arrived(self, dead: EngineHandle, engine: EngineHandle, is_current: bool) -> None:
        self._engines.remove(dead)
        if is_current:
            log.warning("%s takes the place of %s, with version %d", engine.name, dead.name, self.version)
            self.join(engine)
        else:
            self._late.append(engine)

    def _replacement_ended(self, error: BaseException | None) -> None:
        if error is not None:
            self._fail(error)
        elif not self._draining:
            self._pull()

    # failure and the end ---------------------------------------------------------------------------------------------

    def _fail(self, error: BaseException) -> None:
        """The first failure is the pool's; nothing new starts after it."""
        if self._failure is None:
            self._failure = error
            self._waiting.clear()
            self._finished.put_nowait(None)

    async def _cancel(self, which: Collection[asyncio.Task[None]]) -> None:
        tasks = list(which)
        for task in tasks:
            task.cancel()
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=_CANCEL_S)
            for task in late:
                log.error("%s did not end within %g s of its cancellation", task.get_name(), _CANCEL_S)
