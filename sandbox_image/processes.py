"""The supervisor's view of processes: who died and how (waitpid), and the zygote that forks and cleans for it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections import OrderedDict
from typing import Any

_UNCLAIMED = 256
_ZYGOTE_ANSWER_S = 10.0


class Reaper:
    """Exit statuses of our children, each delivered once. A child nobody claims is a dead session's orphan."""

    def __init__(self) -> None:
        self._waiting: dict[int, asyncio.Future[int]] = {}
        self._unclaimed: OrderedDict[int, int] = OrderedDict()

    def start(self) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, self.reap)

    def reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            future = self._waiting.pop(pid, None)
            if future is None:
                self._unclaimed[pid] = status
                while len(self._unclaimed) > _UNCLAIMED:
                    self._unclaimed.popitem(last=False)
            elif not future.done():
                future.set_result(status)

    def claim(self, pid: int) -> asyncio.Future[int]:
        """The wait status of `pid`, now or when it ends."""
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        if pid in self._unclaimed:
            future.set_result(self._unclaimed.pop(pid))
        else:
            self._waiting[pid] = future
        return future

    def is_claimed(self, pid: int) -> bool:
        return pid in self._waiting


class ZygoteDied(RuntimeError):
    """No further session can be forked in this cell; those that live go on."""


class Zygote:
    """Client of `zygote.py`. Requests are serialised; each is a few milliseconds of fork."""

    def __init__(self, reaper: Reaper) -> None:
        self._reaper = reaper
        self._lock = asyncio.Lock()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # exec'd here, before the caller imports grpc: a process that has started gRPC threads is never forked
        process = subprocess.Popen(
            [sys.executable, "-s", "-m", "sandbox_image.zygote", str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        ours.setblocking(False)
        self._socket = ours
        self.pid = process.pid
        process.returncode = 0  # the reaper waits for it, not Popen
        self.packages: dict[str, str] = {}
        self.dead = ""

    async def ready(self, *, timeout_s: float) -> None:
        exit_status = self._reaper.claim(self.pid)
        exit_status.add_done_callback(lambda f: self._died(f"zygote {describe_status(f.result())}"))
        self.packages = (await self._receive(timeout_s))["packages"]

    def _died(self, why: str) -> None:
        self.dead = self.dead or why

    async def request(self, message: dict[str, Any], fds: tuple[int, ...] = ()) -> int:
        """The pid of the forked child. Raises `ZygoteDied`; OSError(EAGAIN) is the kernel's refusal to fork."""
        async with self._lock:
            if self.dead:
                raise ZygoteDied(self.dead)
            try:
                socket.send_fds(self._socket, [json.dumps(message).encode()], fds)
            except OSError as error:
                self._died(f"zygote unreachable: {error}")
                raise ZygoteDied(self.dead) from None
            pid = int((await self._receive(_ZYGOTE_ANSWER_S))["pid"])
        if pid == 0:
            raise BlockingIOError(f"the kernel refused to fork for {message['op']}")
        return pid

    async def _receive(self, timeout_s: float) -> dict[str, Any]:
        try:
            data = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self._socket, 1 << 16), timeout_s)
        except TimeoutError:
            self._died(f"zygote gave no answer within {timeout_s:g} s")
            raise ZygoteDied(self.dead) from None
        if not data:
            self._died("zygote closed its socket")
            raise ZygoteDied(self.dead)
        answer: dict[str, Any] = json.loads(data)
        return answer


def describe_status(status: int) -> str:
    """A wait status in words: "exited with 3", "was killed by SIGSEGV"."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = f"signal {number}"
        return f"was killed by {name}"
    return f"exited with {os.waitstatus_to_exitcode(status)}"


def signal_group(pid: int, number: int) -> None:
    """To the process group, as a terminal does: a child it waits for ends too. Before its setsid, to `pid` alone."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        _send(pid, number)


def kill_tree(root: int) -> None:
    """SIGKILL `root` and all of its descendants. For sessions without a uid of their own, which are subreapers: a
    descendant cannot leave the tree while its root lives, so the root is stopped first and goes last."""
    _send(root, signal.SIGSTOP)
    while True:
        below = descendants(root)
        for pid in below:
            _send(pid, signal.SIGKILL)
        if not [pid for pid in below if _state(pid) not in ("Z", "X", "")]:
            break
    _send(root, signal.SIGKILL)


def kill_strays(reaper: Reaper) -> int:
    """Children of ours that nobody claims: what a session that died left behind. Returns how many."""
    strays = [pid for pid in _children_of().get(os.getpid(), ()) if not reaper.is_claimed(pid)]
    for pid in strays:
        kill_tree(pid)
    return len(strays)


def descendants(root: int) -> list[int]:
    children = _children_of()
    out: list[int] = []
    pending = list(children.get(root, ()))
    while pending:
        pid = pending.pop()
        out.append(pid)
        pending.extend(children.get(pid, ()))
    return out


def _children_of() -> dict[int, list[int]]:
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := _stat(int(entry))):
            children.setdefault(int(fields[1]), []).append(int(entry))
    return children


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on: the name before them may hold blanks and brackets."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []


def _state(pid: int) -> str:
    fields = _stat(pid)
    return fields[0] if fields else ""


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass
