"""The supervisor's children: who died and how (waitpid), and the two that fork for it, zygote and attendant."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Literal

from sandbox_image.proc import children_of, describe_status, kill_tree, uid_of
from sandbox_image.proc import descendants as descendants

_UNCLAIMED = 256
_ANSWER_S = 10.0
_STRAYS_S = 5.0


@dataclass(frozen=True)
class Child:
    """A process whose parent we are, and its wait status when it ends."""

    pid: int
    exit: asyncio.Future[int]


class Reaper:
    """Exit statuses of our children, each delivered once. A child nobody claims is a dead session's orphan.

    `births` is held from the moment a child of ours may come to life until it is claimed, and by whoever kills
    the unclaimed.
    """

    def __init__(self) -> None:
        self.births = asyncio.Lock()
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

    def claim(self, pid: int) -> Child:
        """`pid`, with its wait status now or when it ends."""
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        known = self._unclaimed.pop(pid, None)
        if known is None or self._is_child(pid):  # a child that is there now is not the one that ended: pids come again
            self._waiting[pid] = future
        else:
            future.set_result(known)
        return Child(pid, future)

    def is_stray(self, pid: int) -> bool:
        """A child of ours, running or just ended, that nobody has claimed."""
        return pid not in self._waiting and self._is_child(pid)

    def _is_child(self, pid: int) -> bool:
        try:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return False
        return True

    def strays(self, uid: int | None) -> list[int]:
        """Children of ours that nobody claims, of one uid or of any: what sessions left behind."""
        mine = (pid for pid in children_of().get(os.getpid(), ()) if pid not in self._waiting)
        return [pid for pid in mine if uid is None or uid_of(pid) == uid]

    async def kill_strays(self, uid: int | None) -> None:
        """Until none is left: what a stray leaves behind is ours in the next round."""
        deadline = time.monotonic() + _STRAYS_S
        while time.monotonic() < deadline:
            async with self.births:
                strays = self.strays(uid)
                for pid in strays:
                    kill_tree(pid)
            if not strays:
                return
            await asyncio.sleep(0.001)


class ForkerDied(RuntimeError):
    """No session can begin or end in this cell any more; those that live go on."""


class Forker:
    """Client of a process that forks on request (`forks.py`): `zygote` or `attendant`. Requests are serialised."""

    def __init__(self, role: Literal["zygote", "attendant"], reaper: Reaper) -> None:
        self.role = role
        self._reaper = reaper
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # exec'd here, before the caller imports grpc: a process that has started gRPC threads is never forked
        process = subprocess.Popen(
            [sys.executable, "-s", "-m", f"sandbox_image.{role}", str(theirs.fileno())],
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
        child = self._reaper.claim(self.pid)
        child.exit.add_done_callback(lambda f: self._died(f"{self.role} {describe_status(f.result())}"))
        self.packages = (await self._receive(timeout_s))["packages"]

    def _died(self, why: str) -> None:
        self.dead = self.dead or why

    async def request(self, message: dict[str, Any], fds: tuple[int, ...] = ()) -> Child:
        """The forked child. Raises `ForkerDied`; BlockingIOError is the kernel's refusal to fork."""
        async with self._reaper.births:
            if self.dead:
                raise ForkerDied(self.dead)
            try:
                socket.send_fds(self._socket, [json.dumps(message).encode()], fds)
            except OSError as error:
                self._died(f"{self.role} unreachable: {error}")
                raise ForkerDied(self.dead) from None
            pid = int((await self._receive(_ANSWER_S))["pid"])
            if pid == 0:
                raise BlockingIOError(f"the kernel refused to fork for {message['op']}")
            return self._reaper.claim(pid)

    async def _receive(self, timeout_s: float) -> dict[str, Any]:
        try:
            data = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self._socket, 1 << 16), timeout_s)
        except TimeoutError:
            self._died(f"{self.role} gave no answer within {timeout_s:g} s")
            raise ForkerDied(self.dead) from None
        if not data:
            self._died(f"{self.role} closed its socket")
            raise ForkerDied(self.dead)
        answer: dict[str, Any] = json.loads(data)
        return answer
