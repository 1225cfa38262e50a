"""How far two log-prob streams of the same tokens are apart: importance weights and mismatch estimates. Numpy only.

`behaviour` is what the engine recorded when it sampled, `old` what the learner computes for the same tokens under
the same weights. With equal numerics they agree; the distance is the price of two implementations or of staleness.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_MAX_LOG_RATIO = 20.0  # exp() must not overflow


@dataclass(frozen=True)
class Mismatch:
    """Token means over the mask; nats unless said. All zero for an empty mask."""

    tokens: int
    k1: float  # mean(behaviour - old): estimates KL(behaviour || old), unbiased, noisy, may be negative
    k3: float  # mean(exp(d) - 1 - d), d = old - behaviour: never negative, low variance
    mean_abs: float
    max_abs: float
    mean_ratio: float  # mean exp(old - behaviour), 1 for equal policies
    pearson: float  # correlation of the probabilities; 1.0 where it is undefined and the streams agree


def tis_weights(old: np.ndarray, behaviour: np.ndarray, *, cap: float) -> np.ndarray:
    """min(exp(old - behaviour), cap), the truncated importance weights of `algo.tis_cap`; no lower bound."""
    return np.minimum(np.exp(np.clip(old - behaviour, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)), cap)


def k1(logp: np.ndarray, ref: np.ndarray) -> np.ndarray:
    """Schulman's k1 per token, logp - ref: its mean under samples of logp estimates KL(logp || ref)."""
    return logp - ref


def k3(logp: np.ndarray, ref: np.ndarray) -> np.ndarray:
    """Schulman's k3 per token, exp(ref - logp) - (ref - logp) - 1: the same estimate, never negative."""
    gap = np.clip(ref - logp, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return np.expm1(gap) - gap


def mismatch(behaviour: np.ndarray, old: np.ndarray, mask: np.ndarray) -> Mismatch:
    """Compare two aligned log-prob arrays under a boolean mask of the same shape."""
    b = np.asarray(behaviour, dtype=np.float64)[mask]
    o = np.asarray(old, dtype=np.float64)[mask]
    if len(b) == 0:
        return Mismatch(0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0)
    gap = np.abs(o - b)
    return Mismatch(
        tokens=len(b),
        k1=float(k1(b, o).mean()),
        k3=float(k3(b, o).mean()),
        mean_abs=float(gap.mean()),
        max_abs=float(gap.max()),
        mean_ratio=float(np.exp(np.clip(o - b, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)).mean()),
        pearson=_pearson(np.exp(b), np.exp(o)),
    )


GAP_UNIT = 0.01  # nats
_MOST_GAP = 127  # int8


def stored_gap(old: np.ndarray, behaviour: np.ndarray) -> np.ndarray:
    """old - behaviour of each token in units of GAP_UNIT, int8, for the files: a fourth of a float, mostly zeros. What
    lies beyond 1.27 nats, or is no number, reads 1.27.

    >>> stored_gap(np.array([-1.0, -2.0, -0.5]), np.array([-1.0, -1.5, -9.0]))
    array([  0, -50, 127], dtype=int8)
    """
    units = np.rint((np.asarray(old, np.float64) - np.asarray(behaviour, np.float64)) / GAP_UNIT)
    return np.clip(np.nan_to_num(units, nan=_MOST_GAP), -_MOST_GAP, _MOST_GAP).astype(np.int8)


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 0 else 1.0
