"""How sure we may be of an accuracy: pass@k, majority vote, intervals over problems, paired comparison. Seeded numpy.

Every score here is a mean over problems of one number in [0, 1] per problem (avg@n, pass@k, maj@n, worst@k), so one
interval serves all: `mean_interval`. It speaks about other problems like these, and the noise of sampling is inside,
since a problem's number already carries it. `bootstrap_mean` with `over="samples"` speaks about this very set.

Legend: P problems · G samples of a problem (may differ from problem to problem) · B bootstrap resamples.
Not here: which verdict counts as correct (that is `metrics`), and any reading of files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

Resample = Literal["problems", "samples", "both"]
"""What is drawn again: `problems` speaks about other problems like these, `samples` about this very set sampled again,
`both` does the one and then the other. A problem's mean already carries its sampling noise, so `both` is the widest and
errs on the careful side."""

_CELLS_AT_ONCE = 2_000_000  # B x P x G numbers held in memory at once


@dataclass(frozen=True)
class Interval:
    """A mean with its interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedDifference:
    """`b - a` on the same problems. `p_value` is two-sided, never below 1 / (B + 1)."""

    mean: float
    low: float
    high: float
    p_value: float
    problems: int


def pass_at_k(correct: np.ndarray, samples: np.ndarray, *, k: int | np.ndarray) -> np.ndarray:
    """Chance that at least one of k samples, drawn without replacement, is correct: 1 - C(n-c, k) / C(n, k).

    correct, samples: [P] counts c and n; k may be [P] too. Unbiased (Chen et al. 2021, eq. 1). ValueError when
    some n < k.

    >>> pass_at_k(np.array([1]), np.array([4]), k=2)   # 1 - C(3,2)/C(4,2) = 1 - 3/6
    array([0.5])
    """
    return 1.0 - _all_from(np.asarray(samples) - np.asarray(correct), np.asarray(samples), k)


def all_at_k(correct: np.ndarray, samples: np.ndarray, *, k: int | np.ndarray) -> np.ndarray:
    """Chance that all of k samples are correct (`worst@k`): C(c, k) / C(n, k).

    >>> all_at_k(np.array([3]), np.array([4]), k=2)   # C(3,2)/C(4,2) = 3/6
    array([0.5])
    """
    return _all_from(np.asarray(correct), np.asarray(samples), k)


def _all_from(hits: np.ndarray, samples: np.ndarray, k: int | np.ndarray) -> np.ndarray:
    """C(hits, k) / C(samples, k) as a product, so that no factorial overflows."""
    k_P = np.broadcast_to(k, samples.shape)
    if (k_P < 1).any() or (samples < k_P).any():
        raise ValueError(f"k={k} samples cannot be drawn from {int(samples.min())}: use 1 <= k <= samples")
    i = np.arange(k_P.max(initial=0))
    drawn = i < k_P[:, None]
    factors = np.divide(hits[:, None] - i, samples[:, None] - i, out=np.ones(drawn.shape), where=drawn)
    return np.clip(factors, 0.0, None).prod(axis=1)


def majority(answers: Sequence[str | None], correct: Sequence[bool]) -> float:
    """Is the most frequent answer correct? Samples without an answer ("" or None) abstain.

    Ties share the vote; verdicts that differ under one spelling are averaged. All abstain: 0.

    >>> majority(["7", "7", "8", None], [True, True, False, False])
    1.0
    >>> majority(["7", "8"], [True, False])
    0.5
    """
    votes: dict[str, list[bool]] = {}
    for answer, ok in zip(answers, correct, strict=True):
        if answer:
            votes.setdefault(answer, []).append(bool(ok))
    if not votes:
        return 0.0
    top = max(len(v) for v in votes.values())
    winners = [sum(v) / len(v) for v in votes.values() if len(v) == top]
    return sum(winners) / len(winners)


def majority_at_k(
    answers: Sequence[str | None], correct: Sequence[bool], *, k: int, draws: int = 200, seed: int = 0
) -> float:
    """Mean `majority` over subsets of k samples; exact for k = G, else over `draws` seeded subsets."""
    n = len(answers)
    if not 1 <= k <= n:
        raise ValueError(f"k={k} samples cannot be drawn from {n}: use 1 <= k <= {n}")
    if k == n:
        return majority(answers, correct)
    rng = np.random.default_rng(seed)
    total = 0.0
    for _ in range(draws):
        chosen = rng.choice(n, size=k, replace=False)
        total += majority([answers[i] for i in chosen], [correct[i] for i in chosen])
    return total / draws


def mean_interval(values_P: Sequence[float] | np.ndarray, *, level: float = 0.95) -> Interval:
    """Interval of the mean of one number in [0, 1] per problem; never of width zero, never outside [0, 1].

    Wilson's score interval with Student's quantile, at the number of coin flips that would vary as much as the numbers
    do (Korn and Graubard 1998 for surveys): P·m(1-m)/s². Where less than about one problem's worth of mass lies on one
    side, s² is not known from the data, and the design effect goes over to that of coin flips. Coverage at 95 % and
    n = 16 (tests): 92 to 98 % for avg@n with 30 problems, 93 to 97 % with 200; the wide side is erred on near 0 and 1.

    >>> interval = mean_interval([1.0] * 30)   # 30 right answers are no proof of 100 %
    >>> interval.mean, round(interval.low, 2), interval.high
    (1.0, 0.88, 1.0)
    """
    values = np.asarray(values_P, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"need one number per problem, got shape {values.shape}")
    if values.min() < 0 or values.max() > 1:
        raise ValueError(f"scores lie in [0, 1], got {values.min():g} to {values.max():g}")
    low, high = score_bounds(values[None], level=level)
    return Interval(float(values.mean()), float(low[0]), float(high[0]))


def score_bounds(values_SP: np.ndarray, *, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """`mean_interval` of S data sets at once: (low [S], high [S])."""
    problems = values_SP.shape[1]
    mean = values_SP.mean(axis=1)
    flips = mean * (1 - mean)
    spread = values_SP.var(axis=1, ddof=1) if problems > 1 else flips
    effect = np.divide(spread, flips, out=np.ones_like(mean), where=flips > 0)
    doubt = 1 / (1 + 2 * (problems * np.minimum(mean, 1 - mean)) ** 3)
    size = problems / np.maximum(effect * (1 - doubt) + doubt, 1e-9)
    t = _student(level, problems - 1)
    centre = (mean + t * t / (2 * size)) / (1 + t * t / size)
    half = t / (1 + t * t / size) * np.sqrt(flips / size + t * t / (4 * size * size))
    return np.clip(centre - half, 0.0, mean), np.clip(centre + half, mean, 1.0)


def _student(level: float, degrees: int) -> float:
    """Two-sided Student quantile by its expansion around the normal (Hill 1970); within 0.3 % from 5 degrees on.

    One problem has no degrees of freedom: the normal quantile then, since coin flips know their own variance.
    """
    z = NormalDist().inv_cdf(0.5 + level / 2)
    if degrees < 1:
        return z
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3


def paired_test(
    a_P: Sequence[float] | np.ndarray,
    b_P: Sequence[float] | np.ndarray,
    *,
    level: float = 0.95,
    flips: int = 10_000,
    seed: int = 0,
) -> PairedDifference:
    """Two runs on the same problems, one number per problem and run. Are they equally good on problems like these?

    p_value: sign flips of the differences, exact up to Monte-Carlo where neither run is better on a problem chosen at
    random (each problem's difference is then as likely the other way round). low and high: Student's interval.
    """
    a, b = np.asarray(a_P, dtype=np.float64), np.asarray(b_P, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"paired runs need the same problems, one number each; got {a.shape} and {b.shape}")
    difference = b - a
    mean, problems = float(difference.mean()), len(difference)
    error = float(difference.std(ddof=1)) / np.sqrt(problems) if problems > 1 else 1.0
    half = _student(level, problems - 1) * float(error)
    signs = np.random.default_rng(seed).integers(0, 2, size=(flips, problems), dtype=np.int8) * 2 - 1
    as_far = int((np.abs(signs @ difference) >= abs(difference.sum()) - 1e-9).sum())
    return PairedDifference(
        mean=mean,
        low=max(mean - half, -1.0),
        high=min(mean + half, 1.0),
        p_value=(as_far + 1) / (flips + 1),
        problems=problems,
    )


def bootstrap_mean(
    scores_PG: Sequence[Sequence[float] | np.ndarray],
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    over: Resample = "both",
) -> Interval:
    """Interval of the mean over problems of the mean over samples. Rows may differ in length, none may be empty."""
    table, counts = _padded(scores_PG)
    means_B = _resampled_means(table, counts, resamples=resamples, seed=seed, over=over)
    low, high = np.quantile(means_B, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(_row_means(table, counts).mean()), float(low), float(high))


def _padded(scores_PG: Sequence[Sequence[float] | np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """([P, max G] zero-padded, [P] lengths)."""
    counts = np.array([len(row) for row in scores_PG], dtype=np.int64)
    if not len(counts) or counts.min() == 0:
        raise ValueError(f"need at least one problem and one sample of each, got lengths {counts.tolist()[:10]}")
    table = np.zeros((len(counts), int(counts.max())))
    for row, values in zip(table, scores_PG, strict=True):
        row[: len(values)] = values
    return table, counts


def _row_means(table: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return table.sum(axis=1) / counts


def _resampled_means(table: np.ndarray, counts: np.ndarray, *, resamples: int, seed: int, over: Resample) -> np.ndarray:
    """[B] means. Two generators, so that paired calls with one seed draw the same problems."""
    problems, width = table.shape
    problem_rng = np.random.default_rng([seed, 0])
    sample_rng = np.random.default_rng([seed, 1, 0])
    means = _row_means(table, counts)
    used = np.arange(width) < counts[:, None]
    out = np.empty(resamples)
    chunk = max(1, _CELLS_AT_ONCE // (problems * width))
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        if over == "samples":
            rows = np.broadcast_to(np.arange(problems), (size, problems))
        else:
            rows = problem_rng.integers(problems, size=(size, problems))
        if over == "problems":
            out[start : start + size] = means[rows].mean(axis=1)
            continue
        draw = (sample_rng.random((size, problems, width)) * counts[rows][..., None]).astype(np.int64)
        values = np.take_along_axis(table[rows], draw, axis=2) * used[rows]
        out[start : start + size] = (values.sum(axis=2) / counts[rows]).mean(axis=1)
    return out
