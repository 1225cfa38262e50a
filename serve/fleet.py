"""The cells of one pool: enough of them, each heard from every few seconds, none kept that is not sound.

    found    --> adopted, if it answers                  \\
    started  --> in the background, two at a time         >  sound  --> broken: takes no new session, goes when empty
                                                                    --> lost: its sessions are told, it is removed

Knows sessions by id only, as what takes up slots; what they are is the pool's business.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from sandbox_image.proto.cell_pb2 import StatusReply
from serve.background import Background
from serve.cells import BackendUnavailable, Cell, CellBackend, CellSettings, Ending
from serve.cells.link import CellFull, CellLink, CellLost, start_cell
from serve.errors import PoolFull
from serve.schema import Limits
from serve.settings import PoolSettings

logger = logging.getLogger("ray.serve")

_STARTS_AT_ONCE = 2
_START_FAILED_PAUSE_S = 2.0
_RETRY_AFTER_S = 5.0
_GRACE_S = 1.0
_LOOKS, _LOOK_S = 20, 0.05


@dataclass(eq=False)
class FleetCell:
    """A cell that answers, and who is in it."""

    link: CellLink
    slots: int
    sessions: dict[str, str] = field(default_factory=dict)  # id -> family: the id of the session it was forked from
    broken: str = ""
    end: asyncio.Task[None] | None = None  # its removal, once it is lost

    @property
    def slots_taken(self) -> int:
        """A session and its copies share one slot."""
        return len(set(self.sessions.values()))

    @property
    def free(self) -> int:
        return 0 if self.broken else self.slots - self.slots_taken


class Fleet:
    """`on_lost(ids, ending)` is called when a cell is gone, before anything else can use one of those ids."""

    def __init__(
        self,
        backend: CellBackend,
        cell_settings: CellSettings,
        settings: PoolSettings,
        *,
        on_lost: Callable[[list[str], Ending], None],
    ) -> None:
        self.backend = backend
        self.start_error = ""
        self._cell_settings, self._settings, self._on_lost = cell_settings, settings, on_lost
        self._cells: list[FleetCell] = []
        self._remains: set[Cell] = set()  # cells that are not removed yet
        self._starting = 0
        self._changed = asyncio.Condition()
        self._background = Background()
        self.stopped = False  # then its cells are another pool's business, or nobody's

    def __len__(self) -> int:
        return len(self._cells)

    @property
    def cells(self) -> tuple[FleetCell, ...]:
        return tuple(self._cells)

    # slots -----------------------------------------------------------------------------------------------------------

    async def place(self, session_id: str, limits: Limits) -> FleetCell:
        """Open a fresh session in a cell that has room, when one has. Raises `PoolFull`."""
        deadline = time.monotonic() + self._settings.create_timeout_s
        while True:
            cell = max((c for c in self._cells if c.free > 0), key=lambda c: c.slots_taken, default=None)
            if cell is None or self.stopped:
                self.refill()
                await self._wait_for_change(deadline)
                continue
            cell.sessions[session_id] = session_id  # takes the slot before anything is awaited
            self.refill()
            try:
                await cell.link.open(session_id, limits)
            except CellFull as error:
                cell.broken = self.start_error = cell.broken or str(error)
                await self.vacate(cell, session_id)
            except CellLost as error:
                del cell.sessions[session_id]
                await self.lose(cell, str(error))
            except BaseException:
                cell.sessions.pop(session_id, None)
                raise
            else:
                return cell

    async def close_session(self, cell: FleetCell, session_id: str) -> None:
        """Nothing of it is left in the cell."""
        try:
            await cell.link.close_session(session_id)
        except CellLost as error:
            await self.lose(cell, str(error))
        else:
            await self.vacate(cell, session_id)

    async def vacate(self, cell: FleetCell, session_id: str) -> None:
        """The session is closed in the cell; the last one of its family frees the slot."""
        cell.sessions.pop(session_id, None)
        await self.retire_if_empty(cell)
        await self._announce()

    async def _wait_for_change(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0 or self.stopped:
            waited = self._settings.create_timeout_s
            raise PoolFull(_RETRY_AFTER_S, f"no cell had room within {waited:g} s. {self.start_error}")
        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait(), min(left, 1.0))
            except TimeoutError:
                pass

    async def _announce(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    # beginnings ------------------------------------------------------------------------------------------------------

    async def start_first(self) -> FleetCell:
        """Raises `BackendUnavailable` with the cure."""
        return self._join(await start_cell(self.backend, timeout_s=self._settings.start_timeout_s), self.backend.slots)

    def refill(self) -> None:
        """Start cells in the background until enough slots are free."""
        if self.stopped:
            return
        slots = self.backend.slots
        free = sum(cell.free for cell in self._cells) + self._starting * slots
        sound = sum(not cell.broken for cell in self._cells)
        room = self._settings.max_sessions - (sound + self._starting) * slots
        low = self._settings.warm_cells * max(1, slots // 2)
        while free < low and room > 0 and self._starting < _STARTS_AT_ONCE:
            self._starting += 1
            free += slots
            room -= slots
            self._background.run(self._start_one())

    async def _start_one(self) -> None:
        try:
            await self.start_first()
        except BackendUnavailable as error:
            self.start_error = str(error)
            logger.error("%s", error)
            await asyncio.sleep(_START_FAILED_PAUSE_S)
        else:
            self.start_error = ""
        finally:
            self._starting -= 1
        self.refill()
        await self._announce()

    async def adopt(self, cell: Cell) -> tuple[FleetCell, StatusReply] | None:
        """A predecessor's cell, with what its supervisor says of it; None, and removed, when that says nothing."""
        link = CellLink(cell)
        try:
            status = await link.status()
        except CellLost as error:
            logger.info("cell %s of the predecessor does not answer: %s", cell.cell_id, error)
            await link.disconnect()
            await self._remove(cell)
            return None
        adopted = self._join(link, status.slots)
        if not cell.is_made_for(self._cell_settings):
            adopted.broken = "it was made under other settings"
        adopted.sessions = {session.session_id: session.family or session.session_id for session in status.sessions}
        return adopted, status

    def _join(self, link: CellLink, slots: int) -> FleetCell:
        cell = FleetCell(link, slots)
        self._cells.append(cell)
        return cell

    # ends ------------------------------------------------------------------------------------------------------------

    async def lose(self, cell: FleetCell, why: str) -> None:
        """The cell does not answer: end it for certain, then tell its sessions. Returns when both are done."""
        if self.stopped:
            return
        if cell.end is None:
            cell.end = self._background.run(self._end(cell, why))
        await asyncio.shield(cell.end)

    async def _end(self, cell: FleetCell, why: str) -> None:
        ending = await self._ending(cell.link.cell) or Ending(why)
        logger.error("cell %s is lost with %d sessions: %s", cell.link.cell.cell_id, len(cell.sessions), ending)
        if cell in self._cells:
            self._cells.remove(cell)
        await self._remove(cell.link.cell)
        self._on_lost(list(cell.sessions), ending)
        await cell.link.disconnect(grace_s=_GRACE_S)  # calls under way fail by themselves, now that it is dead
        self.refill()
        await self._announce()

    async def _ending(self, cell: Cell) -> Ending | None:
        """A socket closes a moment before the end of its process is known; None for a cell that hangs."""
        for _ in range(_LOOKS):
            if ending := await self.backend.ending(cell):
                return ending
            await asyncio.sleep(_LOOK_S)
        return None

    async def retire(self, cell: FleetCell, why: str) -> None:
        """No new session in it; it goes with its last one."""
        cell.broken = cell.broken or why
        await self.retire_if_empty(cell)

    async def retire_if_empty(self, cell: FleetCell) -> None:
        if cell.broken and not cell.sessions and cell in self._cells:
            logger.info("cell %s retires: %s", cell.link.cell.cell_id, cell.broken)
            self._cells.remove(cell)
            await cell.link.disconnect()
            await self._remove(cell.link.cell)
            self.refill()
            await self._announce()

    async def _remove(self, cell: Cell) -> None:
        """What cannot be removed now (a daemon that restarts) is tried again with every heartbeat."""
        self._remains.add(cell)
        try:
            await self.backend.remove(cell)
        except Exception as error:  # policy: whatever the daemon says, the cell is kept in mind and tried again
            logger.error("cell %s could not be removed: %r", cell.cell_id, error)
        else:
            self._remains.discard(cell)

    async def heartbeat(self) -> None:
        """Speak to every cell, so that none ends for want of it; all at once, for one that hangs holds up 15 s."""
        remains = set(self._remains)
        await asyncio.gather(*(self._beat(cell) for cell in self._cells), *(self._remove(cell) for cell in remains))
        self.refill()

    async def _beat(self, cell: FleetCell) -> None:
        try:
            status = await cell.link.status()
        except CellLost as error:
            if cell in self._cells:  # else it retired meanwhile
                await self.lose(cell, str(error))
            return
        if status.broken:
            await self.retire(cell, status.broken)

    async def leave(self) -> None:
        """Let go of the cells; they live on until their supervisors miss the heartbeat."""
        self.stopped = True
        await self._background.stop()
        await asyncio.gather(*(cell.link.disconnect(grace_s=_GRACE_S) for cell in self._cells))
        await self.backend.close()

    async def stop(self) -> bool:
        """Remove every cell; whether none is left."""
        self.stopped = True
        await self._background.stop()
        cells, self._cells = self._cells, []
        await asyncio.gather(*(self._remove(cell) for cell in {*self._remains, *(cell.link.cell for cell in cells)}))
        await asyncio.gather(*(cell.link.disconnect(grace_s=_GRACE_S) for cell in cells))
        await self.backend.close()
        return not self._remains
