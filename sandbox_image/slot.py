"""One session as the supervisor sees it: its process, its pipes, its clock. Decides every status; believes no frame.

warm --open--> live --execute--> live                  frame with the right nonce
                 |----> timeout: SIGINT at t, again at t+1, SIGKILL at t+2
                 |----> dead: exit, signal, OOM, flood, protocol error; the next call forks a fresh interpreter
               close: kill the uid (or the tree), wipe the files, the slot is free again
"""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import shutil
import signal
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sandbox_image import frames
from sandbox_image.output import HeadTail
from sandbox_image.processes import Reaper, Zygote, describe_status, kill_strays, kill_tree, signal_group

FLOOD_BYTES = 64 << 20  # a cell that prints more is killed
SECOND_SIGINT_S = 1.0
KILL_S = 2.0
_FRAME_SLACK = 1 << 20  # a traceback, a value and JSON's own weight
_READ = 1 << 20
_DEFAULT_KEEP = 32 << 10
_START_S = 20.0
_KILL_WAIT_S = 5.0
_EOF_GRACE_S = 0.2


@dataclass(frozen=True)
class Place:
    """Where and as whom the sessions of one slot run. `uid` None: no uid of its own, killed by process tree."""

    directory: Path
    uid: int | None
    filtered: bool  # put the system call filter on the session
    shared: tuple[str, ...]  # directories that sessions share and that must be cleaned of one's files

    @property
    def home(self) -> str:
        return str(self.directory / "home")

    @property
    def tmp(self) -> str:
        return str(self.directory / "tmp")


@dataclass(frozen=True)
class Limits:
    memory_bytes: int
    processes: int
    file_bytes: int


@dataclass
class Outcome:
    """What became of one cell; the fields of `ExecuteReply`."""

    status: str
    state: str = "kept"
    result: str | None = None
    error: dict[str, str] | None = None
    duration_s: float = 0.0
    reason: str = ""
    cell: int = 0
    stdout: HeadTail = field(default_factory=lambda: HeadTail(0))
    stderr: HeadTail = field(default_factory=lambda: HeadTail(0))
    text: HeadTail = field(default_factory=lambda: HeadTail(0))


Kind = Literal["frame", "exit", "flood", "protocol", "eof", "unkillable"]
Event = tuple[Kind, Any]
_UNKILLABLE: Event = ("unkillable", None)


class SessionProcess:
    """A forked session. `start` makes a warm one; `run` is called by one caller at a time."""

    def __init__(self, place: Place, zygote: Zygote, reaper: Reaper) -> None:
        self.place = place
        self.pid = 0
        self.death = ""  # why it is unusable; empty while it lives
        self._zygote = zygote
        self._reaper = reaper
        self._loop = asyncio.get_running_loop()
        self._decoder = frames.Decoder(limit=_FRAME_SLACK)
        self._event: asyncio.Future[Event] | None = None
        self._nonce = ""
        self._printed = 0
        self.stdout, self.stderr, self.text = HeadTail(0), HeadTail(0), HeadTail(0)
        self._set_keep(_DEFAULT_KEEP)

    # life ------------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Fork it. Afterwards it waits for `open`."""
        ours, theirs = socket.socketpair()
        out_read, out_write = os.pipe()
        err_read, err_write = os.pipe()
        ours.setblocking(False)
        self._control, self._out, self._err = ours, out_read, err_read
        try:
            self.pid = await self._zygote.request(
                {
                    "op": "fork",
                    "uid": self.place.uid,
                    "home": self.place.home,
                    "tmp": self.place.tmp,
                    "supervisor": os.getpid(),
                    "filtered": self.place.filtered,
                },
                (theirs.fileno(), out_write, err_write),
            )
        except BaseException:
            for fd in (out_read, err_read):
                os.close(fd)
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(out_write)
            os.close(err_write)
        self.exit = self._reaper.claim(self.pid)
        self.exit.add_done_callback(self._on_exit)
        for fd in (out_read, err_read):
            os.set_blocking(fd, False)
            self._loop.add_reader(fd, self._on_output, fd)
        self._loop.add_reader(ours.fileno(), self._on_control)

    async def open(self, limits: Limits) -> None:
        """Apply the owner's limits, before any of the owner's code has run."""
        self._nonce = secrets.token_hex(8)
        self._event = self._loop.create_future()
        body = {
            "memory_bytes": limits.memory_bytes,
            "processes": limits.processes or None,
            "file_bytes": limits.file_bytes,
        }
        await self._send({"op": "open", "nonce": self._nonce, "limits": body})
        kind, value = await asyncio.wait_for(self._event, _START_S)
        self._event = None
        if kind != "frame":
            await asyncio.wait({self.exit}, timeout=_EOF_GRACE_S)
            self._drain()
            raise RuntimeError(f"a fresh session did not start: {self.text.text()[-1000:] or value or kind}")

    async def destroy(self) -> str:
        """Kill every process of the session and remove its files. Returns what could not be removed, in words."""
        self.death = self.death or "closed"
        self.kill()
        if self.pid:
            await asyncio.wait({self.exit}, timeout=_KILL_WAIT_S)
            self._loop.remove_reader(self._control.fileno())
            for fd in (self._out, self._err):
                self._loop.remove_reader(fd)
                os.close(fd)
            self._control.close()
        if self.place.uid is None:
            kill_strays(self._reaper)
        cleaner = self._reaper.claim(
            await self._zygote.request(
                {
                    "op": "clean",
                    "uid": self.place.uid,
                    "home": self.place.home,
                    "tmp": self.place.tmp,
                    "shared": self.place.shared,
                }
            )
        )
        done, _ = await asyncio.wait({cleaner}, timeout=_KILL_WAIT_S * 2)
        if not done or cleaner.result() != 0:
            return f"slot {self.place.directory.name} could not be cleaned"
        try:
            for directory in (self.place.home, self.place.tmp):
                os.rmdir(directory)
        except FileNotFoundError:  # it died before it had made them
            return ""
        except OSError as error:
            shutil.rmtree(self.place.directory, ignore_errors=True)
            return f"slot {self.place.directory.name} is not empty: {error}"
        return ""

    def kill(self) -> None:
        """At once; files and leftover children of another process group are `destroy`'s work."""
        if not self.pid or self.exit.done():
            return
        if self.place.uid is None:
            kill_tree(self.pid)
        else:
            signal_group(self.pid, signal.SIGKILL)

    # one cell --------------------------------------------------------------------------------------------------------

    async def run(self, code: str, *, cell: int, timeout_s: float, keep: int) -> Outcome:
        """Execute `code`; the clock starts here. A death is described in the outcome and remembered in `death`."""
        self._set_keep(keep)
        self._decoder.limit = _FRAME_SLACK + 8 * keep
        self._nonce = secrets.token_hex(8)
        self._event = event = self._loop.create_future()
        began = time.monotonic()
        timed_out = False

        def interrupt() -> None:
            nonlocal timed_out
            timed_out = True
            if not self.exit.done():
                signal_group(self.pid, signal.SIGINT)

        timers = [
            self._loop.call_later(timeout_s, interrupt),
            self._loop.call_later(timeout_s + SECOND_SIGINT_S, interrupt),
            self._loop.call_later(timeout_s + KILL_S, self.kill),
        ]
        ooms = oom_kills()
        try:
            await self._send({"op": "run", "nonce": self._nonce, "code": code, "cell": cell, "keep": keep})
            await asyncio.wait({event}, timeout=timeout_s + KILL_S + _KILL_WAIT_S)
            kind, value = _UNKILLABLE if not event.done() else event.result()
        finally:
            for timer in timers:
                timer.cancel()
            self._event = None
        self._drain()
        outcome = Outcome(status="ok", cell=cell, stdout=self.stdout, stderr=self.stderr, text=self.text)
        self._printed = 0
        if kind == "frame":
            error = value.get("error")
            outcome.error = {k: str(error.get(k, "")) for k in ("name", "value", "traceback")} if error else None
            outcome.result = None if value.get("result") is None else str(value["result"])[:keep]
            outcome.status = "timeout" if timed_out else "ok" if value.get("ok") is True else "error"
        else:
            outcome.state = "lost"
            outcome.status, outcome.reason = await self._death(kind, value, timed_out=timed_out, ooms=ooms)
            self.death = outcome.reason
        outcome.duration_s = time.monotonic() - began
        self._set_keep(keep)  # what comes from now on belongs to the next cell
        return outcome

    async def _death(self, kind: Kind, value: Any, *, timed_out: bool, ooms: int) -> tuple[str, str]:
        if kind == "eof":  # its own end of the channel is closed: it is dying, or the cell closed our descriptor
            await asyncio.wait({self.exit}, timeout=_EOF_GRACE_S)
            if not self.exit.done():
                self.kill()
                return "session_died", "the cell closed the interpreter's own channel"
            kind, value = "exit", self.exit.result()
        if kind == "unkillable":
            return "timeout", "it could not be killed"
        if kind == "exit":
            if timed_out:
                return "timeout", "it ignored two interrupts and was killed"
            if os.WIFSIGNALED(value) and os.WTERMSIG(value) == signal.SIGKILL and oom_kills() > ooms:
                return "oom", "killed for want of memory"
            return "session_died", f"the interpreter {describe_status(value)}"
        self.kill()
        await asyncio.wait({self.exit}, timeout=_KILL_WAIT_S)
        if kind == "flood":
            return "output_limit", f"it printed more than {FLOOD_BYTES >> 20} MB"
        return "protocol_error", str(value)

    async def _send(self, message: dict[str, Any]) -> None:
        try:
            await self._loop.sock_sendall(self._control, frames.encode(message))
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.EBADF):
                raise
            self._resolve("eof", None)

    def _resolve(self, kind: Kind, value: Any) -> None:
        if self._event is not None and not self._event.done():
            self._event.set_result((kind, value))
        elif kind == "flood":
            self.death = self.death or str(value)
            self.kill()
        elif kind == "eof":  # between calls: its exit status, if it is dying, says more
            self._loop.call_later(_EOF_GRACE_S, self._channel_closed)

    def _channel_closed(self) -> None:
        if not self.death:
            self.death = "it closed the interpreter's own channel"
            self.kill()

    # what comes out of it --------------------------------------------------------------------------------------------

    def _on_exit(self, status: asyncio.Future[int]) -> None:
        self._on_control()  # a frame that it sent before it died still counts
        if self._event is not None and not self._event.done():
            self._event.set_result(("exit", status.result()))
        self.death = self.death or f"the interpreter {describe_status(status.result())}"

    def _on_control(self) -> None:
        try:
            data = self._control.recv(_READ)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            if self._control.fileno() >= 0:
                self._loop.remove_reader(self._control.fileno())
            self._resolve("eof", None)
            return
        try:
            for frame in self._decoder.feed(data):
                if frame.get("nonce") != self._nonce or self._event is None or self._event.done():
                    self._resolve_protocol("a frame that answers no call of ours")
                    return
                self._resolve("frame", frame)
        except frames.BadFrame as error:
            self._resolve_protocol(str(error))

    def _resolve_protocol(self, why: str) -> None:
        if self._event is not None and not self._event.done():
            self._event.set_result(("protocol", why))
        else:
            self.death = self.death or why
            self.kill()

    def _on_output(self, fd: int, limit: int = _READ) -> int:
        try:
            data = os.read(fd, min(_READ, limit))
        except (BlockingIOError, InterruptedError):
            return 0
        if not data:
            self._loop.remove_reader(fd)
            return 0
        (self.stdout if fd == self._out else self.stderr).write(data)
        self.text.write(data)
        self._printed += len(data)
        if self._printed > FLOOD_BYTES:
            self._resolve("flood", f"it printed more than {FLOOD_BYTES >> 20} MB")
        return len(data)

    def _drain(self) -> None:
        """What was printed before the frame is in the pipes already; a thread that prints on must not hold us."""
        for fd in (self._out, self._err):
            left = 1 << 20
            while left > 0 and (got := self._on_output(fd, left)):
                left -= got

    def _set_keep(self, keep: int) -> None:
        """Start a cell's buffers. What background threads printed since the last cell belongs to this one."""
        old = (self.stdout, self.stderr, self.text) if self._printed else ()
        self.stdout, self.stderr, self.text = fresh = HeadTail(keep), HeadTail(keep), HeadTail(keep)
        self._printed = 0
        for buffer, earlier in zip(fresh, old, strict=False):
            buffer.write(earlier.text().encode())


def oom_kills() -> int:
    """How many processes of this cell the kernel killed for memory; cgroup v2, then v1, 0 where neither tells."""
    for path in ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control"):
        try:
            with open(path) as file:
                for line in file:
                    key, _, value = line.partition(" ")
                    if key == "oom_kill":
                        return int(value)
        except (OSError, ValueError):
            continue
    return 0
