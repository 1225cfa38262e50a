"""Group-relative advantages (GRPO, spec 1.1), a function of rewards. Which trajectories count, the caller decides."""

from __future__ import annotations

import numpy as np

STD_EPS = 1e-6  # the reference's guard; a group without variance has numerator 0 and so advantage 0


def group_advantages(rewards_G: np.ndarray, *, scale_by_std: bool = True, eps: float = STD_EPS) -> np.ndarray:
    """A_i = (R_i - mean) / (std + eps) with the sample standard deviation (ddof=1); float64 [G].

    A group of one has mean 0 and std 1, so A = R / (1 + eps). A group without variance gives exact zeros.
    `scale_by_std=False` leaves the division out (Dr.GRPO). Give only scored trajectories: one that the
    infrastructure lost has no reward and must be in nobody's mean. Raises ValueError on a reward that is not finite.

    >>> group_advantages(np.array([1.0, 0, 0, 0, 0, 0, 0, 0])).round(4)[:2].tolist()
    [2.4749, -0.3536]
    """
    rewards = np.asarray(rewards_G, dtype=np.float64)
    if rewards.ndim != 1:
        raise ValueError(f"rewards of one group must be one-dimensional, got shape {rewards.shape}")
    if not np.isfinite(rewards).all():
        raise ValueError(f"rewards must be finite, got {rewards.tolist()}: leave unscored trajectories out")
    if len(rewards) <= 1:
        return rewards / (1.0 + eps) if scale_by_std else rewards.copy()
    if (rewards == rewards[0]).all():
        return np.zeros_like(rewards)  # the mean of equal floats need not equal them; 0 must be 0
    centred = rewards - rewards.mean()
    return centred / (rewards.std(ddof=1) + eps) if scale_by_std else centred
