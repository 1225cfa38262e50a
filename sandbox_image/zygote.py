"""What every session is forked from: imports the scientific packages once, stays single-threaded, runs no user code,
speaks no gRPC.

`python -m sandbox_image.zygote FD`: FD is one end of a SOCK_SEQPACKET pair. Each request (fork a session, clean up
after one, touch its files) is one packet, JSON plus file descriptors, and is answered with the pid of a grandchild that
does it; the supervisor is its parent.
"""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.metadata
import json
import os
import random
import signal
import socket
import stat
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from sandbox_image import file_helper, limits, proc, seccomp, session

PACKAGES = ("numpy", "scipy", "sympy", "mpmath")
# imported lazily by their packages, and then private to each session that uses them: once, here, is cheaper
_PARTS = ("numpy.random", "scipy.linalg", "scipy.special", "scipy.optimize")
LATER = ("matplotlib",)  # there, but imported by the sessions that draw: most do not
_PID = struct.Struct("i")
_CLEAN_DEADLINE_S = 5.0


def import_packages() -> dict[str, str]:
    """Version of each package; "" where the machine does not have it."""
    versions = {}
    for name in PACKAGES:
        try:
            module = importlib.import_module(name)
        except ImportError:
            versions[name] = ""
        else:
            versions[name] = str(getattr(module, "__version__", "?"))
    for part in _PARTS:
        if versions[part.partition(".")[0]]:
            importlib.import_module(part)
    for name in LATER:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = ""
    return versions


def font_list() -> Path | None:
    """matplotlib's list of fonts as `prepare.py` made it, in the image or beside the host's byte code; without one,
    the first import in every session would look for all fonts of the machine."""
    places = [Path(__file__).parents[1] / "fonts", Path(sys.pycache_prefix or "/nowhere") / "fonts"]
    return next((path for place in places for path in sorted(place.glob("fontlist-*.json"))), None)


def main(fd: int) -> None:
    control = socket.socket(fileno=fd)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    limits.set_dumpable(False)
    limits.drop_capability(limits.CAP_DAC_OVERRIDE)
    packages = import_packages()
    work: dict[str, Callable[..., NoReturn]] = {
        "fork": functools.partial(_session, fonts=font_list()),
        "clean": _clean,
        "file": file_helper.serve,
    }
    gc.collect()
    gc.freeze()  # the collector of a session never touches, and so never copies, these pages
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


def _session(request: dict[str, Any], control: socket.socket, fds: list[int], *, fonts: Path | None) -> NoReturn:
    channel, stdout, stderr = fds
    uid: int | None = request["uid"]
    os.setsid()
    control.close()
    null = os.open("/dev/null", os.O_RDONLY)
    for source, target in ((null, 0), (stdout, 1), (stderr, 2)):
        os.dup2(source, target)
    for directory in (request["home"], request["tmp"]):
        os.mkdir(directory, 0o700)
        if uid is not None:
            os.chown(directory, uid, uid)
    limits.first_to_be_killed()
    supervisor = request["supervisor"]
    limits.drop_to(uid)
    os.chdir(request["home"])  # after the drop: without DAC_OVERRIDE not even root may enter another's 0700 directory
    os.umask(0o077)
    limits.die_with_parent()
    if os.getppid() != supervisor:  # it has died already, and nobody else would ever end us
        os._exit(0)
    if request["by_tree"]:
        limits.become_subreaper()  # no uid to kill by: keep every descendant in this process's tree
    os.environ.update(HOME=request["home"], TMPDIR=request["tmp"])
    _prepare_matplotlib(os.path.join(request["tmp"], ".matplotlib"), fonts)
    _reseed()
    if request["filtered"]:
        seccomp.apply()
    session.main(channel)
    os._exit(0)


def _prepare_matplotlib(directory: str, fonts: Path | None) -> None:
    """Its cache directory must be writable, and the session's alone."""
    os.environ["MPLCONFIGDIR"] = directory
    if fonts is not None:
        os.mkdir(directory)
        os.symlink(fonts, os.path.join(directory, fonts.name))


def _reseed() -> None:
    """Siblings must not share random numbers. `random` itself re-seeds after a fork."""
    random.seed()
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed()
    if (sympy_random := sys.modules.get("sympy.core.random")) is not None:
        sympy_random.rng.seed()


def _clean(request: dict[str, Any], control: socket.socket, fds: list[int]) -> NoReturn:
    """As the session's own user: kill what is left of it, remove its files. Exit status 0 = nothing is left.

    `alone`: nobody else lives under this uid, which then ends altogether; else only the directories are emptied.
    """
    control.close()
    uid: int | None = request["uid"]
    limits.drop_to(uid)
    if uid is not None and request["alone"] and not _kill_all_of(uid):
        os._exit(1)
    owner = os.geteuid()
    try:
        for directory in request["directories"]:
            if os.path.isdir(directory):
                wipe(directory)
        for shared in request["shared"] if request["alone"] else ():
            for entry in os.scandir(shared):
                if entry.stat(follow_symlinks=False).st_uid == owner:
                    if entry.is_dir(follow_symlinks=False):
                        wipe(entry.path)
                        os.rmdir(entry.path)
                    else:
                        os.unlink(entry.path)
    except OSError:
        os._exit(2)
    os._exit(0)


def _kill_all_of(uid: int) -> bool:
    """Everything of our uid but ourselves: one kill(-1) is atomic; then wait until the kernel has buried them."""
    deadline = time.monotonic() + _CLEAN_DEADLINE_S
    while time.monotonic() < deadline:
        try:
            os.kill(-1, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        others = (int(pid) for pid in os.listdir("/proc") if pid.isdigit() and int(pid) != os.getpid())
        if not any(proc.uid_of(pid) == uid and proc.is_live(pid) for pid in others):
            return True
        time.sleep(0.0005)
    return False


def wipe(directory: str) -> None:
    """Empty a directory of ours, whatever permissions its owner left in it. Follows no link."""
    pending, found = [directory], []
    while pending:
        path = pending.pop()
        found.append(path)
        os.chmod(path, stat.S_IRWXU)
        for entry in os.scandir(path):
            if entry.is_dir(follow_symlinks=False):
                pending.append(entry.path)
            else:
                os.unlink(entry.path)
    for path in reversed(found[1:]):
        os.rmdir(path)


if __name__ == "__main__":
    main(int(sys.argv[1]))
