"""A session: one live interpreter that runs cells until it is killed. Nothing it says is trusted beyond its own output.

Frames from the supervisor: `{"op": "open", "limits": ...}` once, then `{"op": "run", "nonce", "code", "cell", "keep"}`.
Each is answered by exactly one frame with the same nonce. What a cell prints goes through fds 1 and 2.
"""

from __future__ import annotations

import ast
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

from sandbox_image import frames, limits

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


class Interpreter:
    """The namespace and the streams; `run` executes one cell and describes its end as a frame body."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.interruptible = False
        self._saved = tuple(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _PRIVATE_FD) for fd in (0, 1, 2))
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
        """A cell may have closed or redirected what the next one prints to, or taken over SIGINT."""
        if signal.getsignal(signal.SIGINT) != self.on_sigint:
            signal.signal(signal.SIGINT, self.on_sigint)
        broken = tuple(_identity(fd) for fd in (0, 1, 2)) != self._identity
        if broken:
            for fd, saved in enumerate(self._saved):
                os.dup2(saved, fd)
        if broken or any(_closed(stream) for stream in (sys.stdin, sys.stdout, sys.stderr)):
            self._open_streams()

    def on_sigint(self, signum: int, frame: object) -> None:
        if self.interruptible:
            raise KeyboardInterrupt

    def run(self, code: str, *, cell: int, keep: int) -> dict[str, Any]:
        self._repair()
        answer: dict[str, Any] = {"ok": False, "result": None, "error": None}
        try:
            try:
                self.interruptible = True
                value = self._execute(code, f"<cell-{cell}>")
                if value is not None:
                    text = str(value)
                    print(text)
                    answer["result"] = text[:keep]
                answer["ok"] = True
            except BaseException as error:  # a cell's exception is data: SystemExit and KeyboardInterrupt included
                answer["ok"] = False
                answer["error"] = describe(error)
                self._report(answer["error"]["traceback"])
            finally:
                self.interruptible = False
        except KeyboardInterrupt as error:  # the second signal, while the first one was being described
            self.interruptible = False
            answer["ok"] = False
            answer["error"] = {"name": "KeyboardInterrupt", "value": "", "traceback": f"KeyboardInterrupt{error}\n"}
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

    def _report(self, text: str) -> None:
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


def main(channel: int) -> None:
    """Serve frames until the supervisor closes the channel."""
    control = socket.socket(fileno=fcntl.fcntl(channel, fcntl.F_DUPFD_CLOEXEC, _PRIVATE_FD))
    os.closerange(3, _PRIVATE_FD)
    interpreter = Interpreter()
    signal.signal(signal.SIGINT, interpreter.on_sigint)
    while True:
        request = frames.receive(control)
        if request is None:
            return
        answer: dict[str, Any]
        if request["op"] == "open":
            limits.apply_limits(**request["limits"])
            answer = {"ok": True}
        else:
            answer = interpreter.run(request["code"], cell=request["cell"], keep=request["keep"])
        if os.getpid() != interpreter.pid:
            os._exit(0)  # a child that the cell forked came out at the end of it; the answer is its parent's
        control.sendall(frames.encode({**answer, "nonce": request["nonce"]}))
