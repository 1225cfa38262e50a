"""A session: one live interpreter that runs cells until it is killed. Nothing it says is trusted beyond its own output.

Frames from the supervisor: `{"op": "open", "limits"}` once, then `{"op": "run", "code", "cell", "keep", "figures"}`,
`{"op": "fork", ...}` (branch.py) and `{"op": "settle"}`. Each has a nonce and is answered by exactly one frame with the
same nonce. What a cell prints goes through fds 1 and 2.

An interrupt is a SIGINT, which does not say for which cell it is meant. So the supervisor sends it only between a
cell's request and its answer, and when it has sent one, "settle" before the next cell: a signal that came too late is
taken, and forgotten, before that is answered.
"""

from __future__ import annotations

import ast
import enum
import fcntl
import io
import itertools
import linecache
import math
import os
import signal
import socket
import struct
import sys
import termios
import time
import traceback
import types
from typing import Any

from sandbox_image import branch, figures, frames, limits

_PRIVATE_FD = 200  # ours live above what user code opens, so that its first file is fd 3
_ORDER_WAIT_S = 0.02  # stdout then stderr: give the supervisor this long to read the first before the second
_TRACEBACK_CHARS = 64 << 10
_VALUE_CHARS = 8 << 10


class _Pipe(io.RawIOBase):
    """One of the two output pipes. Before the stream changes, waits until the other one has been read, which keeps the
    interleaving of prints to stdout and stderr in order."""

    last: _Pipe | None = None

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def write(self, data: Any) -> int:
        other, _Pipe.last = _Pipe.last, self
        if other is not None and other is not self:
            other.wait_until_read()
        return os.write(self._fd, data)

    def wait_until_read(self) -> None:
        deadline = time.monotonic() + _ORDER_WAIT_S
        while self._unread() and time.monotonic() < deadline:
            time.sleep(0.0001)

    def _unread(self) -> int:
        try:
            return int(struct.unpack("i", fcntl.ioctl(self._fd, termios.FIONREAD, b"\0\0\0\0"))[0])
        except OSError:
            return 0


def _stream(fd: int) -> io.TextIOWrapper:
    buffered = io.BufferedWriter(_Pipe(fd), 1 << 16)
    return io.TextIOWrapper(buffered, encoding="utf-8", errors="backslashreplace", line_buffering=True)


class Phase(enum.Enum):
    """What an interrupt means now."""

    WAITING = enum.auto()  # no cell, or it is over: nothing, unless the next one is on its way already
    STARTING = enum.auto()  # there is one to be taken: it is interrupted as soon as it begins
    RUNNING = enum.auto()


class Interpreter:
    """The namespace and the streams; `run` executes one cell and describes its end as a frame body."""

    def __init__(self, channel: frames.Channel) -> None:
        self.pid = os.getpid()
        self.channel = channel
        self.phase = Phase.WAITING
        self._interrupted = False
        self._saved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _PRIVATE_FD) for fd in (0, 1, 2)]
        self._identity = tuple(_identity(fd) for fd in (0, 1, 2))
        self.module = types.ModuleType("__main__")
        sys.modules["__main__"] = self.module
        sys.argv = [""]
        sys.path[:] = ["", *(entry for entry in sys.path if entry not in ("", "."))]
        self.module.__dict__.update(preamble())
        self._open_streams()

    def _open_streams(self) -> None:
        _Pipe.last = None
        sys.stdin = sys.__stdin__ = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))  # type: ignore[misc]
        self.stdout = sys.stdout = sys.__stdout__ = _stream(1)  # type: ignore[misc]
        self.stderr = sys.stderr = sys.__stderr__ = _stream(2)  # type: ignore[misc]

    def _repair(self) -> None:
        """A cell may have closed or redirected what the next one prints to."""
        broken = tuple(_identity(fd) for fd in (0, 1, 2)) != self._identity
        if broken:
            for fd, saved in enumerate(self._saved):
                os.dup2(saved, fd)
        if broken or any(_closed(stream) for stream in (sys.stdin, sys.stdout, sys.stderr)):
            self._open_streams()

    @property
    def private_fds(self) -> tuple[int, ...]:
        return (self.channel.socket.fileno(), *self._saved)

    def rewire(self, control: int, stdout: int, stderr: int) -> None:
        """In a copy of the session: the same numbers, and what the cells duplicated of them, lead to its own ends."""
        moves = [(control, self.channel.socket.fileno()), (stdout, 1), (stderr, 2)]
        moves += [(stdout, self._saved[1]), (stderr, self._saved[2])]
        for fd in (fd for fd in map(int, os.listdir("/proc/self/fd")) if 2 < fd < _PRIVATE_FD):
            if (identity := _identity(fd)) in self._identity[1:]:
                moves.append((stdout if identity == self._identity[1] else stderr, fd))
        for source, target in moves:
            os.dup2(source, target, inheritable=target in (1, 2) or os.get_inheritable(target))
        for fd in (control, stdout, stderr):
            os.close(fd)
        self._identity = tuple(_identity(fd) for fd in (0, 1, 2))
        _Pipe.last = None

    def settle(self) -> None:
        """Before an answer, hence before the next request: forget interrupts, and take SIGINT back from the cell."""
        self._interrupted = False
        if signal.getsignal(signal.SIGINT) != self.on_sigint:
            signal.signal(signal.SIGINT, self.on_sigint)

    def on_sigint(self, signum: int, frame: object) -> None:
        if self.phase is Phase.RUNNING:
            raise KeyboardInterrupt
        if self.phase is Phase.STARTING or (self.phase is Phase.WAITING and self.channel.is_pending()):
            self._interrupted = True

    def run(self, code: str, *, cell: int, keep: int, with_figures: bool) -> dict[str, Any]:
        self._repair()
        answer: dict[str, Any] = {"ok": False, "result": None, "error": None}
        try:
            try:
                self.phase = Phase.RUNNING
                if self._interrupted:
                    raise KeyboardInterrupt
                value = self._execute(code, f"<cell-{cell}>")
                if value is not None:
                    text = str(value)
                    print(text)
                    answer["result"] = text[:keep]
                answer["ok"] = True
            except BaseException as error:  # a cell's exception is data: SystemExit and KeyboardInterrupt included
                answer["ok"] = False
                answer["error"] = describe(error)
                self.report(answer["error"]["traceback"])
            if with_figures:
                answer["figures"], missing = figures.collect()
                self.report("".join(f"{line}\n" for line in missing))
            self.phase = Phase.WAITING
        except BaseException as error:  # a signal's, while the first one was being described or a figure drawn
            self.phase = Phase.WAITING
            name = type(error).__name__
            answer["ok"] = False
            answer["error"] = {"name": name, "value": "", "traceback": f"{name}\n"}
        for stream in {id(s): s for s in (sys.stdout, sys.stderr, self.stdout, self.stderr)}.values():
            try:
                stream.flush()
            except (OSError, ValueError, AttributeError):  # closed or replaced by the cell; the next one repairs it
                pass
        return answer

    def _execute(self, code: str, filename: str) -> object:
        linecache.cache[filename] = (len(code), None, code.splitlines(keepends=True), filename)
        tree = ast.parse(code, filename)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        namespace = self.module.__dict__
        if tree.body:
            exec(compile(tree, filename, "exec", dont_inherit=True), namespace)
        if last is None:
            return None
        assert isinstance(last, ast.Expr)
        return eval(compile(ast.Expression(last.value), filename, "eval", dont_inherit=True), namespace)

    def report(self, text: str) -> None:
        """What a terminal would show on stderr."""
        for stream in (sys.stderr, self.stderr):
            try:
                sys.stdout.flush()
            except (OSError, ValueError, AttributeError):
                pass
            try:
                stream.write(text)
                return
            except (OSError, ValueError, AttributeError):
                continue


def preamble() -> dict[str, Any]:
    """Names that a cell finds without importing them."""
    names: dict[str, Any] = {"math": math, "itertools": itertools, "os": os}
    if (sympy := sys.modules.get("sympy")) is not None:
        names |= {"sympy": sympy, "sp": sympy}
    return names


def describe(error: BaseException) -> dict[str, str]:
    """Name, value and traceback of a cell's exception, our own frames left out."""
    tb = error.__traceback__
    while tb is not None and tb.tb_frame.f_code.co_filename == __file__:
        tb = tb.tb_next
    last = tb
    while last is not None and last.tb_next is not None:
        if last.tb_next.tb_frame.f_code.co_filename == __file__:  # the signal handler
            last.tb_next = None
            break
        last = last.tb_next
    if isinstance(error, SyntaxError) and tb is not None and tb.tb_frame.f_code.co_filename == ast.__file__:
        tb = None
    try:
        value = str(error)
    except Exception as nested:  # a user's __str__ may do anything
        value = f"<str() failed: {type(nested).__name__}>"
    try:
        text = "".join(traceback.format_exception(type(error), error, tb))
    except Exception as nested:
        text = f"{type(error).__name__}: {value}\n(its traceback cannot be formatted: {type(nested).__name__})\n"
    if len(text) > _TRACEBACK_CHARS:
        half = _TRACEBACK_CHARS // 2
        text = f"{text[:half]}\n[traceback truncated]\n{text[-half:]}"
    return {"name": type(error).__name__, "value": value[:_VALUE_CHARS], "traceback": text}


def _identity(fd: int) -> tuple[int, int] | None:
    try:
        status = os.fstat(fd)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _closed(stream: object) -> bool:
    return bool(getattr(stream, "closed", stream is None))


def _private(fd: int) -> int:
    """Move a descriptor out of the way of what user code opens."""
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _PRIVATE_FD)
    os.close(fd)
    return moved


def main(control: int) -> None:
    """Serve frames until the supervisor closes the channel."""
    channel = frames.Channel(socket.socket(fileno=_private(control)))
    os.closerange(3, _PRIVATE_FD)
    interpreter = Interpreter(channel)
    signal.signal(signal.SIGINT, interpreter.on_sigint)
    while True:
        try:
            channel.wait()
            interpreter.phase = Phase.STARTING
            taken = channel.receive()
        except BaseException as error:
            if not is_from_a_cell(error):
                raise
            interpreter.phase = Phase.WAITING
            interpreter.report(describe(error)["traceback"])
            continue
        if taken is None:
            return
        request, fds = taken[0], [_private(fd) for fd in taken[1]]
        answer: dict[str, Any] = {"ok": True, "nonce": request["nonce"]}
        if request["op"] == "open":
            limits.apply_limits(**request["limits"])
            if request["in_family"]:
                limits.admit_copies()
        elif request["op"] == "fork":
            answer = branch.branch(interpreter, request, fds)  # returns in the copy as well
        elif request["op"] == "run":
            answer |= interpreter.run(
                request["code"], cell=request["cell"], keep=request["keep"], with_figures=request["figures"]
            )
        if os.getpid() != interpreter.pid:
            os._exit(0)  # a child that the cell forked came out at the end of it; the answer is its parent's
        interpreter.phase = Phase.WAITING
        interpreter.settle()
        channel.send(answer)


def is_from_a_cell(error: BaseException) -> bool:
    """Raised by a signal handler that a cell left behind (an alarm, say), not by our own reading: the kernel's errors
    have a number."""
    return not isinstance(error, frames.BadFrame) and getattr(error, "errno", None) is None
