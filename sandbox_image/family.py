"""Sessions as their owner knows them: an id, the process behind it now, its last answers, and its relatives.

A session and its copies are one family: one slot, one uid, a directory and a process tree for each member. No isolation
is promised inside it. A member that dies, is reset or closed takes its own tree and files along; the uid, the slot and
what the family left in the shared directories go with the last member.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

from sandbox_image.outcome import Outcome
from sandbox_image.place import Limits, Place
from sandbox_image.slot import SessionProcess

_REMEMBERED = 16  # answers per session, for repeated call ids
_REMEMBERED_BYTES = 32 << 20


@dataclass
class Family:
    """`lock`: copies are made, and members end, one after the other."""

    name: str  # id of its first session
    slot: int
    members: set[str] = field(default_factory=set)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    _copies: int = 0

    def new_place(self, first: Path, like: Place) -> Place:
        """For one more copy; `first` is the directory of the slot."""
        self._copies += 1
        return Place(first / f"copy{self._copies}", like.uid, like.filtered, like.shared)


@dataclass
class Session:
    """`lock`: one cell at a time. `files`: held while files are touched, and while their place changes hands."""

    family: Family
    limits: Limits
    process: SessionProcess
    cells: int = 0
    lost: str = ""  # why the interpreter is not the one that ran the earlier cells; told once
    resets: int = 0
    closing: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    files: asyncio.Lock = field(default_factory=asyncio.Lock)
    answers: OrderedDict[str, asyncio.Task[Outcome]] = field(default_factory=OrderedDict)

    @property
    def alone(self) -> bool:
        return len(self.family.members) <= 1

    def has_moved_on(self, resets: int) -> bool:
        """Since a call came, when `resets` were counted, its owner has closed or reset the session."""
        return self.closing or self.resets != resets

    def remember(self, call_id: str, task: asyncio.Task[Outcome]) -> None:
        """Forgets the oldest answers when they are many or heavy; never the newest."""
        self.answers[call_id] = task
        weight = sum(_weight(task) for task in self.answers.values())
        while len(self.answers) > _REMEMBERED or (weight > _REMEMBERED_BYTES and len(self.answers) > 1):
            _, oldest = self.answers.popitem(last=False)
            weight -= _weight(oldest)


def _weight(task: asyncio.Task[Outcome]) -> int:
    return task.result().weight if task.done() and not task.cancelled() and task.exception() is None else 0
