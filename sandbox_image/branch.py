"""A session copies itself, as it is between two cells. Runs inside the session; nothing here is trusted by others.

    session --fork_sibling--> copy: like the session a child of the supervisor, in a process group of its own

A copy has the whole memory (copy on write), random number generators in the same state, and its own copy of the home
and the temporary directory; its working directory and its open files are those of the copies. Two things it shares with
its siblings: the uid, and with it /tmp and /dev/shm; and a path that the program itself has kept as text still names
the original's directory. What has no copy makes the fork be refused: live threads and child processes, open pipes and
sockets, shared memory.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import shutil
import stat
import tempfile
import threading
import time
from typing import TYPE_CHECKING, Any

from sandbox_image import limits, proc

if TYPE_CHECKING:
    from sandbox_image.session import Interpreter

_ENDING_S = 0.5  # a joined thread is seen in /proc a little longer, and longer still where the machine is busy
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EFBIG}


def branch(interpreter: Interpreter, request: dict[str, Any], fds: list[int]) -> dict[str, Any]:
    """Answers for the original; in the copy, ends with the copy's own first answer. `fds`: the copy's control socket,
    stdout and stderr."""
    try:
        if what := obstacle(ours={*interpreter.private_fds, *fds}):
            return {"nonce": request["nonce"], "refused": what}
        limits.admit_copies()
        limits.become_subreaper()  # from now on it is killed by its tree, as its copies are
        generator = random.getstate()
        if limits.fork_sibling():
            return {"nonce": request["nonce"], "ok": True}
    except OSError as error:
        return _failure(request["nonce"], error)
    finally:
        if os.getpid() == interpreter.pid:
            for fd in fds:
                os.close(fd)
    control, stdout, stderr = fds
    interpreter.pid = os.getpid()
    os.setsid()
    limits.die_with_parent()
    limits.become_subreaper()
    interpreter.rewire(control, stdout, stderr)
    try:
        move(request["from"], request["to"])
    except OSError as error:
        interpreter.channel.send(_failure(request["copy_nonce"], error))
        os._exit(0)
    random.setstate(generator)  # a fork re-seeds it
    return {"nonce": request["copy_nonce"], "ok": True}


def _failure(nonce: str, error: OSError) -> dict[str, Any]:
    first = error.args[0] if isinstance(error, shutil.Error) else None
    words = str(first[0][2] if first else error)
    is_full = error.errno in _NO_ROOM or (first is not None and f"[Errno {errno.ENOSPC}]" in words)
    return {"nonce": nonce, "no_room" if is_full else "refused": words}


# what stands in the way ----------------------------------------------------------------------------------------------


def obstacle(*, ours: set[int]) -> str:
    """Why this process has no faithful copy, in words; "" when nothing is in the way."""
    deadline = time.monotonic() + _ENDING_S
    while threads := _threads():
        if time.monotonic() > deadline:
            return f"live threads: {', '.join(threads)}"
        time.sleep(0.001)
    if children := [pid for pid in _children() if proc.is_live(pid)]:
        named = ", ".join(f"{pid} ({proc.name_of(pid)})" for pid in children[:8])
        return f"live child processes: {named}"
    shared = [f"{fd} ({target})" for fd, target in _descriptors() if fd not in ours and not _has_copy(fd)]
    if shared:
        return f"open pipes or sockets, which two processes cannot have apart: {', '.join(shared[:8])}"
    with open("/proc/self/maps", errors="backslashreplace") as file:
        mapped = [line.split(maxsplit=5)[-1].strip() for line in file if line.split(maxsplit=2)[1].startswith("rw-s")]
    return f"shared memory: {', '.join(mapped[:8])}" if mapped else ""


def _threads() -> list[str]:
    """Names of the threads besides this one; the kernel's view, since not all of them are Python's."""
    known = {thread.native_id: thread.name for thread in threading.enumerate()}
    own = threading.get_native_id()
    others = [int(tid) for tid in os.listdir("/proc/self/task") if int(tid) != own]
    return [known.get(tid) or proc.name_of(tid) for tid in others]


def _children() -> list[int]:
    own = os.getpid()
    try:
        with open(f"/proc/self/task/{own}/children") as file:
            return [int(word) for word in file.read().split()]
    except OSError:  # a kernel without it
        return proc.children_of().get(own, [])


def _descriptors() -> list[tuple[int, str]]:
    """Open descriptors above the standard streams, with what they lead to."""
    out = []
    for name in os.listdir("/proc/self/fd"):
        try:
            out.append((int(name), os.readlink(f"/proc/self/fd/{name}")))
        except OSError:  # the listing's own
            continue
    return [(fd, target) for fd, target in out if fd > 2]


def _has_copy(fd: int) -> bool:
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode) or stat.S_ISCHR(status.st_mode):
        return True
    return any(_same(status, standard) for standard in (1, 2))  # follows the copy's own stream


def _same(status: os.stat_result, fd: int) -> bool:
    try:
        other = os.fstat(fd)
    except OSError:
        return False
    return (status.st_dev, status.st_ino) == (other.st_dev, other.st_ino)


# the copy moves into directories of its own --------------------------------------------------------------------------


def move(old: list[str], new: list[str]) -> None:
    """Copy each directory of `old` into the empty one of `new`; go on there, with the open files too."""
    here = os.getcwd()
    for source, target in zip(old, new, strict=True):
        _copy_tree(source, target)
    places = dict(zip(old, new, strict=True))
    os.chdir(_moved(here, places))
    for key, value in os.environ.items():
        if (moved := _moved(value, places)) != value:
            os.environ[key] = moved
    if isinstance(tempfile.tempdir, str):
        tempfile.tempdir = _moved(tempfile.tempdir, places)
    for fd, target in _descriptors():
        _reopen(fd, target, places)


def _moved(path: str, places: dict[str, str]) -> str:
    for old, new in places.items():
        if path == old or path.startswith(old + "/"):
            return new + path[len(old) :]
    return path


def _copy_tree(source: str, target: str) -> None:
    def copy(path: str, to: str, **_: object) -> str:
        mode = os.lstat(path).st_mode
        if stat.S_ISFIFO(mode):
            os.mkfifo(to, stat.S_IMODE(mode))
        elif not stat.S_ISSOCK(mode):  # a name without its owner
            shutil.copy2(path, to, follow_symlinks=False)
        return to

    if next(os.scandir(source), None) is not None:
        shutil.copytree(source, target, symlinks=True, copy_function=copy, dirs_exist_ok=True)


def _reopen(fd: int, target: str, places: dict[str, str]) -> None:
    """A description of its own, at the same offset: that of a descriptor is shared with the original by a fork."""
    status = os.fstat(fd)
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        return
    flags = fcntl.fcntl(fd, fcntl.F_GETFL) & ~(os.O_CREAT | os.O_EXCL | os.O_TRUNC) | os.O_CLOEXEC
    if stat.S_ISREG(status.st_mode) and status.st_nlink == 0:  # without a name: only its contents can be copied
        fresh = os.open(tempfile.gettempdir(), os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        at = 0
        while at < status.st_size and (data := os.pread(fd, 1 << 20, at)):
            at += os.pwrite(fresh, data, at)
    else:
        path = _moved(target, places)
        fresh = os.open(path if path != target else f"/proc/self/fd/{fd}", flags)
    offset = os.lseek(fd, 0, os.SEEK_CUR) if stat.S_ISREG(status.st_mode) else 0
    inheritable = os.get_inheritable(fd)
    os.dup2(fresh, fd, inheritable=inheritable)
    os.close(fresh)
    if offset:
        os.lseek(fd, offset, os.SEEK_SET)
