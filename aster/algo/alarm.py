"""The alarm of the collapse monitor: is the use of the tool dying, and since when?

It reads a step's `collapse_metrics` and only says so; `guard` may be told to act on it. What a reader finds of it in
metrics.jsonl, the terminal, TensorBoard, W&B and Prometheus alike:

    collapse/alarm        1.0 while a rule of the alarm holds, else 0.0; on every line that has collapse/calls_mean
    collapse/calls_ema    the moving average that the first rule looks at
    event "collapse"      a rule began to hold; the message says which and names the values
    event "collapse_over" none holds any more
    event "rollback"      the run went back to a checkpoint; the next steps of the file repeat its step numbers
    event "rollback_impossible"   it was to go back and there was no healthy checkpoint
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class CollapseAlarm:
    """Remembers where calls began. On while the moving average of calls per trajectory is below `max_drop` of its first
    value, or the collapse ratio is above `max_ratio`."""

    first_calls: float | None = None
    ema_calls: float | None = None
    decay: float = 0.9
    max_drop: float = 0.5
    max_ratio: float = 0.3

    def observe(self, values: Mapping[str, float], *, prefix: str = "collapse") -> tuple[CollapseAlarm, dict[str, str]]:
        """The next state, and `{rule: what it says}` of the rules that are on. Takes a step's `collapse_metrics`."""
        calls, ratio = values.get(f"{prefix}/calls_mean"), values.get(f"{prefix}/ratio")
        if calls is None or ratio is None:  # a step without a scored trajectory says nothing
            return self, {}
        first = calls if self.first_calls is None else self.first_calls
        ema: float = calls if self.ema_calls is None else self.decay * self.ema_calls + (1 - self.decay) * calls
        reasons: dict[str, str] = {}
        if ema < self.max_drop * first:
            reasons["calls_dropped"] = (
                f"calls per trajectory fell to {ema:.2f} (moving average), below {self.max_drop:.0%} of {first:.2f}"
            )
        if ratio > self.max_ratio:
            reasons["few_calls"] = f"{ratio:.0%} of trajectories make at most one call, above {self.max_ratio:.0%}"
        return replace(self, first_calls=first, ema_calls=ema), reasons


@dataclass(frozen=True)
class Watched:
    """What the alarm knew after one step; `since` is the step at which the spell that it is in began."""

    step: int
    alarm: CollapseAlarm
    reasons: Mapping[str, str]
    since: int | None


@dataclass
class AlarmWatch:
    """The alarm over a run that may take a step again, after a restart or a roll-back.

    A step number that was seen before takes the watch back to where it stood ahead of that step, so that no step counts
    twice and what was rolled back is forgotten.
    """

    alarm: CollapseAlarm = field(default_factory=CollapseAlarm)
    past: list[Watched] = field(default_factory=list)

    def observe(self, step: int, values: Mapping[str, float]) -> Watched | None:
        """None where `values` say nothing about calls."""
        if "collapse/calls_mean" not in values:
            return None
        while self.past and self.past[-1].step >= step:
            self.past.pop()
        before = self.past[-1] if self.past else None
        alarm, reasons = (before.alarm if before else self.alarm).observe(values)
        begun = before.since if before and before.since is not None else step
        seen = Watched(step, alarm, reasons, begun if reasons else None)
        self.past.append(seen)
        return seen

    @property
    def since(self) -> int | None:
        """First step of the spell that the alarm is in; None while it is off."""
        return self.past[-1].since if self.past else None
