"""A session as the pool holds it: where it is, whether it may go on, and its journal, kept in step with its cell."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from serve.cells import Ending
from serve.fleet import FleetCell
from serve.journal import BadJournal, Gap, Journal, Line, Opened, ran
from serve.policy import Lease
from serve.schema import CreateSession, ExecuteRequest, ExecuteResponse, Limits

logger = logging.getLogger("ray.serve")


@dataclass(eq=False)
class LiveSession:
    id: str
    cell: FleetCell | None
    """None after the loss of its cell, until the next call rebuilds it."""
    lease: Lease
    limits: Limits
    journal: Journal
    count: int = 0
    """Cells that the supervisor had counted at the last answer."""
    resets: int = 0
    """A call that began before the last reset does not belong to the session any more."""
    loss: Ending | None = None
    """How its last cell ended, while it has none."""
    untold: str = ""
    """Why the journal does not tell all; such a session cannot be rebuilt."""
    ahead: int = 0
    """The supervisor's count when the session was adopted: a call may have been under way, whose answer nobody got."""
    settling: bool = False
    """That call may still run."""
    replayed: bool = False
    """Rebuilt, and nobody was told yet."""
    end: str = ""
    """Why it is no more; for calls that were under way."""
    calls: int = 0
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    rebuilding: asyncio.Lock = field(default_factory=asyncio.Lock)

    @classmethod
    def open(cls, path: Path, cell: FleetCell, request: CreateSession) -> LiveSession:
        """New in `cell`; its journal is `path`. Raises OSError when there is no room for that."""
        lease = Lease.new(ttl_s=request.ttl_s, idle_ttl_s=request.idle_ttl_s)
        return cls(path.name, cell, lease, request.limits, Journal.create(path, _opened(request.limits, lease)))

    def copy(self, path: Path) -> LiveSession:
        """A session that was forked from this one just now: in the same slot, with the same past."""
        lease = Lease.new(ttl_s=self.lease.ttl_s, idle_ttl_s=self.lease.idle_ttl_s)
        untold = self.why_untold
        try:
            journal = self.journal.copy(path, _opened(self.limits, lease))
        except (OSError, BadJournal) as error:
            journal, untold = Journal(path), untold or f"the original's journal could not be copied: {error}"
        if self.cell is not None:
            self.cell.sessions[path.name] = self.cell.sessions[self.id]
        return LiveSession(path.name, self.cell, lease, self.limits, journal, self.count, loss=self.loss, untold=untold)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """It does not expire meanwhile, and its idle time starts anew."""
        self.calls += 1
        self.touch()
        try:
            yield
        finally:
            self.calls -= 1
            self.touch()

    def settle_in(self, cell: FleetCell) -> None:
        """In a fresh session there, of which nothing older is known."""
        self.cell, self.loss, self.ahead, self.settling = cell, None, 0, False

    def touch(self) -> None:
        self.lease.touch()
        self.journal.touch()

    def record(self, request: ExecuteRequest, answer: ExecuteResponse) -> None:
        """Before the answer leaves. One that answers a repeated call is in the journal already."""
        if answer.cell <= self.count:
            return
        if answer.cell > self.count + 1:
            self.note(Gap(why=f"nobody got the answer of cell {self.count + 1}"))
        self.count = answer.cell
        self.note(ran(request, answer))

    def note(self, line: Line) -> None:
        """A journal that cannot go on (a full disk) is given up: half of one would rebuild another session."""
        if self.untold:
            return
        try:
            self.journal.append(line)
        except FileNotFoundError:  # closed meanwhile
            pass
        except OSError as error:
            logger.error("session %s has no journal any more: %s", self.id, error)
            self.untold = f"its journal could not be written: {error}"
            self.journal.remove()

    @property
    def why_untold(self) -> str:
        """Why running the journal would not give this session, as far as the journal itself does not say."""
        if self.ahead > self.count:
            return "a call was under way when its pool died, and nobody got the answer"
        return self.untold


def _opened(limits: Limits, lease: Lease) -> Opened:
    return Opened(limits=limits, ttl_s=lease.ttl_s, idle_ttl_s=lease.idle_ttl_s, began=time.time())
