"""How far the learner's log-probs are from those that the engine recorded, as the files of a step keep it. Numpy only.

`behaviour` is what the engine recorded when it sampled, `old` what the learner computes for the same tokens under
the same weights. With equal numerics they agree; the distance is the price of two implementations or of staleness.
"""

from __future__ import annotations

import numpy as np

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
