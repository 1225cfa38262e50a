"""Exceptions that carry a policy: what the caller may do about them is part of the class.

Two kinds exist. *This request failed* (`SandboxLost`, `EngineLost`, `RewardFailed`, `BackPressure`): the trajectory
ends with a cause that is ours and may be retried elsewhere. *This component is dead* (`GangFailure`,
`CircuitOpen`): the run stops. Every argument goes to `super().__init__`, so that the exception survives pickling
through Ray and `except SandboxLost` still matches on the other side.
"""

from __future__ import annotations


class AsterError(Exception):
    """Base of all errors that Aster raises on purpose."""


class ConfigError(AsterError, ValueError):
    """What the user wrote cannot be run; the message names the key, the value and the cure."""


class DataError(AsterError, ValueError):
    """A file that was handed in cannot be used; the message names the file, the row and the cure."""


class TemplateError(AsterError, ValueError):
    """The model directory's chat template cannot carry tools."""


class SandboxError(AsterError):
    """A sandbox call failed for a reason that is not the model's."""


class SandboxLost(SandboxError):
    """The session is gone (node, replica or cell died); its state cannot be trusted. Never retried in place."""

    def __init__(self, session_id: str, reason: str) -> None:
        super().__init__(session_id, reason)
        self.session_id = session_id
        self.reason = reason

    def __str__(self) -> str:
        return f"sandbox session {self.session_id or '(not opened)'} lost: {self.reason}"


class BackPressure(SandboxError):
    """The sandbox service is full. Nothing ran; the caller may try again after `retry_after_s`."""

    def __init__(self, retry_after_s: float, reason: str) -> None:
        super().__init__(retry_after_s, reason)
        self.retry_after_s = retry_after_s
        self.reason = reason

    def __str__(self) -> str:
        return f"sandbox is full ({self.reason}); retry after {self.retry_after_s:g} s"


class EngineLost(AsterError):
    """The rollout engine died or did not answer within its deadline; the trajectory may be run elsewhere."""


class RewardFailed(AsterError):
    """The verifier crashed or hung on this answer; the trajectory has no reward (it is not a wrong answer)."""


class CollapseStopped(AsterError):
    """`collapse.on_alarm` ended the run; the message says since which step the alarm is on, and what is left to use."""


class GangFailure(AsterError):
    """A learner rank is dead, which ends the run: NCCL and gloo cannot heal. Started again, it resumes from the newest
    checkpoint."""

    def __init__(self, rank: int, cause: str) -> None:
        super().__init__(rank, cause)
        self.rank = rank
        self.cause = cause

    def __str__(self) -> str:
        return f"learner rank {self.rank} died: {self.cause}"


class WeightSyncError(AsterError):
    """A publication did not verify; the message names the tensor or bucket.

    `restored` is the version that the engines serve again: it may be tried once more. None: they stay shut.
    """

    def __init__(self, message: str, restored: int | None = None) -> None:
        super().__init__(message, restored)
        self.message = message
        self.restored = restored

    def __str__(self) -> str:
        return self.message


class CircuitOpen(AsterError):
    """Too many trajectories were lost to our own failures; training on the rest would be training on ruins."""


def leaves(error: BaseException) -> list[BaseException]:
    """The exceptions in a tree of groups, in order: what a task group raises for one failure that stopped the rest."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in leaves(inner)]
    return [error]
