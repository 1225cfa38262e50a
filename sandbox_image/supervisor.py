"""PID 1 of a cell: owns the slots, answers the pool over gRPC on a Unix socket, ends when nobody speaks to it.

    python -m sandbox_image.supervisor --socket /run/cell/cell.sock --slots 8 --slot-root /s --uid-base 200000

Without `--uid-base` all sessions share this process's uid: then nothing separates them from each other or from the
supervisor, and the backend must give each session a cell of its own (or be the one that promises no isolation).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from collections import OrderedDict
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sandbox_image import limits
from sandbox_image.processes import Reaper, Zygote, ZygoteDied
from sandbox_image.slot import Limits, Outcome, Place, SessionProcess

_REMEMBERED = 16  # answers per session, for repeated call ids
_ZYGOTE_START_S = 60.0
_MESSAGE_BYTES = 64 << 20
_RETIRE_AFTER = 60_000  # uids of one cell; each session, and each rebuilt one, uses one up


class NoSlot(RuntimeError):
    """All slots are taken, or the cell takes no new session any more."""


@dataclass
class Session:
    """A session id, the process behind it now, and its last answers."""

    slot: int
    limits: Limits
    process: SessionProcess
    cells: int = 0
    lost: str = ""  # why the interpreter is not the one that ran the earlier cells; told once
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    answers: OrderedDict[str, asyncio.Task[Outcome]] = field(default_factory=OrderedDict)
    closing: bool = False


class Cell:
    """K slots. Every method is called from one event loop."""

    def __init__(
        self,
        *,
        zygote: Zygote,
        reaper: Reaper,
        slots: int,
        warm: int,
        root: Path,
        uid_base: int | None,
        shared: list[str],
        filtered: bool,
    ) -> None:
        self.sessions: dict[str, Session] = {}
        self.served = 0
        self.broken = ""
        self.slots = slots
        self._zygote, self._reaper = zygote, reaper
        self._warm_target, self._root, self._uid_base, self._shared = warm, root, uid_base, tuple(shared)
        self._filtered = filtered
        self._uids_used = 0
        self._free = list(range(slots))[::-1]  # slots without a process
        self._warm: list[tuple[int, SessionProcess]] = []
        self._filling = asyncio.Lock()
        self._background: set[asyncio.Task[None]] = set()

    @property
    def why_broken(self) -> str:
        if self._uids_used >= _RETIRE_AFTER:
            return f"{self._uids_used} sessions served"
        return self.broken or self._zygote.dead

    @property
    def free(self) -> int:
        return 0 if self.why_broken else len(self._free) + len(self._warm)

    @property
    def warm(self) -> int:
        return len(self._warm)

    async def fill(self) -> None:
        """Fork until enough warm sessions wait."""
        async with self._filling:
            while len(self._warm) < self._warm_target and self._free and not self.why_broken:
                slot = self._free.pop()
                try:
                    self._warm.append((slot, await self._fork(slot)))
                except (ZygoteDied, OSError) as error:
                    self._free.append(slot)
                    if not isinstance(error, BlockingIOError):
                        self.broken = self.broken or str(error)
                    return

    async def _fork(self, slot: int) -> SessionProcess:
        uid = None if self._uid_base is None else self._uid_base + self._uids_used
        self._uids_used += 1
        place = Place(directory=self._root / str(slot), uid=uid, filtered=self._filtered, shared=self._shared)
        process = SessionProcess(place, self._zygote, self._reaper)
        await process.start()
        return process

    async def open(self, session_id: str, wanted: Limits) -> None:
        if session_id in self.sessions:
            raise KeyError(session_id)
        while self._warm and self._warm[-1][1].death:  # died while it waited (the kernel was short of memory)
            slot, dead = self._warm.pop()
            await self._release(slot, dead)
        if not (self._warm or self._free):
            async with self._filling:  # the last free slot may be on its way to become a warm one
                pass
        if self.why_broken or not (self._warm or self._free):
            raise NoSlot(self.why_broken or f"all {self.slots} slots are taken")
        if self._warm:
            slot, process = self._warm.pop()
        else:
            slot = self._free.pop()
            try:
                process = await self._fork(slot)
            except BaseException:
                self._free.append(slot)
                raise
        self.sessions[session_id] = session = Session(slot, wanted, process)
        try:
            await process.open(wanted)
        except BaseException:
            self.sessions.pop(session_id, None)
            await self._release(slot, process)
            raise
        self.served += 1
        assert session.process is process
        self._later(self.fill())

    async def execute(
        self, session_id: str, code: str, *, timeout_s: float, call_id: str, keep: int
    ) -> tuple[Outcome, float]:
        """The outcome and the seconds it waited for earlier calls of the session. A known call id runs nothing."""
        session = self.sessions[session_id]
        began = time.monotonic()
        task = session.answers.get(call_id) if call_id else None
        if task is None:
            task = asyncio.create_task(self._run(session, code, timeout_s=timeout_s, keep=keep))
            if call_id:
                session.answers[call_id] = task
                while len(session.answers) > _REMEMBERED:
                    session.answers.popitem(last=False)
        outcome = await asyncio.shield(task)  # the caller may hang up; the cell runs on and its answer is remembered
        return outcome, max(0.0, time.monotonic() - began - outcome.duration_s)

    async def _run(self, session: Session, code: str, *, timeout_s: float, keep: int) -> Outcome:
        async with session.lock:
            if session.closing:
                return Outcome(status="session_died", state="lost", reason="closed while the call waited")
            if session.process.death:
                await self._rebuild(session)
            told, session.lost = session.lost, ""
            session.cells += 1
            outcome = await session.process.run(code, cell=session.cells, timeout_s=timeout_s, keep=keep)
            if told:
                outcome.state, outcome.reason = "lost", outcome.reason or told
            return outcome

    async def _rebuild(self, session: Session) -> None:
        """A fresh interpreter in the same slot, under a fresh uid."""
        session.lost = session.process.death
        left = await session.process.destroy()
        if left:
            self.broken = self.broken or left
            raise OSError(left)
        session.process = await self._fork(session.slot)
        await session.process.open(session.limits)

    async def close(self, session_id: str) -> bool:
        session = self.sessions.pop(session_id, None)
        if session is None:
            return False
        session.closing = True
        session.process.kill()  # ends a running cell, which then gives up the lock
        async with session.lock:
            await self._release(session.slot, session.process)
        self._later(self.fill())
        return True

    async def _release(self, slot: int, process: SessionProcess) -> None:
        try:
            left = await process.destroy()
        except (ZygoteDied, OSError) as error:
            left = str(error)
        if left:
            self.broken = self.broken or left
        else:
            self._free.append(slot)

    def _later(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def shutdown(self) -> None:
        for task in self._background:
            task.cancel()
        for session in self.sessions.values():
            session.process.kill()
        for _, process in self._warm:
            process.kill()
        closing: list[Awaitable[object]] = [self.close(session_id) for session_id in list(self.sessions)]
        closing += [self._release(slot, process) for slot, process in self._warm]
        self._warm = []
        self.broken = self.broken or "the supervisor is ending"
        await asyncio.gather(*closing, return_exceptions=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--slots", type=int, required=True)
    parser.add_argument("--warm", type=int, default=2)
    parser.add_argument("--slot-root", type=Path, required=True, help="directory with one subdirectory per slot")
    parser.add_argument("--uid-base", type=int, default=None)
    parser.add_argument(
        "--shared", action="append", default=[], help="a directory that sessions share, cleaned per uid"
    )
    parser.add_argument(
        "--idle-ttl", type=float, default=300.0, help="seconds of silence after which this process ends"
    )
    parser.add_argument("--die-with-parent", action="store_true")
    parser.add_argument("--seccomp", action="store_true", help="sessions filter their own system calls")
    return parser.parse_args()


async def _serve(args: argparse.Namespace, reaper: Reaper, zygote: Zygote) -> None:
    reaper.start()
    await zygote.ready(timeout_s=_ZYGOTE_START_S)
    for slot in range(args.slots):
        (args.slot_root / str(slot)).mkdir(exist_ok=True)
    cell = Cell(
        zygote=zygote,
        reaper=reaper,
        slots=args.slots,
        warm=min(args.warm, args.slots),
        root=args.slot_root,
        uid_base=args.uid_base,
        shared=args.shared,
        filtered=args.seccomp,
    )
    await cell.fill()
    # only now, with the zygote running, may gRPC start its threads
    from sandbox_image.service import serve

    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await serve(cell, zygote, socket=args.socket, idle_ttl_s=args.idle_ttl, stop=stop, message_bytes=_MESSAGE_BYTES)
    await cell.shutdown()


def main() -> None:
    args = _arguments()
    limits.set_dumpable(False)
    limits.become_subreaper()
    if args.die_with_parent:
        limits.die_with_parent()
    reaper = Reaper()
    zygote = Zygote(reaper)
    asyncio.run(_serve(args, reaper, zygote))
    sys.stdout.flush()
    os._exit(0)  # gRPC's threads have nothing left to say


if __name__ == "__main__":
    main()
