"""The slots of one cell and the sessions in them: who gets which, who waits for whom, what is left when one ends.

Every method is called from one event loop. Locks are taken in this order: a session's `lock`, its `files`, its
family's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from sandbox_image import files, limits
from sandbox_image.family import Family, Session
from sandbox_image.file_helper import LIST_ROOM, FileTrouble
from sandbox_image.outcome import Outcome
from sandbox_image.output import Tap
from sandbox_image.place import Limits, Place
from sandbox_image.proc import is_live, name_of
from sandbox_image.processes import Forker, ForkerDied, Reaper
from sandbox_image.slot import CannotFork, NoRoom, SessionProcess

_RETIRE_AFTER = 60_000  # uids of one cell; each session, and each rebuilt one, uses one up


class Cell:
    def __init__(
        self,
        *,
        zygote: Forker,
        attendant: Forker,
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
        self._zygote, self._attendant, self._reaper = zygote, attendant, reaper
        self._warm_target, self._root, self._uid_base, self._shared = warm, root, uid_base, tuple(shared)
        self._filtered = filtered
        self._uids_used = 0
        self._free = list(range(slots))[::-1]  # slots without a process
        self._warm: list[tuple[int, SessionProcess]] = []
        self._filling = asyncio.Lock()
        self._background: set[asyncio.Task[Any]] = set()

    @property
    def why_broken(self) -> str:
        if self._uids_used >= _RETIRE_AFTER:
            return f"{self._uids_used} sessions served"
        return self.broken or self._zygote.dead or self._attendant.dead

    @property
    def free(self) -> int:
        return 0 if self.why_broken else len(self._free) + len(self._warm)

    @property
    def warm(self) -> int:
        return len(self._warm)

    @property
    def busy(self) -> bool:
        """A cell runs, whether or not its caller still waits for it."""
        return any(session.lock.locked() for session in self.sessions.values())

    # birth -----------------------------------------------------------------------------------------------------------

    async def fill(self) -> None:
        """Fork until enough warm sessions wait."""
        async with self._filling:
            while len(self._warm) < self._warm_target and self._free and not self.why_broken:
                slot = self._free.pop()
                try:
                    self._warm.append((slot, await self._fork(slot)))
                except (ForkerDied, OSError) as error:
                    self._free.append(slot)
                    if not isinstance(error, BlockingIOError):
                        self.broken = self.broken or str(error)
                    return

    def _directory(self, slot: int) -> Path:
        return self._root / str(slot)

    async def _fork(self, slot: int, *, directory: Path | None = None) -> SessionProcess:
        """An interpreter under a uid that was never used, in the slot's own directory unless told otherwise."""
        uid = None if self._uid_base is None else self._uid_base + self._uids_used
        self._uids_used += 1
        place = Place(directory or self._directory(slot), uid=uid, filtered=self._filtered, shared=self._shared)
        process = SessionProcess(place, self._zygote, self._attendant, self._reaper)
        await process.start()
        return process

    async def open(self, session_id: str, wanted: Limits) -> None:
        """Raises `NoRoom`; KeyError when the id is in use."""
        if session_id in self.sessions:
            raise KeyError(session_id)
        while self._warm and self._warm[-1][1].death:  # died while it waited (the kernel was short of memory)
            slot, dead = self._warm.pop()
            await self._release(slot, dead)
        if not (self._warm or self._free):
            async with self._filling:  # the last free slot may be on its way to become a warm one
                pass
        if self.why_broken or not (self._warm or self._free):
            raise NoRoom(self.why_broken or f"all {self.slots} slots are taken")
        if self._warm:
            slot, process = self._warm.pop()
        else:
            slot = self._free.pop()
            try:
                process = await self._fork(slot)
            except BaseException:
                self._free.append(slot)
                raise
        family = Family(name=session_id, slot=slot, members={session_id})
        session = self.sessions[session_id] = Session(family, wanted, process)
        try:
            async with session.lock:
                await process.open(wanted)
        except BaseException:
            if self.sessions.pop(session_id, None) is not None:  # `close` tidies up after itself
                await self._release(slot, process)
            raise
        self.served += 1
        self._later(self.fill())

    async def fork(self, session_id: str, new_ids: Sequence[str]) -> None:
        """Copies of the session after its last cell; all of them or none. Raises `CannotFork`, `NoRoom`, KeyError."""
        session = self.sessions[session_id]
        family = session.family
        if len({*new_ids, *self.sessions}) < len(new_ids) + len(self.sessions):
            raise KeyError("a new session id is in use")
        made: list[SessionProcess] = []
        async with session.lock, session.files, family.lock:
            if session.closing or session.process.death:
                raise CannotFork(f"it has ended: {session.process.death or 'it is being closed'}")
            if len(family.members) + len(new_ids) > limits.MEMBERS:
                raise NoRoom(f"a session and its copies are {limits.MEMBERS} at most, {len(family.members)} are there")
            await self._refuse_daemons(session)
            try:
                for _ in new_ids:
                    place = family.new_place(self._directory(family.slot), like=session.process.place)
                    made.append(await session.process.branch(place))
            except BaseException:
                for copy in made:
                    await self._discard(copy, alone=False)
                raise
            for new_id, copy in zip(new_ids, made, strict=True):
                family.members.add(new_id)
                self.sessions[new_id] = Session(family, session.limits, copy, cells=session.cells)
            self.served += len(made)

    async def _refuse_daemons(self, session: Session) -> None:
        """What has left the session's tree is a live child of it all the same; a copy would lack it, too."""
        uid = session.process.place.uid
        async with self._reaper.births:
            daemons = [] if uid is None else [pid for pid in self._reaper.strays(uid) if is_live(pid)]
        if daemons:
            raise CannotFork(f"live child processes: {', '.join(f'{pid} ({name_of(pid)})' for pid in daemons[:8])}")

    # cells -----------------------------------------------------------------------------------------------------------

    async def execute(
        self,
        session_id: str,
        code: str,
        *,
        timeout_s: float,
        call_id: str,
        keep: int,
        with_figures: bool = False,
        tap: Tap | None = None,
    ) -> tuple[Outcome, float]:
        """The outcome and the seconds it waited for earlier calls of the session. A known call id runs nothing and
        streams nothing. `tap` is finished in any case."""
        session = self.sessions[session_id]
        began = time.monotonic()
        task = session.answers.get(call_id) if call_id else None
        if task is None:
            run = self._run(session, code, timeout_s=timeout_s, keep=keep, with_figures=with_figures, tap=tap)
            task = self._later(run)
            if call_id:
                session.remember(call_id, task)
        elif tap is not None:
            tap.finish()
        outcome = await asyncio.shield(task)  # the caller may hang up; the cell runs on and its answer is remembered
        return outcome, max(0.0, time.monotonic() - began - outcome.duration_s)

    async def _run(
        self, session: Session, code: str, *, timeout_s: float, keep: int, with_figures: bool, tap: Tap | None
    ) -> Outcome:
        resets = session.resets
        try:
            async with session.lock:
                if session.process.death and not session.has_moved_on(resets):
                    session.lost = session.process.death
                    await self._renew(session)
                if session.has_moved_on(resets):
                    why = "closed" if session.closing else "reset"
                    return Outcome(status="session_died", state="lost", reason=f"{why} while the call waited")
                told, session.lost = session.lost, ""
                session.cells += 1
                outcome = await session.process.run(
                    code, cell=session.cells, timeout_s=timeout_s, keep=keep, with_figures=with_figures, tap=tap
                )
                if told:
                    outcome.state, outcome.reason = "lost", outcome.reason or told
                return outcome
        finally:
            if tap is not None:
                tap.finish()

    async def _renew(self, session: Session) -> None:
        """A fresh interpreter in the same directory, under a fresh uid; a member of a family keeps the family's."""
        old = session.process
        async with session.files, session.family.lock:
            alone = session.alone
            left = await old.destroy(alone=alone)
            if left:
                self.broken = self.broken or left
                raise OSError(left)
            if alone:
                session.process = await self._fork(session.family.slot, directory=old.place.directory)
            else:
                session.process = SessionProcess(old.place, self._zygote, self._attendant, self._reaper, by_tree=True)
                await session.process.start()
            await session.process.open(session.limits, in_family=not alone)

    def interrupt(self, session_id: str) -> bool:
        """Ctrl-C to the cell that runs now. False when none does."""
        return self.sessions[session_id].process.interrupt()

    async def reset(self, session_id: str) -> None:
        """As if freshly opened. A running cell ends, calls that wait are answered without being run."""
        session = self.sessions[session_id]
        session.resets += 1
        session.process.end("it was reset")
        async with session.lock:
            if session.closing:
                raise KeyError(session_id)
            session.answers.clear()
            session.cells, session.lost = 0, ""
            await self._renew(session)

    # files -----------------------------------------------------------------------------------------------------------

    async def write_file(self, session_id: str, path: str, content: bytes) -> None:
        await self._touch(session_id, {"kind": "write", "path": path}, content=content)

    async def read_file(self, session_id: str, path: str, *, max_bytes: int) -> bytes:
        request = {"kind": "read", "path": path, "max_bytes": max_bytes}
        return (await self._touch(session_id, request, room=max_bytes))[1]

    async def list_files(self, session_id: str) -> tuple[list[tuple[str, int, float]], bool]:
        """Path, size and time of each, and whether there are more."""
        header, body = await self._touch(session_id, {"kind": "list"}, room=LIST_ROOM)
        return files.listed(body), header.get("truncated") is True

    async def _touch(
        self, session_id: str, request: dict[str, Any], *, content: bytes = b"", room: int = 0
    ) -> tuple[dict[str, Any], bytes]:
        """Beside a running cell, never while the session changes its place. Raises `FileTrouble`."""
        session = self.sessions[session_id]
        async with session.files:
            if session.closing:
                raise FileTrouble("not_found", "the session was closed")
            place = session.process.place
            request |= {"uid": place.uid, "home": place.home, "file_bytes": session.limits.file_bytes}
            return await files.touch(self._attendant, request, content=content, room=room)

    # end -------------------------------------------------------------------------------------------------------------

    async def close(self, session_id: str) -> bool:
        session = self.sessions.pop(session_id, None)
        if session is None:
            return False
        session.closing = True
        session.process.end("it was closed")  # a running cell then gives up the lock
        family = session.family
        async with session.lock, session.files, family.lock:
            family.members.discard(session_id)
            if not family.members:
                await self._release(family.slot, session.process)
            else:
                await self._discard(session.process, alone=False)
        self._later(self.fill())
        return True

    async def _release(self, slot: int, process: SessionProcess) -> None:
        if await self._discard(process, alone=True):
            self._free.append(slot)

    async def _discard(self, process: SessionProcess, *, alone: bool) -> bool:
        """False when something of it is left; then the cell is broken."""
        try:
            left = await process.destroy(alone=alone)
        except (ForkerDied, OSError) as error:
            left = str(error)
        if process.place.directory.parent != self._root:
            process.place.remove()
        self.broken = self.broken or left
        return not left

    def _later(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """The event loop itself keeps no task alive."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    async def shutdown(self) -> None:
        self.broken = self.broken or "the supervisor is ending"
        async with self._filling:  # it ends by itself now
            pass
        for session in self.sessions.values():
            session.process.end("the supervisor is ending")
        for _, process in self._warm:
            process.kill()
        closing: list[Awaitable[object]] = [self.close(session_id) for session_id in list(self.sessions)]
        closing += [self._release(slot, process) for slot, process in self._warm]
        self._warm = []
        await asyncio.gather(*closing, return_exceptions=True)
