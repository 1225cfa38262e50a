"""Reaching a session whatever became of its cell: work is done there, or the session is rebuilt elsewhere first.

    cell answers                      the work is done
    cell lost, also during the work   the journal is run again in a fresh session, each answer compared; then the work
    ... of memory, or a second time   the session is lost
    cell lives, session does not      the session is lost, the cell takes no new one

Equal answers do not prove an equal state (a random number that was never printed), so that the caller is told:
`replayed`. An answer that differs proves a different state, and the session is lost: never a silent fresh one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from serve.cells.link import CellLink, CellLost
from serve.errors import SandboxUnavailable, SessionGone
from serve.fleet import Fleet, FleetCell
from serve.journal import Counted, Ran, cells_of, obstacle, text_hash
from serve.live import LiveSession

T = TypeVar("T")

_SETTLE_POLL_S = 0.2


class Rescue:
    """`bury(session, reason)` is called once for each session that is lost; it sets `session.end`."""

    def __init__(self, fleet: Fleet, *, limit_s: float, bury: Callable[[LiveSession, str], None]) -> None:
        self.rebuilt = 0
        self._fleet, self._limit_s, self._bury = fleet, limit_s, bury

    async def at_cell(self, session: LiveSession, work: Callable[[CellLink], Awaitable[T]]) -> T:
        """Raises `SessionGone` when the session is lost, `PoolFull` when it cannot be rebuilt now, and what `work`
        raises. `work` is done twice only if all that it did the first time is gone with the cell."""
        await self.rebuild(session)
        try:
            return await self.at_living_cell(session, work)
        except CellLost as lost:
            if session.loss is not None and session.loss.out_of_memory:
                raise self._lost(session, str(lost)) from None
        await self.rebuild(session)
        try:
            return await self.at_living_cell(session, work)
        except CellLost as lost:
            raise self._lost(session, f"its cell was lost twice: {lost}") from None

    async def at_living_cell(self, session: LiveSession, work: Callable[[CellLink], Awaitable[T]]) -> T:
        """Raises `CellLost`: the session has no cell now, and can be rebuilt; `SessionGone`: it has ended."""
        cell = session.cell
        if cell is not None and cell.end is not None:  # it is being removed
            await self._fleet.lose(cell, "")
            cell = None
        if cell is None:
            raise CellLost(str(session.loss))
        try:
            return await work(cell.link)
        except CellLost as error:
            why = str(error)
        if self._fleet.stopped:
            raise self._lost(session, why)
        if await self._answers(cell, why):
            await self._fleet.retire(cell, why)  # what the session still does in there nobody knows
            raise self._lost(session, why)
        if session.end:
            raise SessionGone(session.id, session.end)
        raise CellLost(str(session.loss))

    async def _answers(self, cell: FleetCell, why: str) -> bool:
        """Does the cell live? When not, all of its sessions know afterwards."""
        try:
            await cell.link.status()
        except CellLost:
            await self._fleet.lose(cell, why)
            return False
        return True

    async def rebuild(self, session: LiveSession) -> None:
        """Nothing to do for a session that has a cell. Raises `SessionGone`, `PoolFull`."""
        async with session.rebuilding:
            if session.end:
                raise SessionGone(session.id, session.end)
            if session.cell is not None:
                return
            lines = [] if session.untold else session.journal.lines()
            if why := session.why_untold or obstacle(lines, limit_s=self._limit_s):
                raise self._lost(session, f"{session.loss}; it cannot be rebuilt: {why}")
            cells = cells_of(lines)
            cell = await self._fleet.place(session.id, session.limits)
            try:
                await _replay(cell.link, session.id, cells, limit_s=self._limit_s)
            except _Differs as error:
                await self._fleet.close_session(cell, session.id)
                raise self._lost(session, f"{session.loss}; it could not be rebuilt: {error}") from None
            except CellLost as error:
                await self._fleet.lose(cell, str(error))
                raise self._lost(session, f"its cell was lost twice: {session.loss}") from None
            except BaseException:  # the pool stops
                await self._fleet.close_session(cell, session.id)
                raise
            if session.end:  # closed meanwhile
                await self._fleet.close_session(cell, session.id)
                raise SessionGone(session.id, session.end)
            session.settle_in(cell)
            session.count, session.replayed = len(cells), True
            session.note(Counted(cells=len(cells)))
            self.rebuilt += 1

    async def settle(self, session: LiveSession) -> None:
        """Wait for the end of a call that a dead pool had begun: the next one's clock must not run meanwhile. It has a
        time limit of its own, which the supervisor keeps."""
        while session.settling and session.cell is not None and session.cell.end is None:
            try:
                status = await session.cell.link.status()
            except CellLost as error:
                await self._fleet.lose(session.cell, str(error))
                return
            session.settling = any(told.running for told in status.sessions if told.session_id == session.id)
            if session.settling:
                await asyncio.sleep(_SETTLE_POLL_S)

    def _lost(self, session: LiveSession, reason: str) -> SessionGone | SandboxUnavailable:
        if self._fleet.stopped:  # this pool has let go of the cell: whoever adopts it knows better
            return SandboxUnavailable("this node's sandbox pool is ending", 504)
        if not session.end:
            self._bury(session, reason)
        return SessionGone(session.id, session.end)


class _Differs(RuntimeError):
    """The fresh session is not the lost one."""


async def _replay(link: CellLink, session_id: str, cells: Sequence[Ran], *, limit_s: float) -> None:
    """Run `cells` in the open, empty session. Raises `_Differs`, and `CellLost` when this cell dies as well."""
    number = 0
    try:
        async with asyncio.timeout(limit_s):
            for number, ran in enumerate(cells, start=1):
                answer = await link.execute(session_id, ran.request(timeout_s=limit_s))
                if answer.status is not ran.record.status:
                    raise _Differs(f"cell {number} ended with {answer.status}, and with {ran.record.status} before")
                if text_hash(answer) != ran.record.text_sha256:
                    raise _Differs(f"cell {number} printed something else than before")
    except TimeoutError:
        raise _Differs(f"cell {number} of {len(cells)} had not ended after {limit_s:g} s") from None
