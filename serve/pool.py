"""SandboxPool: the sessions of one node. Owns cells, routes calls to them, keeps warm ones ready, ends what expired.

    create  --> a free slot of a sound cell (fullest first) --> id = owner . 128 random bits . seal
    execute --> one call of a session at a time --> turnstile (cells that run at once) --> the cell's socket
    in the background: refill (at most two starts at once), heartbeat, expiry, retirement, sweep of orphans

A plain class; `app.py` deploys `SandboxReplica`, which is this plus what only a Serve replica knows.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel, ConfigDict, Field

from serve.cells import BackendName, BackendUnavailable, CellBackend, CellSettings, choose_backend, private_root
from serve.cells.link import CellFull, CellLink, CellLost, start_cell
from serve.errors import PoolFull
from serve.policy import Lease, Mint, Tombstones, Turnstile
from serve.schema import (
    CreateSession,
    ExecuteRequest,
    ExecuteResponse,
    Files,
    Forked,
    ForkSession,
    Interrupted,
    Limits,
    OutputChunk,
    Session,
)

logger = logging.getLogger("ray.serve")

_STARTS_AT_ONCE = 2
_TICK_S = 5.0
_SWEEP_S = 60.0
_START_FAILED_PAUSE_S = 2.0
MAX_FILE_BYTES = 32 << 20
"""Largest file in or out: it travels as one message."""


class PoolSettings(BaseModel):
    """Everything a pool needs to know; plain values, so that it travels."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backend: BackendName = "auto"
    image: str = "aster-sandbox:latest"
    runtime: str = "runc"
    max_sessions: int = Field(default=512, ge=1)
    sessions_per_cell: int = Field(default=8, ge=1, le=64)
    warm_cells: int = Field(default=1, ge=1)
    warm_sessions: int = Field(default=2, ge=0)
    max_running: int | None = Field(default=None, ge=1)
    max_waiting: int = Field(default=4096, ge=0)
    queue_timeout_s: float = Field(default=120.0, gt=0)
    create_timeout_s: float = Field(default=60.0, gt=0)
    start_timeout_s: float = Field(default=60.0, gt=0)
    memory_bytes: int = Field(default=1 << 30, ge=64 << 20)
    disk_bytes: int = Field(default=64 << 20, ge=1 << 20)
    idle_ttl_s: float = Field(default=300.0, gt=0)
    socket_root: str | None = None
    mint_key: str = ""

    @property
    def running_limit(self) -> int:
        """max_running, or twice the cores that this process may use."""
        return self.max_running or 2 * len(os.sched_getaffinity(0))

    def cell_settings(self, **labels: str) -> CellSettings:
        return CellSettings(
            sessions_per_cell=self.sessions_per_cell,
            warm_sessions=self.warm_sessions,
            memory_bytes=self.memory_bytes,
            disk_bytes=self.disk_bytes,
            idle_ttl_s=self.idle_ttl_s,
            image=self.image,
            runtime=self.runtime,
            socket_root=self.socket_root,
            labels=labels,
        )


@dataclass
class _CellState:
    link: CellLink
    sessions: dict[str, str] = field(default_factory=dict)  # id -> family: the id of the session it was forked from
    broken: str = ""

    @property
    def slots_taken(self) -> int:
        """A session and its copies share one slot."""
        return len(set(self.sessions.values()))


@dataclass
class _SessionState:
    cell: _CellState
    lease: Lease
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    calls: int = 0


class SandboxPool:
    def __init__(self, settings: PoolSettings, *, node: str, backend: CellBackend | None = None) -> None:
        self.settings = settings
        self._node = node
        self._backend = backend
        self._cells: list[_CellState] = []
        self._sessions: dict[str, _SessionState] = {}
        self._starting = 0
        self._opening = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Condition()
        self._start_error = ""
        self._stopped = False
        self._counts = {"created": 0, "executed": 0, "lost": 0, "swept": 0}

    # life ------------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Returns when the first cell is ready. Raises `BackendUnavailable` with the cure."""
        labels = {"node": self._node}
        cell_settings = self.settings.cell_settings(**labels)
        self._owner_lock, number = _claim_owner_number(private_root(cell_settings))
        self.owner = f"{self._node}-{number}"
        self._mint = Mint(self.settings.mint_key.encode() or os.urandom(32))
        self._graves = Tombstones(self._mint)
        self._turnstile = Turnstile(
            running=self.settings.running_limit,
            waiting=self.settings.max_waiting,
            timeout_s=self.settings.queue_timeout_s,
        )
        if self._backend is None:
            self._backend = await asyncio.to_thread(choose_backend, self.settings.backend, cell_settings)
        self.backend = self._backend
        self._counts["swept"] += await self.backend.sweep()
        link = await start_cell(self.backend, timeout_s=self.settings.start_timeout_s)
        self._cells.append(_CellState(link))
        packages = dict((await link.status()).packages)
        if absent := sorted(name for name, version in packages.items() if not version):
            logger.warning("sandbox backend %s: sessions have no %s", self.backend.name, ", ".join(absent))
        self._later(self._housekeeping())
        logger.info(
            "sandbox pool %s: backend %s, %d sessions per cell", self.owner, self.backend.name, self.backend.slots
        )

    async def stop(self) -> None:
        """Ends every session and removes every cell. Idempotent."""
        if self._stopped:
            return
        self._stopped = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for session_id in list(self._sessions):
            self._bury(session_id, "the sandbox service was shut down")
        results = await asyncio.gather(*(self._remove(cell) for cell in self._cells), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                logger.error("a cell could not be removed: %r", result)
        self._cells.clear()
        if self._backend is not None:
            await self._backend.close()
        if hasattr(self, "_owner_lock"):
            self._owner_lock.close()

    def _later(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_log_failure)

    # sessions --------------------------------------------------------------------------------------------------------

    async def create(self, request: CreateSession) -> Session:
        """A fresh session. Raises `PoolFull`."""
        if len(self._sessions) + self._opening >= self.settings.max_sessions:
            raise PoolFull(5.0, f"{self.settings.max_sessions} sessions are open")
        self._opening += 1
        try:
            session_id, cell = await self._open_somewhere(self._capped(request.limits))
        finally:
            self._opening -= 1
        lease = Lease.new(ttl_s=request.ttl_s, idle_ttl_s=request.idle_ttl_s)
        self._sessions[session_id] = _SessionState(cell, lease)
        self._counts["created"] += 1
        return Session(session_id=session_id, node=self.owner, expires_at=lease.expires_at)

    def _capped(self, limits: Limits) -> Limits:
        return limits.model_copy(update={"memory_bytes": min(limits.memory_bytes, self.settings.memory_bytes)})

    async def _open_somewhere(self, limits: Limits) -> tuple[str, _CellState]:
        deadline = time.monotonic() + self.settings.create_timeout_s
        while True:
            cell = self._with_room()
            if cell is None:
                self._refill()
                await self._wait_for_change(deadline)
                continue
            session_id = self._mint.new(self.owner)
            cell.sessions[session_id] = session_id  # takes the slot before anything is awaited
            self._refill()
            try:
                await cell.link.open(session_id, limits)
            except CellFull as error:
                cell.sessions.pop(session_id, None)
                cell.broken = self._start_error = cell.broken or str(error)
                await self._retire_if_empty(cell)
            except CellLost as error:
                cell.sessions.pop(session_id, None)
                await self._lose(cell, str(error))
            except BaseException:
                cell.sessions.pop(session_id, None)
                raise
            else:
                return session_id, cell

    def _with_room(self) -> _CellState | None:
        """The fullest sound cell with a free slot, so that others can empty and retire."""
        open_cells = [c for c in self._cells if not c.broken and c.slots_taken < self.backend.slots]
        return max(open_cells, key=lambda c: c.slots_taken, default=None)

    async def _wait_for_change(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0 or self._stopped:
            raise PoolFull(5.0, f"no cell had room within {self.settings.create_timeout_s:g} s. {self._start_error}")
        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait(), min(left, 1.0))
            except TimeoutError:
                pass

    async def execute(self, session_id: str, request: ExecuteRequest) -> ExecuteResponse:
        """Run one cell; calls of one session one after another. Raises `SessionUnknown`, `SessionGone`, `PoolFull`."""
        async with self._turn(session_id) as (cell, waited_s):
            answer = await cell.link.execute(session_id, request)
        self._counts["executed"] += 1
        return answer.model_copy(update={"queue_s": answer.queue_s + waited_s})

    async def execute_stream(
        self, session_id: str, request: ExecuteRequest
    ) -> AsyncIterator[OutputChunk | ExecuteResponse]:
        """`execute`, with the output as it is printed; the response comes last."""
        async with self._turn(session_id) as (cell, waited_s):
            async for event in cell.link.execute_stream(session_id, request):
                if isinstance(event, ExecuteResponse):
                    event = event.model_copy(update={"queue_s": event.queue_s + waited_s})
                yield event
        self._counts["executed"] += 1

    async def interrupt(self, session_id: str) -> Interrupted:
        """SIGINT to the cell that runs now; does not wait for its end."""
        async with self._use(session_id) as cell:
            return Interrupted(was_running=await cell.link.interrupt(session_id))

    async def reset(self, session_id: str) -> Session:
        """A fresh interpreter and empty directories under the same id."""
        async with self._use(session_id) as cell:
            await cell.link.reset(session_id)
        return await self.get(session_id)

    async def fork(self, session_id: str, request: ForkSession) -> Forked:
        """Copies of the session after its last finished cell. Raises `CannotFork`, `PoolFull`."""
        session = self._find(session_id)
        if len(self._sessions) + self._opening + request.count > self.settings.max_sessions:
            raise PoolFull(5.0, f"{self.settings.max_sessions} sessions are open")
        self._opening += request.count
        new_ids = [self._mint.new(self.owner) for _ in range(request.count)]
        try:
            async with session.lock, self._use(session_id) as cell:
                await cell.link.fork(session_id, new_ids)
        except CellFull as error:
            raise PoolFull(5.0, str(error)) from None
        finally:
            self._opening -= request.count
        for new_id in new_ids:
            lease = Lease.new(ttl_s=session.lease.ttl_s, idle_ttl_s=session.lease.idle_ttl_s)
            self._sessions[new_id] = _SessionState(cell, lease)
            cell.sessions[new_id] = cell.sessions[session_id]
            self._counts["created"] += 1
        return Forked(sessions=[await self.get(new_id) for new_id in new_ids])

    async def write_file(self, session_id: str, path: str, content: bytes) -> None:
        """`path` is relative to the session's home directory. Raises `FileRefused`."""
        async with self._use(session_id) as cell:
            await cell.link.write_file(session_id, path, content)

    async def read_file(self, session_id: str, path: str) -> bytes:
        async with self._use(session_id) as cell:
            return await cell.link.read_file(session_id, path, max_bytes=MAX_FILE_BYTES)

    async def list_files(self, session_id: str) -> Files:
        async with self._use(session_id) as cell:
            return await cell.link.list_files(session_id)

    @asynccontextmanager
    async def _turn(self, session_id: str) -> AsyncIterator[tuple[_CellState, float]]:
        """The session's turn and one of the node's, with the seconds that took; then as `_use`."""
        session = self._find(session_id)
        arrived = time.monotonic()
        session.calls += 1
        try:
            async with session.lock:
                self._find(session_id)
                async with self._turnstile.admit():
                    waited_s = time.monotonic() - arrived
                    async with self._use(session_id) as cell:
                        yield cell, waited_s
        finally:
            session.calls -= 1

    @asynccontextmanager
    async def _use(self, session_id: str) -> AsyncIterator[_CellState]:
        """The session's cell; its lease is touched before and after. A cell that is lost meanwhile is `SessionGone`."""
        session = self._find(session_id)
        session.lease.touch()
        try:
            yield session.cell
        except CellLost as error:
            await self._examine(session_id, session.cell, str(error))
            raise self._graves.explain(session_id) from None
        finally:
            session.lease.touch()

    async def get(self, session_id: str) -> Session:
        session = self._find(session_id)
        return Session(session_id=session_id, node=self.owner, expires_at=session.lease.expires_at)

    async def close(self, session_id: str) -> None:
        """Idempotent for every id that was once minted; `SessionUnknown` for any other."""
        session = self._sessions.get(session_id)
        if session is None:
            if not self._mint.is_ours(session_id):
                raise self._graves.explain(session_id)
            return
        await self._end(session_id, session, "closed by its client")

    def _find(self, session_id: str) -> _SessionState:
        session = self._sessions.get(session_id)
        if session is None:
            raise self._graves.explain(session_id)
        return session

    async def _end(self, session_id: str, session: _SessionState, reason: str) -> None:
        self._bury(session_id, reason)
        try:
            await session.cell.link.close_session(session_id)
        except CellLost as error:
            await self._lose(session.cell, str(error))
            return
        session.cell.sessions.pop(session_id, None)
        await self._retire_if_empty(session.cell)
        await self._announce()

    def _bury(self, session_id: str, reason: str) -> None:
        if self._sessions.pop(session_id, None) is not None:
            self._graves.bury(session_id, reason)

    # cells -----------------------------------------------------------------------------------------------------------

    def _refill(self) -> None:
        """Start cells in the background until enough slots are free, two at a time."""
        if self._stopped:
            return
        slots = self.backend.slots
        sound = [c for c in self._cells if not c.broken]
        free = sum(slots - c.slots_taken for c in sound) + self._starting * slots
        room = self.settings.max_sessions - (len(sound) + self._starting) * slots
        low = self.settings.warm_cells * max(1, slots // 2)
        while free < low and room > 0 and self._starting < _STARTS_AT_ONCE:
            self._starting += 1
            free += slots
            room -= slots
            self._later(self._start_one())

    async def _start_one(self) -> None:
        try:
            link = await start_cell(self.backend, timeout_s=self.settings.start_timeout_s)
        except BackendUnavailable as error:
            self._start_error = str(error)
            logger.error("%s", error)
            await asyncio.sleep(_START_FAILED_PAUSE_S)
        else:
            self._start_error = ""
            self._cells.append(_CellState(link))
        finally:
            self._starting -= 1
        self._refill()
        await self._announce()

    async def _announce(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _examine(self, session_id: str, cell: _CellState, why: str) -> None:
        """A call failed: is it the cell or this session only?"""
        try:
            status = await cell.link.status()
        except CellLost:
            await self._lose(cell, why)
            return
        self._counts["lost"] += 1
        self._bury(session_id, why)
        cell.sessions.pop(session_id, None)
        cell.broken = cell.broken or status.broken or why
        await self._retire_if_empty(cell)

    async def _lose(self, cell: _CellState, why: str) -> None:
        """The cell is dead: every session in it is, too."""
        if cell not in self._cells:
            return
        self._cells.remove(cell)
        why = await self.backend.ending(cell.link.cell) or why
        logger.error("cell %s lost with %d sessions: %s", cell.link.cell.cell_id, len(cell.sessions), why)
        for session_id in cell.sessions:
            if session_id in self._sessions:
                self._counts["lost"] += 1
            self._bury(session_id, why)
        await self._remove(cell)
        self._refill()
        await self._announce()

    async def _retire_if_empty(self, cell: _CellState) -> None:
        if cell.broken and not cell.sessions and cell in self._cells:
            logger.info("cell %s retires: %s", cell.link.cell.cell_id, cell.broken)
            self._cells.remove(cell)
            await self._remove(cell)
            self._refill()
            await self._announce()

    async def _remove(self, cell: _CellState) -> None:
        await cell.link.disconnect()
        await self.backend.remove(cell.link.cell)

    async def _housekeeping(self) -> None:
        swept = time.monotonic()
        while True:
            await asyncio.sleep(_TICK_S)
            now = time.monotonic()
            for session_id, session in list(self._sessions.items()):
                why = "" if session.calls else session.lease.expired(now)
                if why:
                    await self._end(session_id, session, why)
            for cell in list(self._cells):
                await self._heartbeat(cell)
            if now - swept >= _SWEEP_S:
                swept = now
                self._counts["swept"] += await self.backend.sweep()
            self._refill()

    async def _heartbeat(self, cell: _CellState) -> None:
        try:
            status = await cell.link.status()
        except CellLost as error:
            await self._lose(cell, str(error))
            return
        cell.broken = cell.broken or status.broken
        await self._retire_if_empty(cell)

    # what others may know --------------------------------------------------------------------------------------------

    async def stats(self) -> dict[str, Any]:
        return {
            "owner": self.owner,
            "backend": self.backend.name,
            "sessions": len(self._sessions),
            "max_sessions": self.settings.max_sessions,
            "cells": len(self._cells),
            "slots_per_cell": self.backend.slots,
            "running": self._turnstile.running,
            "max_running": self._turnstile.running_limit,
            "waiting": self._turnstile.waiting,
            **self._counts,
        }


class SandboxReplica(SandboxPool):
    """The pool as a Serve replica: named by its Ray node, healthy while it can start cells, gone without a trace."""

    async def __init__(self, settings: PoolSettings) -> None:  # type: ignore[misc]  # Serve awaits it
        import ray

        super().__init__(settings, node=ray.get_runtime_context().get_node_id()[:12])
        await self.start()

    def record_replica_metadata(self) -> dict[str, str]:
        """Read once by the router: the name in the ids that this replica mints."""
        return {"owner": self.owner}

    def record_routing_stats(self) -> dict[str, int]:
        return {"sessions": len(self._sessions) + self._opening}

    async def check_health(self) -> None:
        if self._start_error and not self._cells:
            raise RuntimeError(self._start_error)

    async def __del__(self) -> None:
        await self.stop()


def _claim_owner_number(root: Path) -> tuple[IO[str], int]:
    """A small number that no other live pool on this machine has; it is free again when this process ends."""
    for number in range(1024):
        file = open(root / f"owner-{number}.lock", "w")  # noqa: SIM115 - held open for as long as the pool lives
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
        else:
            return file, number
    raise BackendUnavailable(f"1024 sandbox pools already run on this machine ({root})")


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("a background task of the sandbox pool failed", exc_info=error)
