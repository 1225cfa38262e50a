"""What happened when, for Perfetto: wraps the driver's roles and writes what passes through them to `trace.json`.

    driver        step · publication (learner's side, engines' side) · validation
    learner       one track per rank: log-probs, forward and backward, optimizer step, checkpoint
    ENGINE        lanes of trajectories; inside each its turns (generate) and its calls (tool)
    sandbox NODE  lanes of the same calls, where they ran
    scoring       lanes of verdicts

A lane holds trajectories that do not overlap, so there are as many as ran at once. Trajectories and calls carry the
times of the process they ran in (clocks of several machines may differ), learner calls those of the driver: a
collective call occupies all ranks from the moment it is asked for until the slowest has answered.
Nothing is measured for the trace alone, and nothing of it decides anything. Writing 1,024 trajectories of 12 calls
costs the driver's thread about a second (`make bench-trace`), while they come home. A trace that cannot be written ends
with one warning, and the run goes on.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from aster.config import Recipe
from aster.roles import LearnerGroup, RolloutPool, WeightSource
from aster.trace_file import TRACE_FILE, TraceFile
from aster.types import (
    MicroBatch,
    OptimStats,
    PublishReport,
    RolloutWork,
    StepStats,
    TokenScores,
    Trajectory,
    TrajectoryGroup,
)

log = logging.getLogger(__name__)

T = TypeVar("T")
_REMEMBERED = 64  # newest intervals of a lane; older ones cannot overlap with what still comes home


class Lanes:
    """Numbers so that intervals under one number never overlap. Smallest free number first."""

    def __init__(self) -> None:
        self._taken: list[deque[tuple[float, float]]] = []

    def place(self, begin_s: float, end_s: float) -> str:
        for number, lane in enumerate(self._taken):
            if all(end_s <= b or e <= begin_s for b, e in lane):
                lane.append((begin_s, end_s))
                return f"lane {number}"
        self._taken.append(deque([(begin_s, end_s)], maxlen=_REMEMBERED))
        return f"lane {len(self._taken) - 1}"


class Tracer:
    """Spans of a run. `pool` and `learners` give the roles back, traced; `close` makes the file strict JSON.

    Without a file nothing is wrapped and nothing is written.
    """

    def __init__(self, file: TraceFile | None, *, every: int = 1) -> None:
        self.step = 1  # the step under way: the one after the last publication
        self._file = file
        self._every = every
        self._lanes: defaultdict[str, Lanes] = defaultdict(Lanes)
        self._broken = False

    @classmethod
    def open(cls, recipe: Recipe) -> Tracer:
        """In the run's directory, unless `run.trace_every=0`."""
        every = recipe.run.trace_every
        return cls(TraceFile(recipe.run.path / TRACE_FILE) if every else None, every=max(every, 1))

    def pool(self, pool: RolloutPool) -> RolloutPool:
        return TracedPool(pool, self) if self._file else pool

    def learners(self, learners: LearnerGroup) -> LearnerGroup:
        return TracedLearners(learners, self) if self._file else learners

    def __enter__(self) -> Tracer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def due(self, step: int) -> bool:
        """The first step, and every so many after it. Validation ahead of the first one carries step 0."""
        return not self._broken and (max(step, 1) - 1) % self._every == 0

    def span(self, process: str, thread: str, name: str, begin_s: float, end_s: float, **args: Any) -> None:
        self._guarded(lambda f: f.span(process, thread, name, begin_s=begin_s, seconds=end_s - begin_s, args=args))

    def group(self, group: TrajectoryGroup) -> None:
        """All attempts of a group that came home, those that were lost included."""
        if self.due(group.step):
            for trajectory in (*group.lost, *group.trajectories):
                self._trajectory(trajectory)

    def published(self, report: PublishReport, begin_s: float, end_s: float) -> None:
        """A publication and its phases, placed by the order in which they wait for each other."""
        if self.due(self.step):
            name = f"publish v{report.version}"
            args = {"bytes": report.bytes, "engines": report.engines, "canary_max_diff": report.canary_max_diff}
            self.span("driver", "publication", name, begin_s, end_s, **args)
            for side, phase, begin, end in phase_spans(report, begin_s):
                self.span("driver", f"publication: {side}", phase, begin, min(end, end_s))
        self.step = report.version + 1
        self._guarded(lambda file: file.flush())

    def close(self) -> None:
        self._guarded(lambda file: file.close())

    def _guarded(self, action: Callable[[TraceFile], None]) -> None:
        if self._file is None or self._broken:
            return
        try:
            action(self._file)
        except (OSError, ValueError) as error:  # policy: a full disk must not end a training for the sake of its trace
            self._broken = True
            log.warning("%s is not written any further: %s", self._file.path, error)

    def _trajectory(self, t: Trajectory) -> None:
        began = t.timing.began_unix
        if not began:  # it never ran, so there is nothing to draw
            return
        ended = began + t.timing.total_s
        engine = t.engine or "engine unknown"
        lane = self._lanes[engine].place(began, ended)
        args = {"uid": t.uid, "cause": t.cause.value, "reward": t.reward, "tokens": len(t.ids), "calls": len(t.calls)}
        self.span(engine, lane, f"{t.row_id} #{t.sample}", began, ended, **args)
        for number, turn in enumerate(t.turns):
            tokens = turn.stop - turn.start
            self.span(engine, lane, "generate", began + turn.began_s, began + turn.ended_s, turn=number, tokens=tokens)
            at = began + turn.ended_s
            for call in (turn.call, *turn.further_calls) if turn.call is not None else ():
                done = min(at + call.seconds, ended)  # waiting for room included
                self.span(engine, lane, "tool", at, done, status=call.status, queue_s=round(call.queue_s, 4))
                if call.seconds > 0:
                    node = f"sandbox {t.sandbox}" if t.sandbox else "sandbox"
                    ran = min(at + call.queue_s, done)
                    where = self._lanes[node].place(ran, done)
                    self.span(node, where, call.status, ran, done, uid=t.uid, turn=number)
                at = done
        if t.timing.score_s:
            where = self._lanes["scoring"].place(ended, ended + t.timing.score_s)
            self.span("scoring", where, "score", ended, ended + t.timing.score_s, uid=t.uid, pred=t.verdicts.pred[:40])


def phase_spans(report: PublishReport, begin_s: float) -> list[tuple[str, str, float, float]]:
    """(side, phase, begin, end) of a report's phases. Only their lengths are known; each begins when what it waits for
    has ended: send and receive after begin, canary after send, commit after receive, verify after both, then accept.

    >>> report = PublishReport(1, 0, 9.0, 1, phases={"begin": 1.0, "send": 2.0, "receive": 3.0, "verify": 0.5})
    >>> [(phase, begin, end) for _, phase, begin, end in phase_spans(report, 10.0)]
    [('begin', 10.0, 11.0), ('send', 11.0, 13.0), ('receive', 11.0, 14.0), ('verify', 14.0, 14.5)]
    """
    ended: dict[str, float] = {}
    spans = []
    for side, phase, awaited in (
        ("engines", "open", ()),
        ("engines", "begin", ("open",)),
        ("learner", "send", ("begin",)),
        ("engines", "receive", ("begin",)),
        ("learner", "canary", ("send",)),
        ("engines", "commit", ("receive",)),
        ("engines", "verify", ("canary", "commit", "receive", "send")),
        ("engines", "accept", ("verify",)),
    ):
        begin = max((ended.get(other, begin_s) for other in awaited), default=begin_s)
        ended[phase] = begin + report.phases.get(phase, 0.0)
        if phase in report.phases:
            spans.append((side, phase, begin, ended[phase]))
    return spans


class TracedPool:
    """`roles.RolloutPool` around another one."""

    def __init__(self, pool: RolloutPool, tracer: Tracer) -> None:
        self._pool = pool
        self._tracer = tracer
        self._step_began: float | None = None  # before the first publication no step is under way
        self._validation: tuple[int, float] | None = None  # groups that are out, since when

    def submit(self, work: RolloutWork) -> None:
        self._pool.submit(work)
        if work.kind == "val":
            out, since = self._validation or (0, time.time())
            self._validation = out + 1, since

    async def groups(self) -> AsyncIterator[TrajectoryGroup]:
        async for group in self._pool.groups():
            self._tracer.group(group)
            if group.kind == "val" and self._validation is not None:
                out, since = self._validation
                self._validation = (out - 1, since) if out > 1 else None
                if self._validation is None:
                    self._tracer.span("driver", "validation", f"validation at step {group.step}", since, time.time())
            yield group

    async def publish(self, source: WeightSource, version: int) -> PublishReport:
        began = time.time()
        report = await self._pool.publish(source, version)
        done, step = time.time(), self._tracer.step
        # After a restart or a roll-back a publication ends no step: it gives the engines what the learners loaded.
        if self._step_began is not None and version == step and self._tracer.due(step):
            self._tracer.span("driver", "step", f"step {step}", self._step_began, done)
        self._step_began = done
        self._tracer.published(report, began, done)
        return report

    async def drain(self) -> list[Trajectory]:
        return await self._pool.drain()

    async def close(self) -> None:
        await self._pool.close()

    def __getattr__(self, name: str) -> Any:
        """What a pool has beyond the role (`in_flight`, `version`)."""
        return getattr(self._pool, name)


class TracedLearners:
    """`roles.LearnerGroup` around another one."""

    def __init__(self, learners: LearnerGroup, tracer: Tracer) -> None:
        self._learners = learners
        self._tracer = tracer
        self.dp_size = learners.dp_size

    async def log_probs(
        self, microbatch_per_rank: Sequence[MicroBatch], *, reference: bool = False
    ) -> list[TokenScores]:
        call = self._learners.log_probs(microbatch_per_rank, reference=reference)
        return await self._on_ranks("reference log-probs" if reference else "log-probs", call, microbatch_per_rank)

    async def forward_backward(
        self, microbatch_per_rank: Sequence[MicroBatch], *, num_loss_tokens: int, num_groups: int
    ) -> StepStats:
        call = self._learners.forward_backward(
            microbatch_per_rank, num_loss_tokens=num_loss_tokens, num_groups=num_groups
        )
        return await self._on_ranks("forward, backward", call, microbatch_per_rank)

    async def optim_step(self) -> OptimStats:
        return await self._on_ranks("optimizer step", self._learners.optim_step())

    def weight_source(self) -> WeightSource:
        return self._learners.weight_source()

    async def save(self, path: str) -> None:
        await self._on_ranks("checkpoint: copy", self._learners.save(path))

    async def saved(self) -> None:
        began = time.time()
        await self._learners.saved()
        self._tracer.span("learner", "checkpoint: files", "checkpoint: files", began, time.time())

    async def load(self, path: str) -> int:
        return await self._on_ranks("checkpoint: load", self._learners.load(path))

    def __getattr__(self, name: str) -> Any:
        """What a gang has beyond the role."""
        return getattr(self._learners, name)

    async def _on_ranks(self, name: str, call: Awaitable[T], rows: Sequence[MicroBatch] = ()) -> T:
        began = time.time()
        result = await call
        done = time.time()
        if self._tracer.due(self._tracer.step):
            for rank in range(self.dp_size):
                args = {"tokens": len(rows[rank].labels), "sequences": len(rows[rank].sample_index)} if rows else {}
                self._tracer.span("learner", f"rank {rank}", name, began, done, **args)
        return result
