"""A session's journal: one file of JSON lines, written as things happen, from which a successor knows the session.

    {"kind":"opened","limits":{...},"ttl_s":7200.0,"idle_ttl_s":1800.0,"began":1760000000.0}
    {"kind":"ran","record":{"cell":1,"call_id":"a","code":"x = 6","status":"ok","text_sha256":"e3"},...}
    {"kind":"gap","why":"a file was written from outside"}
    {"kind":"reset"}
    {"kind":"counted","cells":3}

A line is one write, before the answer leaves; nothing is ever changed but a torn end cut off. The time of modification
is the time of the last use. The file outlives the pool, not the machine: the cells do not either, so nothing is synced.
What a session can be rebuilt from is decided here (`obstacle`), how, in `serve.replay`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from serve.schema import CellRecord, ExecuteRequest, ExecuteResponse, Limits, Status

_MAX_BYTES = 64 << 20  # a journal longer than this is not continued, and its session not rebuilt
_REPLAYABLE = (Status.OK, Status.ERROR)  # of the others none ends twice at the same point, or the interpreter is gone


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Opened(_Line):
    """The first line. `began` is unix time."""

    kind: Literal["opened"] = "opened"
    limits: Limits
    ttl_s: float
    idle_ttl_s: float
    began: float


class Ran(_Line):
    """A cell, and what else its request said that matters when it is run again."""

    kind: Literal["ran"] = "ran"
    record: CellRecord
    max_output_bytes: int
    figures: bool
    duration_s: float

    def request(self, *, timeout_s: float) -> ExecuteRequest:
        """As it came, call id and all: so the session remembers the answer again. Only its time is another."""
        return ExecuteRequest(
            code=self.record.code,
            call_id=self.record.call_id,
            timeout_s=timeout_s,
            max_output_bytes=self.max_output_bytes,
            figures=self.figures,
        )


class Gap(_Line):
    """Something happened to the session that running its cells again does not repeat."""

    kind: Literal["gap"] = "gap"
    why: str


class Reset(_Line):
    """A fresh interpreter: nothing before this matters any more."""

    kind: Literal["reset"] = "reset"


class Counted(_Line):
    """It was rebuilt: the supervisor's count of its cells goes on from here."""

    kind: Literal["counted"] = "counted"
    cells: int


Line = Annotated[Opened | Ran | Gap | Reset | Counted, Field(discriminator="kind")]
_LINE: TypeAdapter[Line] = TypeAdapter(Line)


class BadJournal(ValueError):
    """The file is not a journal of ours; its session cannot be taken over."""


@dataclass(frozen=True)
class Journal:
    """The file. Holds nothing in memory and no descriptor open: there are hundreds of them."""

    path: Path

    @classmethod
    def create(cls, path: Path, opened: Opened) -> Journal:
        """Raises OSError when there is no room."""
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        journal = cls(path)
        try:
            journal.append(opened)
        except OSError:
            journal.remove()
            raise
        return journal

    @classmethod
    def recover(cls, path: Path) -> tuple[Journal, Opened]:
        """One that a dead pool left, less a last line that it had not finished. Raises `BadJournal`."""
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole != len(data):
            os.truncate(path, whole)
        journal = cls(path)
        lines = journal.lines()
        if not lines or not isinstance(lines[0], Opened):
            raise BadJournal(f"{path.name} does not begin with `opened`")
        return journal, lines[0]

    def append(self, line: Line) -> None:
        """Whole or not at all. Raises OSError: no room, or FileNotFoundError for a session that was closed."""
        data = line.model_dump_json().encode() + b"\n"
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            before = os.fstat(fd).st_size
            if before + len(data) > _MAX_BYTES:
                raise OSError(errno.EFBIG, f"a journal ends at {_MAX_BYTES >> 20} MB")
            if os.write(fd, data) != len(data):
                os.ftruncate(fd, before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(fd)

    def lines(self) -> list[Line]:
        """Raises `BadJournal`, FileNotFoundError."""
        try:
            return [_LINE.validate_json(line) for line in self.path.read_bytes().splitlines()]
        except ValueError as error:
            raise BadJournal(f"{self.path.name}: {error}") from None

    def copy(self, path: Path, opened: Opened) -> Journal:
        """For a session forked from this one: its own `opened`, then all that the two have in common."""
        copy = Journal.create(path, opened)
        try:
            for line in self.lines()[1:]:
                copy.append(line)
        except OSError:
            copy.remove()
            raise
        return copy

    def touch(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.path)

    @property
    def used(self) -> float:
        """Unix time."""
        return self.path.stat().st_mtime

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def ran(request: ExecuteRequest, answer: ExecuteResponse) -> Ran:
    """The line for a call that was answered."""
    record = CellRecord(
        cell=answer.cell,
        call_id=request.call_id,
        code=request.code.encode("utf-8", "backslashreplace").decode(),  # as it is sent; a lone surrogate has no UTF-8
        status=answer.status,
        text_sha256=text_hash(answer),
    )
    return Ran(
        record=record,
        max_output_bytes=request.max_output_bytes,
        figures=request.figures,
        duration_s=answer.duration_s,
    )


def text_hash(answer: ExecuteResponse) -> str:
    return hashlib.sha256(answer.text.encode("utf-8", "surrogatepass")).hexdigest()


def cells_of(lines: Sequence[Line]) -> list[Ran]:
    """What made the interpreter as it is now."""
    return [line for line in _since_reset(lines) if isinstance(line, Ran)]


def count_of(lines: Sequence[Line]) -> int:
    """How many cells the supervisor had counted when the last line was written. A count of its own that is ahead of
    this one tells of a cell that nobody wrote down."""
    count = 0
    for line in lines:
        if isinstance(line, Ran):
            count = line.record.cell
        elif isinstance(line, Counted):
            count = line.cells
        elif isinstance(line, Reset):
            count = 0
    return count


def obstacle(lines: Sequence[Line], *, limit_s: float) -> str:
    """Why the session cannot be rebuilt from these lines; empty when it can be tried."""
    total_s = 0.0
    for line in _since_reset(lines):
        if isinstance(line, Gap):
            return line.why
        if isinstance(line, Ran):
            total_s += line.duration_s
            if line.record.status not in _REPLAYABLE:
                return f"cell {line.record.cell} ended with {line.record.status}"
    return f"its cells ran for {total_s:.0f} s, the limit is {limit_s:g} s" if total_s > limit_s else ""


def _since_reset(lines: Sequence[Line]) -> Sequence[Line]:
    last = max((i for i, line in enumerate(lines) if isinstance(line, Reset)), default=-1)
    return lines[last + 1 :]
