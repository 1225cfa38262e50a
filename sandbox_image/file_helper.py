"""What the attendant forks to touch a session's files: one request as the session's own user, then the end.

It can do no more than the session itself; that a path stays below the home directory is a promise to the caller, not
what protects anybody.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import stat
import time
from collections.abc import Iterator
from typing import Any, Literal, NoReturn

from sandbox_image import limits

DEADLINE_S = 10.0
HEADER_BYTES = 64 << 10
LIST_FILES = 10_000
TROUBLES = ("not_found", "invalid", "too_large", "no_room")
_LIST_BYTES = 4 << 20  # of names
LIST_ROOM = 8 * _LIST_BYTES + 64 * LIST_FILES  # JSON escapes, sizes and times
_VISITED = 100_000
_CHUNK = 1 << 20
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM, errno.EMFILE, errno.ENFILE}


class FileTrouble(Exception):
    """The request cannot be carried out; `kind` says which of the protocol's statuses that is."""

    def __init__(self, kind: Literal["not_found", "invalid", "too_large", "no_room"], text: str) -> None:
        super().__init__(kind, text)
        self.kind, self.text = kind, text


def serve(request: dict[str, Any], control: socket.socket, fds: list[int]) -> NoReturn:
    """Carry out one request, as the session's user, and end."""
    control.close()
    signal.alarm(int(DEADLINE_S) + 5)
    limits.first_to_be_killed()
    limits.drop_to(request["uid"], traceable=False)
    os.umask(0o077)
    channel = socket.socket(fileno=fds[0])
    home = os.path.realpath(request["home"])
    try:
        if request["file_bytes"]:
            limits.limit_files(request["file_bytes"])
        if request["kind"] == "write":
            header, body = _write(home, request["path"], channel, request["size"]), b""
        elif request["kind"] == "read":
            header, body = _read(home, request["path"], request["max_bytes"])
        else:
            header, body = _list(home)
    except FileTrouble as trouble:
        header, body = {"trouble": trouble.kind, "text": trouble.text}, b""
    except OSError as error:
        header, body = {"trouble": _kind(error), "text": error.strerror or str(error)}, b""
    channel.sendall(json.dumps(header).encode() + b"\n" + body)
    os._exit(0)


def _kind(error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return "not_found"
    return "no_room" if error.errno in _NO_ROOM else "invalid"


def _below(home: str, path: str) -> str:
    """Where `path` leads, links followed. Raises `FileTrouble` when that is the home directory or outside of it."""
    if not path or "\0" in path or path.startswith("/"):
        raise FileTrouble("invalid", f"{path!r} is not a path relative to the home directory")
    real = os.path.realpath(os.path.join(home, path))
    if not real.startswith(home + "/"):
        raise FileTrouble("invalid", f"{path!r} is the home directory, or leads out of it")
    return real


def _check_opened(fd: int, home: str, path: str) -> os.stat_result:
    """The session may exchange a directory for a link while we look: what was opened is what counts."""
    status = os.fstat(fd)
    if not os.readlink(f"/proc/self/fd/{fd}").startswith(home + "/"):
        raise FileTrouble("invalid", f"{path!r} leads out of the home directory")
    if not stat.S_ISREG(status.st_mode):
        what = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise FileTrouble("invalid", f"{path!r} is {what}")
    return status


def _read(home: str, path: str, max_bytes: int) -> tuple[dict[str, Any], bytes]:
    fd = os.open(_below(home, path), os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    size = _check_opened(fd, home, path).st_size
    content = b""
    if size <= max_bytes:
        with open(fd, "rb") as file:
            content = file.read(max_bytes + 1)  # it may grow meanwhile
    if max(size, len(content)) > max_bytes:
        raise FileTrouble("too_large", f"{path!r} has {max(size, len(content))} bytes, more than {max_bytes}")
    return {"size": len(content)}, content


def _write(home: str, path: str, channel: socket.socket, size: int) -> dict[str, Any]:
    """All of it under a name of its own, then renamed: a failure leaves what was there."""
    target = _below(home, path)
    if path.endswith("/") or os.path.isdir(target):
        raise FileTrouble("invalid", f"{path!r} is a directory")
    os.makedirs(os.path.dirname(target), exist_ok=True)
    making = os.path.join(os.path.dirname(target), f".{os.getpid()}.{time.time_ns()}~")
    fd = os.open(making, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        _check_opened(fd, home, path)
        left = size
        while left and (data := channel.recv(min(_CHUNK, left))):
            left -= len(data)
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
        if left:
            raise FileTrouble("no_room", "the transfer was cut short")
        os.rename(making, target)
    except BaseException:
        os.unlink(making)
        raise
    return {"size": 0}


def _list(home: str) -> tuple[dict[str, Any], bytes]:
    files: list[tuple[str, int, float]] = []
    truncated, weight = False, 0
    for visited, (name, status) in enumerate(_walk(home)):
        if visited >= _VISITED or len(files) >= LIST_FILES or weight > _LIST_BYTES:
            truncated = True
            break
        if status is not None:
            weight += len(name)
            files.append((name, status.st_size, status.st_mtime))
    body = json.dumps(sorted(files)).encode()
    return {"size": len(body), "truncated": truncated}, body


def _walk(home: str) -> Iterator[tuple[str, os.stat_result | None]]:
    """Every entry below `home`, breadth first; the status of the regular files. Follows no link."""
    pending = [""]
    while pending:
        folder = pending.pop(0)
        try:
            entries = sorted(os.scandir(os.path.join(home, folder)), key=lambda entry: entry.name)
        except OSError:  # its owner made it unreadable, or it is gone already
            continue
        for entry in entries:
            name = os.path.join(folder, entry.name)
            if entry.is_dir(follow_symlinks=False):
                pending.append(name)
                yield name, None
            elif entry.is_file(follow_symlinks=False):
                try:
                    yield name.encode("utf-8", "backslashreplace").decode(), entry.stat(follow_symlinks=False)
                except OSError:
                    continue
