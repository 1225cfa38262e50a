"""What became of one cell, as the supervisor decided it."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, field
from typing import Any

from sandbox_image import figures
from sandbox_image.output import HeadTail


@dataclass
class Outcome:
    """The fields of `ExecuteReply`."""

    status: str
    state: str = "kept"
    result: str | None = None
    error: dict[str, str] | None = None
    duration_s: float = 0.0
    reason: str = ""
    cell: int = 0
    figures: list[bytes] = field(default_factory=list)
    stdout: HeadTail = field(default_factory=lambda: HeadTail(0))
    stderr: HeadTail = field(default_factory=lambda: HeadTail(0))
    text: HeadTail = field(default_factory=lambda: HeadTail(0))

    def take(self, frame: dict[str, Any], *, keep: int, timed_out: bool) -> None:
        """What the session says of its own cell. Raises `BadFrame` for figures that are none."""
        error = frame.get("error")
        if isinstance(error, dict):
            self.error = {key: str(error.get(key, "")) for key in ("name", "value", "traceback")}
        self.result = None if frame.get("result") is None else str(frame["result"])[:keep]
        self.figures = figures.parse(frame.get("figures", []))
        self.status = "timeout" if timed_out else "ok" if frame.get("ok") is True else "error"

    @property
    def weight(self) -> int:
        """Bytes, about, that remembering it costs."""
        kept = sum(min(buffer.total, buffer.limit) for buffer in (self.stdout, self.stderr, self.text))
        return kept + sum(map(len, self.figures)) + len(self.result or "")


def oom_kills() -> int:
    """How many processes of this cell the kernel killed for memory; cgroup v2, then v1, 0 where neither tells."""
    file = _oom_file()
    if file is None:
        return 0
    for line in os.pread(file, 1 << 14, 0).splitlines():
        key, _, value = line.partition(b" ")
        if key == b"oom_kill":
            return int(value)
    return 0


@functools.cache
def _oom_file() -> int | None:
    """Open for good: it is read before every cell."""
    for path in ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control"):
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
    return None
