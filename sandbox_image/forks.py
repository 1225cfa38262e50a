"""A process that forks on request: what the zygote and the attendant have in common.

Each request is one packet, JSON plus file descriptors, on a SOCK_SEQPACKET pair, and is answered with the pid of a
grandchild that does the work; the supervisor is its parent. Single-threaded, as whoever forks must be.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from sandbox_image import limits

Work = Callable[[dict[str, Any], socket.socket, list[int]], NoReturn]
"""Called in the grandchild with the request, the forking process's end of the pair, and the descriptors that came."""
_PID = struct.Struct("i")


def take_up(fd: int) -> socket.socket:
    """First thing in such a process: its end of the pair, and nothing that a session could use against it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    limits.set_dumpable(False)
    limits.drop_capability(limits.CAP_DAC_OVERRIDE)
    return socket.socket(fileno=fd)


def serve(control: socket.socket, work: Mapping[str, Work], *, packages: Mapping[str, str]) -> None:
    """Say that all is ready, then answer requests until the supervisor closes its end."""
    control.send(json.dumps({"packages": packages}).encode())
    while True:
        data, fds, _, _ = socket.recv_fds(control, 1 << 16, 3)
        if not data:
            return
        request = json.loads(data)
        pid = _spawn(functools.partial(work[request["op"]], request, control, fds))
        for extra in fds:
            os.close(extra)
        control.send(json.dumps({"pid": pid}).encode())


def _spawn(work: Callable[[], NoReturn]) -> int:
    """Fork twice; the middle process ends at once. Returns the grandchild's pid, 0 when the kernel refused."""
    read, write = os.pipe()
    try:
        middle = os.fork()
    except OSError:
        os.close(read)
        os.close(write)
        return 0
    if middle == 0:
        middle = os.getpid()
        try:
            grandchild = os.fork()
            if grandchild:
                os.write(write, _PID.pack(grandchild))
                os._exit(0)
            os.close(read)
            os.close(write)
            while os.getppid() == middle:  # about to end
                time.sleep(0.0002)
            work()
        except BaseException:  # nothing may return into the zygote's loop from here
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(70)
    os.close(write)
    answer = os.read(read, _PID.size)
    os.close(read)
    os.waitpid(middle, 0)
    return int(_PID.unpack(answer)[0]) if len(answer) == _PID.size else 0
