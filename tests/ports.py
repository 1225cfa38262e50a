"""Ports for what a test starts a moment later, in a process that has to be told one beforehand."""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path

_FROM = 20_000  # Ray gives 10002 to 19999 to its workers


def free_ports(count: int = 1) -> list[int]:
    """Neighbours that are free now, and that the system gives to nobody who asks for any port: it takes those from
    `ip_local_port_range`, above them, and there another process may have them by the time that ours listens."""
    above = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for first in random.sample(range(_FROM, above - count), 200):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            ports = list(range(first, first + count))
            for port in ports:
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return ports
    raise OSError(f"no {count} free ports side by side between {_FROM} and {above}")
