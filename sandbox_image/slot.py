"""One session as the supervisor sees it: its process, its pipes, its clock. Decides every status; believes no frame.

warm --open--> live --execute--> live                  frame with the right nonce
                 |----> timeout: SIGINT at t, again at t+1, SIGKILL at t+2
                 |----> dead: exit, signal, OOM, flood, protocol error; the next call forks a fresh interpreter
                 |----> branch: copies of it (branch.py), with the same uid in the same slot
               close: kill the uid (or the tree), wipe the files, the slot is free again
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable
from typing import Any, Literal

from sandbox_image import figures, frames, newborn, proc
from sandbox_image.outcome import Outcome, oom_kills
from sandbox_image.output import HeadTail, Tap
from sandbox_image.place import Limits, Place, Wires
from sandbox_image.processes import Child, Forker, Reaper

FLOOD_BYTES = 64 << 20  # a cell that prints more is killed
SECOND_SIGINT_S = 1.0
KILL_S = 2.0
_FRAME_SLACK = 1 << 20  # a traceback, a value and JSON's own weight
_READ = 1 << 16  # what a pipe holds; a larger buffer would be mapped and unmapped for every read
_DEFAULT_KEEP = 32 << 10
_START_S = 20.0
_FORK_S = 10.0
_KILL_WAIT_S = 5.0
_EOF_GRACE_S = 0.2

Kind = Literal["frame", "exit", "flood", "protocol", "eof", "silence"]
Event = tuple[Kind, Any]


class CannotFork(RuntimeError):
    """The session has no faithful copy now; the message says why."""


class NoRoom(RuntimeError):
    """No slot, no process, no memory, no disk: nothing was made."""


class _Clock:
    """The time limit of one cell: an interrupt when it is over, another, and the end."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        timeout_s: float,
        *,
        interrupt: Callable[[], object],
        kill: Callable[[], object],
    ) -> None:
        self.struck = False
        self._loop = loop
        self._steps = iter([(interrupt, SECOND_SIGINT_S), (interrupt, KILL_S - SECOND_SIGINT_S), (kill, None)])
        self._timer = loop.call_later(timeout_s, self._strike)

    def _strike(self) -> None:
        self.struck = True
        step, pause_s = next(self._steps)
        step()
        if pause_s is not None:
            self._timer = self._loop.call_later(pause_s, self._strike)

    def stop(self) -> None:
        self._timer.cancel()


class SessionProcess:
    """A forked session. `start` makes a warm one; `run` and `branch` are called by one caller at a time."""

    def __init__(
        self, place: Place, zygote: Forker, attendant: Forker, reaper: Reaper, *, by_tree: bool = False
    ) -> None:
        self.place = place
        self.by_tree = by_tree or place.uid is None  # its uid is not its alone: it is killed by its process tree
        self.child: Child | None = None
        self.death = ""  # why it is unusable; empty while it lives
        self._word = ""  # on whose word it was ended
        self._zygote, self._attendant, self._reaper = zygote, attendant, reaper
        self._loop = asyncio.get_running_loop()
        self._decoder = frames.Decoder(limit=_FRAME_SLACK)
        self._event: asyncio.Future[Event] | None = None
        self._nonce = ""
        self._runs = False
        self._was_interrupted = False  # since it was last asked something
        self._tap: Tap | None = None
        self._printed = 0
        self.stdout, self.stderr, self.text = HeadTail(0), HeadTail(0), HeadTail(0)
        self._set_keep(_DEFAULT_KEEP)

    # life ------------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Fork it. Afterwards it waits for `open`."""
        request = {
            "op": "fork",
            "uid": self.place.uid,
            "home": self.place.home,
            "tmp": self.place.tmp,
            "supervisor": os.getpid(),
            "filtered": self.place.filtered,
            "by_tree": self.by_tree,
        }
        wires = Wires()
        try:
            child = await self._zygote.request(request, wires.theirs)
        except BaseException:
            wires.close()
            raise
        finally:
            wires.close_theirs()
        self._attach(wires, child)

    def _attach(self, wires: Wires, child: Child) -> None:
        self._wires, self.child = wires, child
        child.exit.add_done_callback(self._on_exit)
        for fd in (wires.stdout, wires.stderr):
            self._loop.add_reader(fd, self._on_output, fd)
        self._loop.add_reader(wires.control.fileno(), self._on_control)

    async def open(self, limits: Limits, *, in_family: bool = False) -> None:
        """Apply the owner's limits, before any of the owner's code has run. `in_family`: others have its uid."""
        body = {
            "memory_bytes": limits.memory_bytes,
            "processes": limits.processes or None,
            "file_bytes": limits.file_bytes,
        }
        kind, value = await self._ask({"op": "open", "limits": body, "in_family": in_family}, wait_s=_START_S)
        if kind != "frame":
            await asyncio.wait({self._exit}, timeout=_EOF_GRACE_S)
            self._drain()
            raise RuntimeError(f"a fresh session did not start: {self.text.text()[-1000:] or value or kind}")

    async def branch(self, place: Place) -> SessionProcess:
        """A copy of this session as it is now, in `place`. Raises `CannotFork`, `NoRoom`; then none was made."""
        self.by_tree = True
        copy = SessionProcess(place, self._zygote, self._attendant, self._reaper, by_tree=True)
        try:
            place.make()
            # without a uid that tells, any unclaimed child may be taken for a stray
            async with self._reaper.births if place.uid is None else contextlib.nullcontext():
                copy._attach(*await self._bear(place))
        except BaseException as error:
            await copy.destroy(alone=False)
            place.remove()
            if isinstance(error, (TimeoutError, frames.BadFrame)):
                raise CannotFork(f"its copy did not come to life: {error or 'no answer'}") from None
            if isinstance(error, OSError):
                raise NoRoom(str(error)) from None
            raise
        return copy

    async def _bear(self, place: Place) -> tuple[Wires, Child]:
        wires, nonce = Wires(), secrets.token_hex(8)
        request = {"op": "fork", "copy_nonce": nonce, "from": self.place.directories, "to": place.directories}
        try:
            newborn.ask_who(wires.control)
            try:
                kind, value = await self._ask(request, wait_s=_FORK_S, fds=wires.theirs)
            finally:
                wires.close_theirs()
            if kind != "frame":
                raise CannotFork(f"it died while it was copied: {self.death or value or kind}")
            self._accept(value)
            async with asyncio.timeout(_FORK_S):
                pid, answer = await newborn.hello(wires.control, uid=place.uid, nonce=nonce)
            self._accept(answer)
            if not self._reaper.is_stray(pid):
                raise CannotFork("its copy is not where it should be")
            return wires, self._reaper.claim(pid)
        except BaseException:
            wires.close()
            raise

    @staticmethod
    def _accept(answer: dict[str, Any]) -> None:
        if "no_room" in answer:
            raise NoRoom(str(answer["no_room"])[:1000])
        if answer.get("ok") is not True:
            raise CannotFork(str(answer.get("refused", "no reason given"))[:1000])

    async def destroy(self, *, alone: bool) -> str:
        """Kill every process of the session and remove its files. `alone`: its uid ends with it. Returns what could
        not be removed, in words. May be called again after a failure."""
        self.death = self.death or "closed"
        self.kill()
        if self.child is not None and not self._wires.closed:
            await asyncio.wait({self._exit}, timeout=_KILL_WAIT_S)
            for fd in (self._wires.control.fileno(), self._wires.stdout, self._wires.stderr):
                self._loop.remove_reader(fd)
            self._wires.close()
        if self.by_tree:
            await self._reaper.kill_strays(self.place.uid)
        return await self.place.clean(self._attendant, alone=alone)

    def end(self, why: str) -> None:
        """Kill it on somebody's word, which a running cell's answer repeats."""
        self._word = self._word or why
        self.death = self.death or why
        self.kill()

    def kill(self) -> None:
        """At once; files and leftover children of another process group are `destroy`'s work."""
        if self.child is None or self._exit.done():
            return
        if self.by_tree:
            proc.kill_tree(self.child.pid)
        else:
            proc.signal_group(self.child.pid, signal.SIGKILL)

    def interrupt(self) -> bool:
        """Ctrl-C to the cell that runs now. False when none does."""
        if not self._runs or self.child is None or self._exit.done():
            return False
        self._was_interrupted = True
        proc.signal_group(self.child.pid, signal.SIGINT)
        return True

    @property
    def pid(self) -> int:
        return 0 if self.child is None else self.child.pid

    @property
    def _exit(self) -> asyncio.Future[int]:
        assert self.child is not None
        return self.child.exit

    # one cell --------------------------------------------------------------------------------------------------------

    async def run(
        self, code: str, *, cell: int, timeout_s: float, keep: int, with_figures: bool, tap: Tap | None
    ) -> Outcome:
        """Execute `code`; the clock starts here. A death is described in the outcome and remembered in `death`."""
        self._tap = tap
        self._set_keep(keep)
        began = time.monotonic()
        clock = _Clock(self._loop, timeout_s, interrupt=self.interrupt, kill=self.kill)
        ooms = oom_kills()
        request = {"op": "run", "code": code, "cell": cell, "keep": keep, "figures": with_figures}
        kind: Kind = "frame"
        try:
            if self._was_interrupted:  # perhaps too late for that cell: let it not hit this one
                kind, value = await self._ask({"op": "settle"}, wait_s=_START_S)
            if kind == "frame":
                self._runs = True
                kind, value = await self._ask(
                    request,
                    wait_s=timeout_s + KILL_S + _KILL_WAIT_S,
                    room=8 * keep + (figures.FRAME_BYTES if with_figures else 0),
                )
        finally:
            self._runs = False
            clock.stop()
        self._drain()
        self._tap = None
        outcome = Outcome(status="ok", cell=cell, stdout=self.stdout, stderr=self.stderr, text=self.text)
        self._printed = 0
        if kind == "frame":
            try:
                outcome.take(value, keep=keep, timed_out=clock.struck)
            except frames.BadFrame as error:
                kind, value = "protocol", str(error)
        if kind != "frame":
            outcome.state = "lost"
            outcome.status, outcome.reason = await self._death(kind, value, timed_out=clock.struck, ooms=ooms)
            self.death = outcome.reason
        outcome.duration_s = time.monotonic() - began
        self._set_keep(keep)  # what comes from now on belongs to the next cell
        return outcome

    async def _death(self, kind: Kind, value: Any, *, timed_out: bool, ooms: int) -> tuple[str, str]:
        if self._word and kind in ("exit", "eof"):
            await asyncio.wait({self._exit}, timeout=_KILL_WAIT_S)
            return "session_died", self._word
        if kind == "eof":  # its own end of the channel is closed: it is dying, or the cell closed our descriptor
            await asyncio.wait({self._exit}, timeout=_EOF_GRACE_S)
            if not self._exit.done():
                self.kill()
                return "session_died", "the cell closed the interpreter's own channel"
            kind, value = "exit", self._exit.result()
        if kind == "silence":
            return "timeout", "it could not be killed"
        if kind == "exit":
            if timed_out:
                return "timeout", "it ignored two interrupts and was killed"
            if os.WIFSIGNALED(value) and os.WTERMSIG(value) == signal.SIGKILL and oom_kills() > ooms:
                return "oom", "killed for want of memory"
            return "session_died", f"the interpreter {proc.describe_status(value)}"
        self.kill()
        await asyncio.wait({self._exit}, timeout=_KILL_WAIT_S)
        if kind == "flood":
            return "output_limit", f"it printed more than {FLOOD_BYTES >> 20} MB"
        return "protocol_error", str(value)

    async def _ask(self, message: dict[str, Any], *, wait_s: float, room: int = 0, fds: tuple[int, ...] = ()) -> Event:
        """Send a frame with a nonce of its own and wait for its answer, or for what happens instead."""
        self._decoder.limit = _FRAME_SLACK + room
        self._was_interrupted = False
        self._nonce = secrets.token_hex(8)
        self._event = event = self._loop.create_future()
        data = frames.encode({**message, "nonce": self._nonce})
        try:
            if fds:  # they come with the first byte; it is idle, so its buffer has room for a short frame
                data = data[socket.send_fds(self._wires.control, [data], fds) :]
            await self._loop.sock_sendall(self._wires.control, data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.EBADF, errno.EAGAIN):
                raise
            self._resolve("eof", None)
        silence = self._loop.call_later(wait_s, self._resolve, "silence", None)
        try:
            return await event
        finally:
            silence.cancel()
            self._event = None

    def _resolve(self, kind: Kind, value: Any) -> None:
        if self._event is not None and not self._event.done():
            self._event.set_result((kind, value))
        elif kind in ("flood", "protocol"):
            self.end(str(value))
        elif kind == "eof":  # between calls: its exit status, if it is dying, says more
            self._loop.call_later(_EOF_GRACE_S, self.end, "it closed the interpreter's own channel")

    # what comes out of it --------------------------------------------------------------------------------------------

    def _on_exit(self, status: asyncio.Future[int]) -> None:
        self._on_control()  # a frame that it sent before it died still counts
        if self._event is not None and not self._event.done():
            self._event.set_result(("exit", status.result()))
        else:
            self.death = self.death or f"the interpreter {proc.describe_status(status.result())}"

    def _on_control(self) -> None:
        control = self._wires.control
        try:
            data = control.recv(_READ)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            if control.fileno() >= 0:
                self._loop.remove_reader(control.fileno())
            self._resolve("eof", None)
            return
        try:
            for frame in self._decoder.feed(data):
                if frame.get("nonce") != self._nonce or self._event is None or self._event.done():
                    raise frames.BadFrame("a frame that answers no call of ours")
                self._resolve("frame", frame)
        except frames.BadFrame as error:
            self._resolve("protocol", str(error))

    def _on_output(self, fd: int, limit: int = _READ) -> int:
        try:
            data = os.read(fd, min(_READ, limit))
        except (BlockingIOError, InterruptedError):
            return 0
        if not data:
            self._loop.remove_reader(fd)
            return 0
        is_stderr = fd == self._wires.stderr
        (self.stderr if is_stderr else self.stdout).write(data)
        self.text.write(data)
        if self._tap is not None:
            self._tap.write(data, is_stderr=is_stderr)
        self._printed += len(data)
        if self._printed > FLOOD_BYTES:
            self._resolve("flood", f"it printed more than {FLOOD_BYTES >> 20} MB")
        return len(data)

    def _drain(self) -> None:
        """What was printed before the frame is in the pipes already; a thread that prints on must not hold us."""
        for fd in (self._wires.stdout, self._wires.stderr):
            left = 1 << 20
            while left > 0 and (got := self._on_output(fd, left)):
                left -= got

    def _set_keep(self, keep: int) -> None:
        """Start a cell's buffers. What background threads printed since the last cell belongs to this one."""
        old = (self.stdout, self.stderr, self.text) if self._printed else ()
        self.stdout, self.stderr, self.text = fresh = HeadTail(keep), HeadTail(keep), HeadTail(keep)
        self._printed = 0
        for buffer, earlier in zip(fresh, old, strict=False):
            data = earlier.text().encode()
            buffer.write(data)
            if self._tap is not None and buffer is not self.text:
                self._tap.write(data, is_stderr=buffer is self.stderr)
