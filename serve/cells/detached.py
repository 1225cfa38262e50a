"""Processes that outlive whoever started them: nobody's child, known by pid and start time.

A cell of bubblewrap and the janitor must survive the pool's own death, and Ray ends the children and the process group
of a worker with it. So a short-lived launcher starts them in a session of their own and writes down what it started
before it ends; a pool that is killed in the middle of this leaves the record to its successor.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_LAUNCH_S = 20.0
_POLL_S = 0.01
# argv: where to write "PID START_TIME", and the command. Python ignores two signals that its child must not ignore
_LAUNCHER = """
import os, signal, sys
record, command = sys.argv[1], sys.argv[2:]
pid = os.posix_spawn(command[0], command, os.environ, setsid=True, setsigdef=[signal.SIGPIPE, signal.SIGXFSZ])
with open(f"/proc/{pid}/stat") as stat, open(record + ".new", "w") as file:
    file.write(f"{pid} " + stat.read().rpartition(")")[2].split()[19])
os.rename(record + ".new", record)
"""


@dataclass(frozen=True)
class Detached:
    """A process, or what was one: a later process of the same pid has another start time."""

    pid: int
    start_time: str

    @classmethod
    def recorded(cls, record: Path) -> Detached:
        """From what the launcher wrote. Raises OSError, ValueError."""
        pid, start_time = record.read_text().split()
        return cls(int(pid), start_time)

    @property
    def alive(self) -> bool:
        fields = _stat(self.pid)
        return len(fields) > 19 and fields[19] == self.start_time and fields[0] not in ("Z", "X")

    def kill_namespace(self, *, timeout_s: float) -> None:
        """End a bubblewrap. Its own child is PID 1 of the cell: all of the namespace dies with that, and bubblewrap
        ends only when it has. Blocks; TimeoutError when the kernel takes longer."""
        for pid in self.children():
            _kill(pid)
        deadline = time.monotonic() + timeout_s
        while self.alive:
            if time.monotonic() > deadline:
                _kill(self.pid)
                raise TimeoutError(f"process {self.pid} had not ended {timeout_s:g} s after SIGKILL to its children")
            time.sleep(_POLL_S)

    def children(self) -> list[int]:
        try:
            words = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        except OSError:
            return []
        return [int(word) for word in words] if self.alive else []


def launch(
    command: Sequence[str], *, environment: Mapping[str, str], record: Path, log: Path, fds: Sequence[int] = ()
) -> Detached:
    """Start `command` as nobody's child; `fds` are left open in it. Blocks for a few tens of milliseconds."""
    with open(log, "ab") as output:
        subprocess.run(
            [os.path.realpath(sys.executable), "-I", "-S", "-c", _LAUNCHER, str(record), *command],
            env=dict(environment),
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=fds,
            check=True,
            timeout=_LAUNCH_S,
        )
    return Detached.recorded(record)


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on: the name before them may hold blanks and brackets."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
