"""The learning rate as a pure function of the step number; resuming needs nothing but that number."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "cosine_with_min_lr", "linear"]


def warmup_length(*, total_steps: int, warmup_ratio: float, warmup_steps: int | None) -> int:
    """`warmup_steps` where given, else warmup_ratio * total_steps, rounded up."""
    return warmup_steps if warmup_steps is not None else math.ceil(warmup_ratio * total_steps)


def learning_rate(step: int, *, lr: float, min_lr: float, schedule: Schedule, warmup: int, total_steps: int) -> float:
    """The rate of optimizer step `step` (0-based).

    Step s of the warm-up uses lr * (s + 1) / warmup: the first step already moves, step warmup - 1 is at full rate.
    Then `constant` stays, the others go from lr (first step after the warm-up) towards min_lr, which the step past
    the last one would reach, and stay there.

    >>> [learning_rate(s, lr=1.0, min_lr=0.0, schedule="linear", warmup=2, total_steps=6) for s in range(7)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    if schedule == "constant":
        return lr
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    if schedule == "cosine_with_min_lr":
        return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * done))
    if schedule == "linear":
        return min_lr + (lr - min_lr) * (1.0 - done)
    raise ValueError(f"unknown schedule {schedule!r}: use constant, cosine_with_min_lr or linear")
