"""When may sampling of a comparison stop? A boundary on the difference of two runs that may be looked at any time.

The question is about *these* problems: is the mean over them of the chance to be right the same for both runs? More
samples answer that; they say nothing about other problems, for which `intervals.paired_test` is there.

    z = (b - a) / s.e.      t = variance at the planned number of samples / variance so far, 0 < t <= 1
    decided when |z|·sqrt(t) >= c,   c = quantile of the normal at 1 - alpha/4

z·sqrt(t) is a Brownian motion at time t while both are equal, so by the reflection principle it ever leaves [-c, c]
before t = 1 with probability at most alpha, whatever the number and the spacing of the looks (O'Brien-Fleming's
boundary, for continuous looking). Legend: P problems · n samples of a problem so far.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np


@dataclass(frozen=True)
class Look:
    """One look at the data. `information` is t above; 1 = all planned samples are there."""

    difference: float  # b - a
    standard_error: float  # of sampling alone, the problems held fixed
    information: float
    boundary: float  # |difference| from which on it is decided
    decided: bool


def look(
    a_correct: np.ndarray,
    a_samples: np.ndarray,
    b_correct: np.ndarray,
    b_samples: np.ndarray,
    *,
    planned: int,
    alpha: float = 0.05,
) -> Look:
    """Counts [P] of both runs on the same problems; `planned` samples per problem is where sampling ends anyway.

    Every problem needs two samples in each run, else its variance is unknown (ValueError). The variance of either run
    is that within problems plus a quarter, so that a few agreeing samples do not make certainty.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha:g} is a chance of error: give one between 0 and 1")
    a_mean, a_now, a_end = _run(a_correct, a_samples, planned)
    b_mean, b_now, b_end = _run(b_correct, b_samples, planned)
    difference = b_mean - a_mean
    error = float(np.sqrt(a_now + b_now))
    information = min((a_end + b_end) / (a_now + b_now), 1.0)
    boundary = NormalDist().inv_cdf(1 - alpha / 4) * error / float(np.sqrt(information))
    return Look(difference, error, information, boundary, abs(difference) >= boundary)


def _run(correct: np.ndarray, samples: np.ndarray, planned: int) -> tuple[float, float, float]:
    """(mean over problems, its sampling variance now, the same with `planned` samples where there are fewer)."""
    c, n = np.asarray(correct, dtype=np.float64), np.asarray(samples, dtype=np.float64)
    if not len(n) or n.min() < 2:
        raise ValueError("a look needs two samples of every problem in each run")
    of_one = c * (n - c) / (n * (n - 1))  # unbiased p(1-p)
    floor = 0.25 / len(n)  # a quarter, spread over the problems
    scale = 1 / len(n) ** 2
    return (
        float((c / n).mean()),
        float(((of_one + floor) / n).sum() * scale),
        float(((of_one + floor) / np.maximum(n, planned)).sum() * scale),
    )
