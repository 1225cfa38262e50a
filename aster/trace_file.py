"""`trace.json`: spans on named tracks in Chrome's trace event format, which https://ui.perfetto.dev opens.

An array of JSON objects, one a line, appended as things happen. The format lets the closing bracket be missing, so a
file whose writer was killed opens all the same; a restart goes on behind the last whole line. When a file has grown to
`max_bytes` it becomes `trace.old.json`, in place of an older one, and a new one begins: a run of any length keeps its
newest steps, in at most twice that size.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

TRACE_FILE = "trace.json"
OLDER_FILE = "trace.old.json"


class TraceFile:
    """Appends events; a track (process, thread) is named in the file where it first appears. Not thread-safe.

    >>> file = TraceFile(Path("runs/x/trace.json"))                              # doctest: +SKIP
    >>> file.span("engine-0", "lane 1", "turn 0", begin_s=0.5, seconds=2.0)      # doctest: +SKIP
    """

    def __init__(self, path: Path, *, max_bytes: int = 64_000_000) -> None:
        self.path = path
        self._max_bytes = max_bytes
        path.parent.mkdir(parents=True, exist_ok=True)
        self._taken = 0  # process numbers that the file has used up already
        self._pids: dict[str, int] = {}
        self._tids: dict[tuple[str, str], int] = {}
        self._file = self._open()

    def span(
        self,
        process: str,
        thread: str,
        name: str,
        *,
        begin_s: float,
        seconds: float,
        args: Mapping[str, Any] | None = None,
    ) -> None:
        """`name` from unix time `begin_s` for `seconds`. Spans of one track must nest or lie apart."""
        begin = round(
            begin_s * 1e6
        )  # the end is rounded, not the length: what touches must not overlap by a microsecond
        body = {"ph": "X", "name": name, "ts": begin, "dur": max(round((begin_s + seconds) * 1e6) - begin, 0)}
        self._write(process, thread, body | ({"args": dict(args)} if args else {}))

    def flush(self) -> None:
        """To the operating system; start a new file when this one is full."""
        self._file.flush()
        if self._file.tell() >= self._max_bytes:
            self._finish()
            os.replace(self.path, self.path.with_name(OLDER_FILE))
            self._pids, self._tids = {}, {}
            self._file = self._open()

    def close(self) -> None:
        """Strict JSON from here on: the array is closed. Idempotent."""
        if not self._file.closed:
            self._finish()

    # internals -------------------------------------------------------------------------------------------------------

    def _open(self) -> IO[bytes]:
        """The file, positioned behind its last whole event."""
        file = self.path.open("r+b" if self.path.exists() else "w+b")
        text = file.read()
        self._taken = text.count(b'"process_name"')
        end = text.rfind(b"},\n") + 3 if b"},\n" in text else 0
        rest = text[end:]
        if rest.rstrip().endswith(b"]") and b"}" in rest:  # closed by `close`: the last event has no comma
            end += rest.rfind(b"}") + 1
            file.seek(end)
            file.truncate()
            file.write(b",\n")
            return file
        file.seek(end)
        file.truncate()
        if end == 0:
            file.write(b"[\n")
        return file

    def _finish(self) -> None:
        self._file.write(b'{"ph":"M","name":"trace_end","pid":0,"tid":0,"args":{}}\n]\n')
        self._file.close()

    def _write(self, process: str, thread: str, body: dict[str, Any]) -> None:
        pid = self._pids.get(process)
        if pid is None:
            pid = self._pids[process] = self._taken + len(self._pids) + 1
            self._line({"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": process}})
        tid = self._tids.get((process, thread))
        if tid is None:
            tid = self._tids[process, thread] = 1 + sum(p == process for p, _ in self._tids)
            self._line({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": thread}})
        self._line({**body, "pid": pid, "tid": tid})

    def _line(self, event: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(event, separators=(",", ":")).encode() + b",\n")
