"""What a run says about itself: `RunRecord` knows what is computed and written, `Recorder` does it beside the loop.

    the loop --put(job)--> at most `ahead` jobs wait --> one after the other, in a thread --> metrics, files, tracker
        ^                          |
        +------ put waits here ----+      back-pressure: a disk that is slower than the training slows it down

A step is one line of metrics.jsonl with all its values, written after its files; the seconds of its checkpoint and
its validation come in lines of their own. A job that raises is the last one: `broken` raises what it raised, with its
traceback, and so do `put` and `flush` from then on. The loop waits for `broken` in its task group, and so ends at once.
Nothing here decides about training.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np

from aster import metrics
from aster.algo.collapse import Advantage
from aster.algo.regions import Markers
from aster.algo.shaping import shaped_reward
from aster.config import Recipe
from aster.data.rollouts import Decode, DecodeOnce, write_rollouts, write_trajectories_parquet, write_validation
from aster.errors import AsterError
from aster.types import TrajectoryGroup

log = logging.getLogger(__name__)

_PATIENCE_S = 1800.0  # for a file system that hangs; a step's files are written in seconds
_SETTLE_S = 120.0


class Recorder:
    """Runs jobs one at a time in a thread, in the order of `put`. Belongs to one event loop."""

    def __init__(self, *, ahead: int = 2) -> None:
        self._room = asyncio.Semaphore(ahead)  # each waiting job holds the trajectories of a step
        self._last: asyncio.Task[None] | None = None
        self._broken: asyncio.Future[None] | None = None

    async def put(self, job: Callable[[], None]) -> None:
        """Run `job` after those before it. Returns at once unless too many wait."""
        await self._patiently(self._room.acquire(), "has room for no further one")
        self._raise()
        self._last = asyncio.create_task(self._after(self._last, job), name="a step's record")

    def so_far(self) -> Callable[[], Awaitable[None]]:
        """Call and await what this returns to wait for the jobs that were put until now, and no others."""
        last = self._last

        async def wait() -> None:
            if last is not None:
                await self._patiently(asyncio.shield(last), "is not done with the steps before")
                self._raise()

        return wait

    async def flush(self) -> None:
        """Until everything that was put is done."""
        await self.so_far()()

    async def broken(self) -> None:
        """For ever, or raises what a job raised."""
        await asyncio.shield(self._failure())

    async def settle(self) -> None:
        """At the end, however it came: what was put is still done, as far as it can be. Never raises."""
        if self._last is not None:
            _, late = await asyncio.wait({self._last}, timeout=_SETTLE_S)
            if late:
                log.error("the records of the last steps were not written within %g s", _SETTLE_S)

    async def _after(self, before: asyncio.Task[None] | None, job: Callable[[], None]) -> None:
        try:
            if before is not None:
                await before
            if not self._failure().done():
                await asyncio.to_thread(job)
        except Exception as error:  # policy: kept with its traceback, for whoever waits in `broken`, `put` or `flush`
            self._failure().set_exception(error)
        finally:
            self._room.release()

    def _failure(self) -> asyncio.Future[None]:
        if self._broken is None:
            self._broken = asyncio.get_running_loop().create_future()
        return self._broken

    def _raise(self) -> None:
        failure = self._failure()
        if failure.done():
            failure.result()

    async def _patiently(self, wait: Awaitable[object], what: str) -> None:
        try:
            async with asyncio.timeout(_PATIENCE_S):
                await wait
        except TimeoutError:
            raise AsterError(
                f"the writer of metrics and rollouts {what} after {_PATIENCE_S:g} s: is the disk gone?"
            ) from None


class Log(Protocol):
    """Where metrics go (`tracking.Tracker`)."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def event(self, step: int, kind: str, message: str) -> None: ...


@dataclass
class RolloutStep:
    """What one step of a run sampled, and what it found out while it learnt from it."""

    groups: Sequence[TrajectoryGroup]
    replaced: Sequence[TrajectoryGroup] = ()  # without variance, under dynamic sampling
    stale: Sequence[TrajectoryGroup] = ()  # it would have had them, were they not too old
    advantages: Mapping[str, Advantage] = field(default_factory=dict)  # by uid, of what it trains on
    gaps: Mapping[str, np.ndarray] = field(default_factory=dict)  # uid -> `stored_gap` of the response's tokens


class RunRecord:
    """The files, the metrics and the alarms of a run; one call at a time. Each trajectory is decoded once."""

    def __init__(self, recipe: Recipe, log: Log, decode: Decode, *, markers: Markers | None = None) -> None:
        self._recipe, self._log, self._decode, self._markers = recipe, log, decode, markers
        self._mismatched = False

    def step(
        self, number: int, step: RolloutStep, values: Mapping[str, float], *, seconds: Mapping[str, float]
    ) -> None:
        """Step `number` and what it taught (`values`; `seconds` by phase). The files hold the replaced groups too,
        since the filter counts all that was sampled; of the stale ones only the causes are counted."""
        began = time.monotonic()
        decode = DecodeOnce(self._decode, skip_special=True)
        budget = self._recipe.budget.max_response_tokens
        values = dict(values) | metrics.rollout_metrics(
            step.groups,
            others=[*step.replaced, *step.stale],
            advantages=step.advantages,
            reward=partial(shaped_reward, algo=self._recipe.algo, budget=budget),
            decode=decode.keep,
            markers=self._markers,
        )
        path = self._recipe.run.path
        kept = [*step.groups, *step.replaced]
        write_rollouts(path / "rollout_data", kept, step=number, decode=decode)
        write_trajectories_parquet(path / "trajectories", kept, step=number, gaps=step.gaps)
        values |= metrics.recall_metrics(kept) | self._timing(step.groups, seconds)
        values["training/replaced_groups"] = float(len(step.replaced))
        values["timing_s/record"] = time.monotonic() - began
        self._watch(number, values)
        self._log.log(number, values)

    def validation(self, step: int, groups: Sequence[TrajectoryGroup], *, seconds: float) -> None:
        decode = DecodeOnce(self._decode, skip_special=False)
        n = self._recipe.eval.samples
        values = metrics.validation_metrics(groups, n=n, decode=decode.keep, markers=self._markers)
        values["timing_s/testing"] = seconds
        write_validation(self._recipe.run.path / "val_rollout_data", groups, step=step, decode=decode)
        self._log.log(step, values)

    def note(self, step: int, values: Mapping[str, float]) -> None:
        """Values that are known later than the rest of the step."""
        self._log.log(step, values)

    def _timing(self, groups: Sequence[TrajectoryGroup], seconds: Mapping[str, float]) -> dict[str, float]:
        rollout, trajectories = self._recipe.rollout, [t for g in groups for t in g.trajectories]
        shared = self._recipe.cluster.placement == "colocated"  # engines then run on the learners' devices
        engines = 0 if shared else rollout.engines * rollout.tensor_parallel
        return metrics.timing_metrics(
            seconds,
            total_tokens=sum(t.num_tokens for t in trajectories),
            response_tokens=sum(len(t.ids) for t in trajectories),
            devices=self._recipe.learner.world_size + engines,
        )

    def _watch(self, step: int, values: dict[str, float]) -> None:
        """The alarm of `rollout.mismatch_alarm_k3`: one event when it goes on, one when it is over."""
        if "training/rollout_probs_diff_valid" not in values:  # no proximal pass, or no token of the learner's weights
            return
        limit = self._recipe.rollout.mismatch_alarm_k3
        k3 = values.get("training/mismatch_k3", math.nan)
        on = not (k3 <= limit and values["training/rollout_probs_diff_valid"])
        values["training/mismatch_alarm"] = float(on)
        if on and not self._mismatched:
            self._log.event(
                step,
                "mismatch",
                f"engine and learner disagree about the same tokens: k3 = {k3:.3g} nats, rollout.mismatch_alarm_k3="
                f"{limit:g}; pearson {values.get('training/rollout_actor_probs_pearson_corr', math.nan):.4f}, largest "
                f"difference of a probability {values.get('training/rollout_probs_diff_max', math.nan):.3g}"
                + ("" if values["training/rollout_probs_diff_valid"] else "; some log-probs are not finite"),
            )
        elif self._mismatched and not on:
            self._log.event(step, "mismatch_over", f"engine and learner agree again: k3 = {k3:.3g} nats")
        self._mismatched = on
