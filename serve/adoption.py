"""Taking over what a killed pool left under the same name: its cells, and the sessions in them that have a lease.

journal and cell   the session goes on; a call that was under way has ended, or ends, and its answer is remembered
journal, no cell   the cell ended meanwhile: the session is rebuilt at its next call
no journal         a session whose `create` never answered, or whose `close` did: ended
another's seal     the service was deployed under another key, nobody can name these sessions: ended
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from sandbox_image.proto.cell_pb2 import StatusReply
from serve.cells import Ending
from serve.fleet import Fleet, FleetCell
from serve.journal import BadJournal, Journal, count_of
from serve.live import LiveSession
from serve.owner import Owner
from serve.policy import Lease, Mint

logger = logging.getLogger("ray.serve")

_ORPHANED = Ending("its cell ended before a new pool took over")


async def adopt(home: Owner, fleet: Fleet, mint: Mint, sessions: dict[str, LiveSession]) -> None:
    """Fills `sessions`, by id; afterwards nothing else of the predecessor is left."""
    for path in sorted(home.sessions.iterdir()):
        session = _recover(path, mint)
        if session is None:
            path.unlink()
        else:
            sessions[session.id] = session
    found = await asyncio.gather(*(fleet.adopt(cell) for cell in await fleet.backend.found()))
    answering = [adopted for adopted in found if adopted is not None]
    await asyncio.gather(*(_take_over(fleet, cell, status, sessions) for cell, status in answering))
    home.forget_cells(but=[cell.link.cell.cell_id for cell, _ in answering])


def _recover(path: Path, mint: Mint) -> LiveSession | None:
    if not mint.is_ours(path.name):
        return None
    try:
        journal, opened = Journal.recover(path)
        count = count_of(journal.lines())
    except BadJournal as error:
        logger.error("a session could not be taken over: %s", error)
        return None
    lease = Lease.restored(ttl_s=opened.ttl_s, idle_ttl_s=opened.idle_ttl_s, began=opened.began, used=journal.used)
    return LiveSession(path.name, None, lease, opened.limits, journal, count=count, loss=_ORPHANED)


async def _take_over(fleet: Fleet, cell: FleetCell, status: StatusReply, sessions: dict[str, LiveSession]) -> None:
    for told in status.sessions:
        session = sessions.get(told.session_id)
        if session is None:
            await fleet.close_session(cell, told.session_id)
        else:
            session.cell, session.loss = cell, None
            session.ahead, session.settling = told.cells, told.running
    await fleet.retire_if_empty(cell)
