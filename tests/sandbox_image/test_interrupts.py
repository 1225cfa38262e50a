"""A signal does not say for which cell it is meant. A session that is stopped takes what came meanwhile all at once,
which is the worst order that a busy machine can make."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from sandbox_image import frames

_LONG = "import time\nfor _ in range(2000): time.sleep(.01)"


class Held:
    """A session without a supervisor: the test says what is sent and when it runs."""

    def __init__(self) -> None:
        self.wire, theirs = socket.socketpair()
        self.wire.settimeout(60)
        program = f"from sandbox_image import session; session.main({theirs.fileno()})"
        self.process = subprocess.Popen([sys.executable, "-c", program], pass_fds=[theirs.fileno()])
        theirs.close()
        self._decoder = frames.Decoder(limit=1 << 20)
        self._sent = 0

    def send(self, op: str, code: str = "") -> int:
        self._sent += 1
        body = {"code": code, "cell": self._sent, "keep": 1000, "figures": False} if op == "run" else {}
        self.wire.sendall(frames.encode({"op": op, "nonce": self._sent, **body}))
        return self._sent

    def answer(self) -> dict[str, Any]:
        while not (found := self._decoder.feed(self.wire.recv(1 << 16))):
            pass
        (frame,) = found
        return frame

    def hold(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)


@pytest.fixture
def session() -> Iterator[Held]:
    held = Held()
    held.send("run", "1")
    assert held.answer()["result"] == "1"
    yield held
    held.wire.close()
    held.go_on()
    try:
        assert held.process.wait(timeout=60) == 0
    finally:
        held.process.kill()


@pytest.mark.parametrize("before", ["1", "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"])
def test_an_interrupt_that_comes_with_its_cell_is_not_lost(session: Held, before: str) -> None:
    for _ in range(10):
        session.send("run", before)
        session.answer()
        session.hold()
        session.send("run", _LONG)
        session.interrupt()
        session.go_on()
        assert session.answer()["error"]["name"] == "KeyboardInterrupt"


def test_an_interrupt_is_lost_at_no_moment_of_a_beginning(session: Held) -> None:
    for step in range(300):
        session.send("run", _LONG)
        until = time.perf_counter() + step * 1e-6
        while time.perf_counter() < until:
            pass
        session.interrupt()
        assert session.answer()["error"]["name"] == "KeyboardInterrupt"


def test_an_interrupt_that_comes_after_its_cell_hits_no_other_one(session: Held) -> None:
    for _ in range(10):
        session.hold()
        session.interrupt()
        settled = session.send("settle")
        session.go_on()
        assert session.answer() == {"ok": True, "nonce": settled}
        session.send("run", "7")
        assert session.answer()["result"] == "7"


def test_an_interrupt_between_cells_is_nobodys(session: Held) -> None:
    session.interrupt()
    while int(process_state(session.process.pid, "ShdPnd"), 16):
        pass
    while process_state(session.process.pid, "State") != "S":  # it has been taken, but perhaps not handled yet
        pass
    session.send("run", "7")
    assert session.answer()["result"] == "7"


def process_state(pid: int, name: str) -> str:
    with open(f"/proc/{pid}/status") as file:
        return next(line.split()[1] for line in file if line.startswith(f"{name}:"))
