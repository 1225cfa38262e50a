"""Group-relative advantages (GRPO, arXiv 2402.03300), a function of rewards; which trajectories count, the caller says.

Shape legend: G scored trajectories of a group, the leaves of its trees · D segments of a leaf's path, D - 1 splits.
"""

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


def tree_advantages(
    rewards_G: np.ndarray, paths_GD: np.ndarray, *, scale_by_std: bool = True, eps: float = STD_EPS
) -> np.ndarray:
    """The advantage of each segment of each leaf of a group's trees, float64 [G, D].

    `paths_GD[i, j]` names the node that segment j of leaf i leads to: column 0 the tree, column D - 1 the leaf itself
    (`tree_paths`). A node's value V is the mean of its children's, a leaf's its reward, so V estimates the return from
    the node by sampling on from it (VinePPO, arXiv 2410.01679). Segment j leads from a node p with n children to one
    of them, c. Its baseline is the mean of the *other* children, which the choice of c cannot have changed, so the
    policy gradient stays unbiased (leave one out, as RLOO, arXiv 2402.14740):

        A = (G - 1) / G · (V(c) - mean of V over the n - 1 siblings of c)
          = (G - 1) / G · n / (n - 1) · (V(c) - V(p)),      divided by std + eps of all leaves' rewards (ddof = 1)

    The factor (G - 1) / G is what GRPO's own mean, which includes the sample itself, makes of the gradient: so all
    segments have the same scale, and without splits (D = 1) this is `group_advantages`. A node without siblings has
    advantage 0. Every token takes its segment's value in every leaf that holds it.

    Two trees with two leaves each, one right answer; G = 4, std = 0.5:

    >>> tree_advantages(np.array([1.0, 0, 0, 0]), tree_paths(np.arange(4), factor=2, splits=1)).round(3)
    array([[ 0.75,  1.5 ],
           [ 0.75, -1.5 ],
           [-0.75,  0.  ],
           [-0.75,  0.  ]])
    """
    rewards, paths = np.asarray(rewards_G, dtype=np.float64), np.asarray(paths_GD)
    group_advantages(rewards)  # for its complaints
    if paths.shape[:1] != rewards.shape:
        raise ValueError(f"paths of shape {paths.shape} do not belong to {len(rewards)} rewards")
    G, D = paths.shape
    if (rewards == rewards[:1]).all() and G > 1:
        return np.zeros((G, D))
    values_GD = np.empty((G, D))  # V(c) of each segment
    values_GD[:, -1] = rewards
    advantages = np.empty((G, D))
    for j in reversed(range(D)):
        parents = paths[:, j - 1] if j else np.zeros(G, dtype=paths.dtype)
        for parent in np.unique(parents):
            below = np.flatnonzero(parents == parent)
            _, first, child_of = np.unique(paths[below, j], return_index=True, return_inverse=True)
            children = values_GD[below[first], j]
            n, value = len(children), children.mean()
            advantages[below, j] = (children - value)[child_of] * (n / (n - 1) if n > 1 else 0.0)
            if j:
                values_GD[below, j - 1] = value
    advantages *= (G - 1) / G
    return advantages / (rewards.std(ddof=1) + eps) if scale_by_std and G > 1 else advantages


def tree_paths(samples_G: np.ndarray, *, factor: int, splits: int) -> np.ndarray:
    """Nodes on the way to each leaf, int64 [G, splits + 1]; a tree's leaves have consecutive numbers.

    >>> tree_paths(np.array([0, 1, 2, 3, 5]), factor=2, splits=1).tolist()
    [[0, 0], [0, 1], [1, 2], [1, 3], [2, 5]]
    """
    strides = factor ** np.arange(splits, -1, -1, dtype=np.int64)
    return np.asarray(samples_G, dtype=np.int64)[:, None] // strides
