"""What belongs to a cluster that `cluster.py` started, found and ended: its processes and its containers.

Three marks, so that other Ray clusters of the machine are never touched (`ray stop` would end them all): the session id
of the head process, descent from it, ASTER_CLUSTER_ID in the environment.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NODE_LABEL = "aster.node"
"""serve/cells/docker.py labels its containers with it: the first 12 digits of the Ray node that made them."""
HEAD_TERM_S, TERM_S, KILL_S = 15.0, 5.0, 10.0
"""How long the head may take to end its own processes, each of the others after SIGTERM, and after SIGKILL."""


class ClusterError(RuntimeError):
    """The cluster cannot be started or ended; the message says what to do."""


@dataclass(frozen=True)
class State:
    """What `down` has to know of what `up` started. Ports are on 127.0.0.1."""

    cluster_id: str
    pid: int
    """Of `ray start --block`: leader of the session that all its processes belong to."""
    started: int
    """Start time of `pid` in clock ticks since boot, so that a reused number is not taken for it."""
    port: int
    dashboard_port: int
    serve_port: int
    temp_dir: str
    node: str = ""
    """The Ray node's id; empty until the dashboard has answered."""

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"


@dataclass(frozen=True)
class Process:
    pid: int
    parent: int
    session: int
    started: int
    zombie: bool


def read_process(pid: int) -> Process | None:
    """From /proc/PID/stat; None when it is gone. The name may hold spaces and brackets, hence the last `)`."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return Process(pid, int(fields[1]), int(fields[3]), int(fields[19]), fields[0] in "ZX")


def all_processes() -> dict[int, Process]:
    found = (read_process(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return {process.pid: process for process in found if process is not None and not process.zombie}


def has_mark(pid: int, cluster_id: str) -> bool:
    """Whether ASTER_CLUSTER_ID stands in the environment; unreadable ones (another user's) are not ours."""
    try:
        return f"ASTER_CLUSTER_ID={cluster_id}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def processes_of(state: State) -> list[int]:
    """Every live process of the cluster, the calling one left out."""
    table = all_processes()
    leader = table.get(state.pid)
    # A number that now belongs to somebody else leads a session that is not ours.
    session = state.pid if leader is None or leader.started == state.started else None
    ours = {p.pid for p in table.values() if p.session == session or has_mark(p.pid, state.cluster_id)}
    while more := {p.pid for p in table.values() if p.parent in ours} - ours:
        ours |= more
    return sorted(ours - {os.getpid()})


def end_processes(state: State) -> int:
    """SIGTERM to the head, which ends its own; then SIGTERM and SIGKILL to the rest. Returns how many they were.

    Raises `ClusterError` when something survives.
    """
    ours = set(processes_of(state))
    known = {pid: process for pid, process in all_processes().items() if pid in ours}

    def alive() -> list[int]:
        table = all_processes()
        still = [pid for pid, process in known.items() if pid in table and table[pid].started == process.started]
        return sorted({*still, *processes_of(state)})

    def signal_and_wait(pids: Sequence[int], number: signal.Signals, seconds: float) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + seconds
        while set(pids) & set(alive()) and time.monotonic() < deadline:
            time.sleep(0.1)

    if state.pid in known:
        signal_and_wait([state.pid], signal.SIGTERM, HEAD_TERM_S)
    signal_and_wait(alive(), signal.SIGTERM, TERM_S)
    signal_and_wait(alive(), signal.SIGKILL, KILL_S)
    if left := alive():
        raise ClusterError(
            f"processes {left} of cluster {state.cluster_id} outlived SIGKILL; state kept for another try"
        )
    return len(known)


def remove_containers(state: State) -> int:
    """Remove the containers that this cluster's node made; 0 when no Docker daemon answers."""
    import docker
    import docker.errors

    if not state.node:
        return 0
    try:
        client = docker.from_env(timeout=60)
    except docker.errors.DockerException:
        return 0
    with contextlib.closing(client):
        containers = client.containers.list(all=True, filters={"label": f"{NODE_LABEL}={state.node[:12]}"})
        for container in containers:
            with contextlib.suppress(docker.errors.NotFound):
                container.remove(force=True, v=True)
    return len(containers)
