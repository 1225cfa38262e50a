"""SandboxPool: the sessions of one node. Routes calls to cells, keeps journals, rebuilds what a lost cell took with it.

    create  --> a slot of a cell (fleet) --> id = owner . 128 random bits . seal --> journal
    execute --> one call of a session at a time --> turnstile (cells of code that run at once) --> the cell's socket
                --> journal --> answer
    a cell is lost    --> at the next call its sessions are run again from their journals, elsewhere: `replayed`
    the pool is lost  --> the next pool of the node adopts cells and journals; without one the janitor removes them

A plain class; `app.py` deploys `SandboxReplica`, which is this plus what only a Serve replica knows.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from serve import adoption, janitor
from serve.background import Background
from serve.cells import CellBackend, Ending, choose_backend, private_root
from serve.cells.link import CellFull, CellLink, CellLost
from serve.errors import PoolFull, SessionGone
from serve.fleet import Fleet
from serve.journal import Gap, Reset, cells_of
from serve.live import LiveSession
from serve.owner import Owner, claim
from serve.policy import Mint, Tombstones, Turnstile
from serve.rescue import Rescue
from serve.schema import (
    CellRecord,
    CreateSession,
    ExecuteRequest,
    ExecuteResponse,
    Files,
    Forked,
    ForkSession,
    Interrupted,
    OutputChunk,
    Session,
    State,
)
from serve.settings import PoolSettings

logger = logging.getLogger("ray.serve")
_HEARTBEAT_S = 5.0
_SWEEP_S = 60.0
_END_S = 5.0
_RETRY_AFTER_S = 5.0
MAX_FILE_BYTES = 32 << 20
"""Largest file in or out: it travels as one message."""


class SandboxPool:
    def __init__(self, settings: PoolSettings, *, node: str, backend: CellBackend | None = None) -> None:
        self.settings = settings
        self._node = node
        self._given_backend = backend
        self._sessions: dict[str, LiveSession] = {}
        self._opening = 0
        self._background = Background()
        self._calls = Background()
        self._home: Owner | None = None
        self._fleet: Fleet | None = None
        self._stopped = False
        self._counts = {"created": 0, "executed": 0, "lost": 0, "adopted": 0, "swept": 0}

    # life ------------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Returns when a cell is ready. Raises `BackendUnavailable` with the cure."""
        self._root = private_root(self.settings.cell_settings(owner=""))
        self._home = home = claim(self._root, self._node, lease_s=self.settings.adoption_s)
        self.owner = home.name
        await asyncio.to_thread(janitor.ensure, self._root)
        self._mint = Mint(self.settings.mint_key.encode() or os.urandom(32))
        self._graves = Tombstones(self._mint)
        self._turnstile = Turnstile(
            running=self.settings.running_limit,
            waiting=self.settings.max_waiting,
            timeout_s=self.settings.queue_timeout_s,
        )
        cell_settings = self.settings.cell_settings(owner=self.owner)
        backend = self._given_backend
        if backend is None:
            backend = await asyncio.to_thread(choose_backend, self.settings.backend, cell_settings)
        if home.backend not in ("", backend.name):
            await asyncio.to_thread(janitor.remove_cells, home)  # nobody can adopt those of another kind
        home.backend = backend.name
        self._fleet = Fleet(backend, cell_settings, self.settings, on_lost=self._on_lost_cell)
        self._rescue = Rescue(self._fleet, limit_s=self.settings.replay_timeout_s, bury=self._bury_lost)
        await adoption.adopt(home, self._fleet, self._mint, self._sessions)
        self._counts["adopted"] += len(self._sessions)
        self._background.every(_HEARTBEAT_S, self._heartbeat)  # at once: adopted cells wait to hear from somebody
        sound = [cell for cell in self._fleet.cells if not cell.broken]
        first = sound[0] if sound else await self._fleet.start_first()
        packages = dict((await first.link.status()).packages)
        if absent := sorted(name for name, version in packages.items() if not version):
            logger.warning("sandbox backend %s: sessions have no %s", backend.name, ", ".join(absent))
        self._background.run(self._sweep())
        self._background.every(_SWEEP_S, self._sweep)
        self._background.every(_HEARTBEAT_S, self._expire)
        self._fleet.refill()
        logger.info(
            "sandbox pool %s: backend %s, %d sessions per cell, %d sessions adopted",
            self.owner, backend.name, backend.slots, len(self._sessions),
        )  # fmt: skip

    async def leave(self) -> None:
        """Ends this pool and no session: the node's next pool takes them over. Without open sessions, `stop`."""
        if not self._sessions:
            await self.stop()
        if self._stopped:
            return
        self._stopped = True
        await self._background.stop()
        await self._calls.wait(_END_S)
        await self.fleet.leave()
        assert self._home is not None
        self._home.renew(self.settings.adoption_s)
        self._home.leave()

    async def stop(self) -> None:
        """Ends every session and removes every cell, with all files. Idempotent."""
        if self._stopped:
            return
        self._stopped = True
        await self._background.stop()
        for session in list(self._sessions.values()):
            self._bury(session, "the sandbox service was shut down")
        clean = self._fleet is None or await self._fleet.stop()
        await self._calls.wait(_END_S)
        if self._home is None:
            return
        if clean:
            await asyncio.to_thread(self._home.erase)
        else:
            self._home.leave()  # the janitor goes on trying

    async def _heartbeat(self) -> None:
        assert self._home is not None
        self._home.renew(self.settings.adoption_s)
        await self.fleet.heartbeat()

    async def _expire(self) -> None:
        now = time.monotonic()
        for session in list(self._sessions.values()):
            why = "" if session.calls else session.lease.expired(now)
            if why:
                await self._end(session, why)

    async def _sweep(self) -> None:
        """What other dead pools left on this machine, in case that the janitor was killed, too."""
        await asyncio.to_thread(janitor.ensure, self._root)
        self._counts["swept"] += await self.backend.sweep()
        self._counts["swept"] += await asyncio.to_thread(janitor.sweep, self._root)

    @property
    def backend(self) -> CellBackend:
        return self.fleet.backend

    @property
    def fleet(self) -> Fleet:
        assert self._fleet is not None, "the pool was not started"
        return self._fleet

    # sessions: beginning and end -------------------------------------------------------------------------------------

    async def create(self, request: CreateSession) -> Session:
        """A fresh session. Raises `PoolFull`."""
        memory_bytes = min(request.limits.memory_bytes, self.settings.memory_bytes)
        request = request.model_copy(
            update={"limits": request.limits.model_copy(update={"memory_bytes": memory_bytes})}
        )
        with self._room_for(1):
            session_id = self._mint.new(self.owner)
            cell = await self.fleet.place(session_id, request.limits)
            try:
                session = LiveSession.open(self._journal_path(session_id), cell, request)
            except OSError as error:
                await self.fleet.close_session(cell, session_id)
                raise PoolFull(_RETRY_AFTER_S, f"there is no room for a journal: {error}") from None
            self._keep(session)
        return await self.get(session_id)

    async def fork(self, session_id: str, request: ForkSession) -> Forked:
        """Copies of the session after its last finished cell. Raises `CannotFork`, `PoolFull`."""
        session = self._find(session_id)
        new_ids = [self._mint.new(self.owner) for _ in range(request.count)]
        with self._room_for(request.count), session.in_use():
            async with session.turn:
                self._find(session_id)
                try:
                    await self._rescue.at_cell(session, lambda link: link.fork(session_id, new_ids))
                except CellFull as error:
                    raise PoolFull(_RETRY_AFTER_S, str(error)) from None
                for new_id in new_ids:
                    self._keep(session.copy(self._journal_path(new_id)))
        return Forked(sessions=[await self.get(new_id) for new_id in new_ids])

    async def reset(self, session_id: str) -> Session:
        """A fresh interpreter and empty directories under the same id. Ends a running cell."""
        session = self._find(session_id)
        with session.in_use():
            async with session.rebuilding:
                session.resets += 1
                try:
                    await self._rescue.at_living_cell(session, lambda link: link.reset(session_id))
                except CellLost:  # then a fresh one elsewhere is all that was asked for
                    session.settle_in(await self.fleet.place(session_id, session.limits))
                session.count, session.ahead, session.settling, session.replayed = 0, 0, False, False
                session.note(Reset())
        return await self.get(session_id)

    async def get(self, session_id: str) -> Session:
        session = self._find(session_id)
        return Session(session_id=session_id, node=self.owner, expires_at=session.lease.expires_at)

    async def close(self, session_id: str) -> None:
        """Idempotent for every id that was once minted; `SessionUnknown` for any other."""
        session = self._sessions.get(session_id)
        if session is not None:
            await self._end(session, "closed by its client")
        elif not self._mint.is_ours(session_id):
            raise self._graves.explain(session_id)

    async def close_all(self) -> int:
        """End every session of this node; how many they were."""
        sessions = list(self._sessions.values())
        await asyncio.gather(*(self._end(session, "all sessions were ended") for session in sessions))
        return len(sessions)

    @contextmanager
    def _room_for(self, count: int) -> Iterator[None]:
        if self.open_sessions + count > self.settings.max_sessions:
            raise PoolFull(_RETRY_AFTER_S, f"{self.settings.max_sessions} sessions are open")
        self._opening += count
        try:
            yield
        finally:
            self._opening -= count

    def _journal_path(self, session_id: str) -> Path:
        assert self._home is not None
        return self._home.sessions / session_id

    def _keep(self, session: LiveSession) -> None:
        self._sessions[session.id] = session
        self._counts["created"] += 1

    def _find(self, session_id: str) -> LiveSession:
        session = self._sessions.get(session_id)
        if session is None:
            raise self._graves.explain(session_id)
        return session

    async def _end(self, session: LiveSession, reason: str) -> None:
        cell = session.cell
        self._bury(session, reason)
        if cell is not None:
            await self.fleet.close_session(cell, session.id)

    def _bury(self, session: LiveSession, reason: str) -> None:
        if self._sessions.pop(session.id, None) is not None:
            session.end = reason
            self._graves.bury(session.id, reason)
            session.journal.remove()

    def _on_lost_cell(self, ids: list[str], ending: Ending) -> None:
        """Its sessions are rebuilt when they are next called."""
        for session_id in ids:
            session = self._sessions.get(session_id)
            if session is not None:
                session.cell, session.loss = None, ending

    def _bury_lost(self, session: LiveSession, reason: str) -> None:
        """Through our fault, not the client's."""
        self._counts["lost"] += 1
        self._bury(session, reason)

    # calls -----------------------------------------------------------------------------------------------------------

    async def execute(self, session_id: str, request: ExecuteRequest) -> ExecuteResponse:
        """Run one cell; calls of one session one after another. Raises `SessionUnknown`, `SessionGone`, `PoolFull`."""
        return await self._host(session_id, request, lambda link: link.execute(session_id, request))

    async def execute_stream(
        self, session_id: str, request: ExecuteRequest
    ) -> AsyncIterator[OutputChunk | ExecuteResponse]:
        """`execute`, with the output as it is printed; the response comes last. When the cell is lost meanwhile, the
        code runs once more and its output comes again from the start; the response tells what it is in the end."""
        events: asyncio.Queue[OutputChunk | None] = asyncio.Queue()  # bounded by the supervisor's output limit

        async def work(link: CellLink) -> ExecuteResponse:
            async for event in link.execute_stream(session_id, request):
                if isinstance(event, ExecuteResponse):
                    return event
                events.put_nowait(event)
            raise CellLost("its stream ended without an answer")

        call = asyncio.ensure_future(self._host(session_id, request, work))
        call.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (event := await events.get()) is not None:
                yield event
            yield await call
        finally:
            call.cancel()

    async def _host(
        self, session_id: str, request: ExecuteRequest, work: Callable[[CellLink], Awaitable[ExecuteResponse]]
    ) -> ExecuteResponse:
        """The call in a task of its own. A caller who hangs up while it waits takes it along; once it runs, it runs to
        its end and is recorded, as the session's state will have it."""
        started = asyncio.Event()
        return await self._calls.host(self._call(session_id, request, work, started), started=started)

    async def _call(
        self,
        session_id: str,
        request: ExecuteRequest,
        work: Callable[[CellLink], Awaitable[ExecuteResponse]],
        started: asyncio.Event,
    ) -> ExecuteResponse:
        session = self._find(session_id)
        arrived = time.monotonic()
        with session.in_use():
            async with session.turn:
                self._find(session_id)  # it may have been closed while the call waited
                await self._rescue.settle(session)
                async with self._turnstile.admit():
                    waited_s = time.monotonic() - arrived
                    started.set()
                    resets = session.resets
                    answer = await self._rescue.at_cell(session, work)
                    if session.resets == resets:
                        session.record(request, answer)
        self._counts["executed"] += 1
        told: dict[str, Any] = {"queue_s": answer.queue_s + waited_s}
        if session.replayed:
            session.replayed = False
            told |= {"state": State.REPLAYED} if answer.state is State.KEPT else {}
        return answer.model_copy(update=told)

    async def interrupt(self, session_id: str) -> Interrupted:
        """SIGINT to the cell that runs now; does not wait for its end."""
        session = self._find(session_id)
        with session.in_use():
            try:
                was_running = await self._rescue.at_living_cell(session, lambda link: link.interrupt(session_id))
            except CellLost:  # what ran in it is rebuilt, or lost, by the call that waits for it
                was_running = False
            if was_running:
                session.note(Gap(why="a cell was interrupted from outside"))
        return Interrupted(was_running=was_running)

    async def write_file(self, session_id: str, path: str, content: bytes) -> None:
        """`path` is relative to the session's home directory. Raises `FileRefused`."""
        session = self._find(session_id)
        with session.in_use():
            await self._rescue.at_cell(session, lambda link: link.write_file(session_id, path, content))
            session.note(Gap(why="a file was written from outside"))

    async def read_file(self, session_id: str, path: str) -> bytes:
        session = self._find(session_id)
        with session.in_use():
            return await self._rescue.at_cell(
                session, lambda link: link.read_file(session_id, path, max_bytes=MAX_FILE_BYTES)
            )

    async def list_files(self, session_id: str) -> Files:
        session = self._find(session_id)
        with session.in_use():
            return await self._rescue.at_cell(session, lambda link: link.list_files(session_id))

    async def journal(self, session_id: str) -> list[CellRecord]:
        """The cells that made the session as it is, in order. Raises `SessionUnknown`, `SessionGone`."""
        session = self._find(session_id)
        if session.untold:
            raise SessionGone(session_id, session.untold)
        return [line.record for line in cells_of(session.journal.lines())]

    # what others may know --------------------------------------------------------------------------------------------

    @property
    def open_sessions(self) -> int:
        return len(self._sessions) + self._opening

    @property
    def problem(self) -> str:
        """Why no session can be opened; empty when one can."""
        return self.fleet.start_error if not self.fleet.cells else ""

    async def stats(self) -> dict[str, Any]:
        return {
            "owner": self.owner,
            "pid": os.getpid(),
            "backend": self.backend.name,
            "sessions": len(self._sessions),
            "max_sessions": self.settings.max_sessions,
            "cells": len(self.fleet.cells),
            "slots_per_cell": self.backend.slots,
            "running": self._turnstile.running,
            "max_running": self._turnstile.running_limit,
            "waiting": self._turnstile.waiting,
            "replayed": self._rescue.rebuilt,
            **self._counts,
        }
