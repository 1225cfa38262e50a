"""What the kernel is told about a session: identity, resource limits, process attributes. Linux only."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import signal

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_PR_GET_TID_ADDRESS = 40
_CLONE_PARENT, _CLONE_CHILD_CLEARTID, _CLONE_CHILD_SETTID = 0x8000, 0x200000, 0x1000000
_CLONE = {"x86_64": (56, 3), "aarch64": (220, 4)}  # number of the call, place of the child's tid among its arguments
_CAPABILITY_VERSION_3 = 0x20080522
MEMBERS = 64
"""A session and its copies: one family, under one uid."""
CAP_DAC_OVERRIDE = 1
_libc = ctypes.CDLL(None, use_errno=True)
_libc_under_gil = ctypes.PyDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}, {value}): {os.strerror(code)}")


def become_subreaper() -> None:
    """Orphans of our descendants become our children, so that their exit status is ours to read."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def fork_sibling() -> int:
    """`os.fork`, but for whose child it is: our parent's. Only for a process with one thread.

    libc's own fork cannot do that, so its part is done here: the child's thread id goes where libc keeps it (kernels
    without checkpointing do not tell where; then only pthread_kill of the copy's main thread misses).
    """
    number, tid_at = _CLONE.get(platform.machine(), (0, 0))
    if not number:
        raise OSError(errno.ENOSYS, f"no clone call is known for {platform.machine()}")
    flags, tid = _CLONE_PARENT | signal.SIGCHLD, ctypes.c_void_p()
    if _libc.prctl(_PR_GET_TID_ADDRESS, ctypes.byref(tid), 0, 0, 0) == 0:
        flags |= _CLONE_CHILD_SETTID | _CLONE_CHILD_CLEARTID
    arguments: list[object] = [ctypes.c_ulong(flags), *[ctypes.c_void_p()] * 4]
    arguments[tid_at] = tid
    ctypes.pythonapi.PyOS_BeforeFork()
    pid = int(_libc_under_gil.syscall(number, *arguments))
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
    else:
        ctypes.pythonapi.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(ctypes.get_errno(), f"fork: {os.strerror(ctypes.get_errno())}")
    return pid


def die_with_parent() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def set_dumpable(value: bool) -> None:
    """False: no other process of our uid may trace us or read our memory."""
    _prctl(_PR_SET_DUMPABLE, int(value))


def drop_to(uid: int | None, *, traceable: bool = True) -> None:
    """No new privileges; with a uid, no groups and no capabilities either. `traceable`: by others of that uid, which
    is what a session's own processes are to each other; the kernel's default after a change of uid is not."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if uid is None:
        return
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    keep_capabilities(0)  # the change of uid leaves the inheritable set as it was
    set_dumpable(traceable)


def drop_capability(number: int) -> None:
    """Give up one capability for good."""
    keep_capabilities(~(1 << number))


def keep_capabilities(mask: int) -> None:
    """Cut this thread's effective, permitted and inheritable sets down to `mask`, one bit a capability."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    data = (ctypes.c_uint32 * 6)()  # two words each of effective, permitted, inheritable, interleaved
    if _libc.capget(header, data) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    for index in range(6):
        data[index] &= (mask >> 32 * (index // 3)) & 0xFFFFFFFF
    if _libc.capset(header, data) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def first_to_be_killed() -> None:
    """When memory is short, the session goes first, never the supervisor."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:  # a read-only /proc: the limits below still hold
        pass


def data_bytes() -> int:
    """Private writable memory of this process as RLIMIT_DATA counts it."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmData:"):
                return int(line.split()[1]) << 10
    return 0


def apply_limits(*, memory_bytes: int, processes: int | None, file_bytes: int) -> None:
    """RLIMIT_DATA, not RLIMIT_AS (which counts mappings nobody touches) and never RLIMIT_STACK (threads would fail)."""
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_NOFILE, 512)
    if memory_bytes:
        _lower(resource.RLIMIT_DATA, data_bytes() + memory_bytes)
    if file_bytes:
        limit_files(file_bytes)
    if processes:
        _lower(resource.RLIMIT_NPROC, processes, room=MEMBERS)


def limit_files(size: int) -> None:
    _lower(resource.RLIMIT_FSIZE, size)


def admit_copies() -> None:
    """Before the first fork: the kernel counts processes per uid, which the copies share; their own interpreters come
    on top of what the session may start."""
    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    resource.setrlimit(resource.RLIMIT_NPROC, (hard, hard))


def _lower(what: int, value: int, *, room: int = 0) -> None:
    """The soft limit to `value`, the hard one `room` above it; neither above the hard limit that is there."""
    hard = resource.getrlimit(what)[1]
    if hard == resource.RLIM_INFINITY:
        hard = value + room
    resource.setrlimit(what, (min(value, hard), min(value + room, hard)))
