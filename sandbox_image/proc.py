"""What /proc tells about processes, and signals to them. Light: sessions use it too."""

from __future__ import annotations

import os
import signal
import time

_TREE_S = 0.2  # a tree that dies slowly must not hold the caller, who has other sessions


def children_of() -> dict[int, list[int]]:
    """Every process that we can see, by its parent."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := _stat(int(entry))):
            children.setdefault(int(fields[1]), []).append(int(entry))
    return children


def descendants(root: int) -> list[int]:
    children = children_of()
    out: list[int] = []
    pending = list(children.get(root, ()))
    while pending:
        pid = pending.pop()
        out.append(pid)
        pending.extend(children.get(pid, ()))
    return out


def is_live(pid: int) -> bool:
    """It exists and has not ended; a zombie has."""
    fields = _stat(pid)
    return bool(fields) and fields[0] not in ("Z", "X")


def name_of(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", errors="backslashreplace") as file:
            return file.read().rstrip("\n")
    except OSError:
        return "?"


def uid_of(pid: int) -> int | None:
    """The real uid, from the status file: the owner of the directory is root for a process that cannot be traced."""
    try:
        with open(f"/proc/{pid}/status", errors="backslashreplace") as file:
            for line in file:
                if line.startswith("Uid:"):
                    return int(line.split()[1])
    except OSError:
        pass
    return None


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on: the name before them may hold blanks, brackets, any bytes."""
    try:
        with open(f"/proc/{pid}/stat", errors="backslashreplace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []


def send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def signal_group(pid: int, number: int) -> None:
    """To the process group, as a terminal does: a child it waits for ends too. Before its setsid, to `pid` alone."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        send(pid, number)


def kill_tree(root: int) -> None:
    """SIGKILL `root` and all of its descendants. For sessions that share their uid and are subreapers: a descendant
    cannot leave the tree while its root lives, so the root is stopped first and goes last. Who has not died by then
    is a child of the next subreaper above."""
    send(root, signal.SIGSTOP)
    deadline = time.monotonic() + _TREE_S
    while True:
        below = descendants(root)
        for pid in below:
            send(pid, signal.SIGKILL)
        if not any(is_live(pid) for pid in below) or time.monotonic() > deadline:
            break
    send(root, signal.SIGKILL)


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
