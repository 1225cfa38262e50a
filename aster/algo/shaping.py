"""What a reward becomes before advantages are taken, and which trajectories train: options, all off by default.

The paper's reward is the outcome alone. These are what others add to it, and act on the group's statistics.
"""

from __future__ import annotations

from collections.abc import Sequence

from aster.config import AlgoConfig
from aster.types import Cause, Trajectory

_OUT_OF_TOKENS = frozenset({Cause.MAX_TOKENS, Cause.OBSERVATION_OVERFLOW})


def overlong_penalty(response_tokens: int, *, budget: int, buffer: int, penalty: float) -> float:
    """0 up to `buffer` tokens before the budget, then linearly down to -penalty (DAPO, arXiv 2503.14476, eq. 13).

    >>> [overlong_penalty(n, budget=100, buffer=20, penalty=1.0) for n in (50, 80, 90, 100, 120)]
    [0.0, 0.0, -0.5, -1.0, -1.0]
    """
    beyond = response_tokens - (budget - buffer)
    return -penalty * min(1.0, beyond / buffer) if beyond > 0 else 0.0


def shaped_reward(trajectory: Trajectory, algo: AlgoConfig, *, budget: int) -> float:
    """The scored trajectory's reward with the soft penalty, where one is configured. `budget`: response tokens."""
    assert trajectory.reward is not None
    if algo.overlong_buffer_tokens is None:
        return trajectory.reward
    return trajectory.reward + overlong_penalty(
        len(trajectory.ids), budget=budget, buffer=algo.overlong_buffer_tokens, penalty=algo.overlong_penalty
    )


def is_trained(trajectory: Trajectory, algo: AlgoConfig) -> bool:
    """Whether its tokens enter the loss. One that ran out of tokens may be left out (overlong filtering, DAPO 3.4): it
    says little about whether its reasoning was wrong."""
    return bool(trajectory.mask.any()) and not (algo.overlong == "mask" and trajectory.cause in _OUT_OF_TOKENS)


def has_signal(trajectories: Sequence[Trajectory], algo: AlgoConfig, *, budget: int) -> bool:
    """Whether the scored trajectories of a group differ in reward, so that their advantages are not all zero."""
    return len({shaped_reward(t, algo, budget=budget) for t in trajectories}) > 1
