"""Who is to blame: decides whether a trajectory counts, runs again or is masked, and when too much is broken to go on.

A trajectory that our infrastructure lost is never a wrong answer. It is run again elsewhere up to `max_retries` times
with the same seed, and then stays in its group without a reward. The pool asks; nothing here runs anything.
"""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from aster.errors import CircuitOpen
from aster.types import Cause, Task, Trajectory

_COMPONENT = {
    Cause.ENGINE_LOST: "the rollout engines",
    Cause.SANDBOX_LOST: "the sandbox service",
    Cause.REWARD_FAILED: "the verifier",
    Cause.CANCELLED: "something cancelled requests",
}
_SHOWN = 300  # characters of an error that a message repeats


class Decision(enum.Enum):
    KEEP = "keep"
    RETRY = "retry"
    MASK = "mask"


@dataclass
class _Window:
    """One rollout step of one kind."""

    trajectories: int = 0
    gone: set[str] = field(default_factory=set)  # uids: masked, or lost again after a retry and not back yet
    lost: Counter[tuple[Cause, str]] = field(default_factory=Counter)  # (cause, engine) -> attempts
    last: dict[Cause, str] = field(default_factory=dict)  # the newest error in the infrastructure's own words


@dataclass
class Ledger:
    """Blame per step. `opened` is called with each group's size, `judge` with each attempt that has ended."""

    max_retries: int = 1
    max_infra_failed_rate: float = 0.5
    totals: Counter[Cause] = field(default_factory=Counter)  # attempts by cause, over the whole run
    _windows: dict[tuple[str, int], _Window] = field(default_factory=dict)

    def opened(self, kind: str, step: int, trajectories: int) -> None:
        window = self._windows[kind, step] = self._windows.pop((kind, step), _Window())  # the newest is last
        window.trajectories += trajectories
        if len(self._windows) > _KEPT:
            del self._windows[next(iter(self._windows))]

    def judge(self, trajectory: Trajectory, *, kind: str, step: int, attempt: int) -> Decision:
        """What becomes of one attempt.

        Raises CircuitOpen when more than `max_infra_failed_rate` of the step's trajectories are lost: masked, or lost
        again after a retry. A first loss that is retried costs time and no trajectory, so it does not count: an engine
        that dies may take a whole step with it. What is broken for good loses the retries too, and these are first in
        line. Those still running count as not lost, so a few early failures of a large step do not stop it.
        """
        self.totals[trajectory.cause] += 1
        window = self._windows[kind, step]
        if not trajectory.cause.is_ours:
            window.gone.discard(trajectory.uid)
            return Decision.KEEP
        window.lost[trajectory.cause, trajectory.engine] += 1
        window.last[trajectory.cause] = trajectory.error
        decision = Decision.RETRY if attempt < self.max_retries else Decision.MASK
        if attempt or decision is Decision.MASK:
            window.gone.add(trajectory.uid)
        gone = len(window.gone)
        if gone > self.max_infra_failed_rate * window.trajectories:
            raise CircuitOpen(
                f"{kind} step {step}: {gone} of {window.trajectories} trajectories were lost by our own failures, "
                f"retries included, more than rollout.max_infra_failed_rate={self.max_infra_failed_rate:g} allows. "
                f"{_blame(window)}"
            )
        return decision


_KEPT = 128  # windows, of both kinds: a group may live for 2 * max_staleness + 2 steps, and that is at most 16


def lost_trajectory(task: Task, cause: Cause, error: str, *, engine: str = "") -> Trajectory:
    """The record of an attempt of which nothing came back."""
    empty = np.zeros(0, dtype=np.int32)
    return Trajectory(
        uid=task.uid,
        row_id=task.row_id,
        sample=task.sample,
        prompt_ids=empty,
        ids=empty,
        mask=np.zeros(0, dtype=bool),
        behaviour_logprobs=np.zeros(0, dtype=np.float32),
        versions=empty,
        turns=(),
        cause=cause,
        engine=engine,
        error=error,
    )


def _blame(window: _Window) -> str:
    """`Broken: the sandbox service (sandbox_lost 8: e0 5, e1 3; last: ...)`, the worst first."""
    causes: Counter[Cause] = Counter()
    for (cause, _), count in window.lost.items():
        causes[cause] += count
    parts = []
    for cause, count in causes.most_common():
        engines = ", ".join(
            f"{engine or 'no engine'} {n}" for (c, engine), n in window.lost.most_common() if c is cause
        )
        last = window.last[cause] or "no reason given"
        parts.append(f"{_COMPONENT.get(cause, 'ours')} ({cause} {count}: {engines}; last: {last[:_SHOWN]})")
    return "Broken: " + "; ".join(parts)
