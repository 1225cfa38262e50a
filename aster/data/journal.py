"""Half-done trajectories on disk: each turn as soon as it is finished, so that a killed run goes on with them.

    journal/VERSION.RUN.ENGINE.jsonl       VERSION of the turn's first token, RUN: when the driver started (unix ms)
    {"config": HASH, ...}                  first line of a file
    {"uid": ..., "turn": 3, ...}           one line per finished turn, ids and log-probs as base64 of the raw arrays

Engines append, each to files of its own. The driver reads what another process left, once, when it starts; and of a
trajectory that was lost what its engine had written, so that its next attempt goes on from there. A turn is one
unbuffered write: it survives the death of the process, not that of the machine, for which the checkpoint is there.
A file ends with at most one torn line, and that turn is generated again. Versions are in the names so that what a
checkpoint has made useless goes by deleting files, while engines go on writing newer ones.

A trajectory's turns are read in the order of runs and attempts, not of files: a later attempt goes on from the turns of
the one before, on whatever engine. A turn number that was there before takes it back to that turn: it began afresh.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import logging
import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from aster.data.trajectories import turn_from
from aster.types import FinishedTurn, Past, Task

log = logging.getLogger(__name__)

FOLDER = "journal"
_NAME = re.compile(r"(\d+)\.(\d+)\.(.+)\.jsonl")


@dataclass(frozen=True)
class JournalPlace:
    """The journal of one start of a run."""

    folder: Path
    config_hash: str
    run: int = field(default_factory=lambda: time.time_ns() // 1_000_000)


def prompt_digest(prompt_ids: np.ndarray) -> str:
    """Turns belong to a prompt: with other tools or another template the same row is another conversation."""
    return hashlib.blake2b(np.asarray(prompt_ids, dtype=np.int32).tobytes(), digest_size=8).hexdigest()


# writing -------------------------------------------------------------------------------------------------------------


class TurnJournal:
    """One engine's. A disk that refuses ends the journal with a warning, not the run: it would only have saved time."""

    def __init__(self, place: JournalPlace, *, engine: str) -> None:
        self._folder, self._engine = place.folder, engine
        self._place = place
        self._file: tuple[int, int] | None = None  # version, descriptor
        self._broken = False

    def append(self, task: Task, prompt: str, number: int, turn: FinishedTurn) -> None:
        """Turn `number` of `task`, whose prompt has the digest `prompt`."""
        if self._broken:
            return
        version = turn.oldest_version
        head = {"uid": task.uid, "attempt": task.attempt, "prompt": prompt, "number": number}
        line = _written(head | _packed(turn))
        try:
            descriptor = self._descriptor(version)
            if os.write(descriptor, line) != len(line):
                raise OSError(f"{self._folder} is full")
        except OSError as error:
            self._broken = True
            log.warning("%s keeps no journal any more, a restart will sample its turns again: %s", self._engine, error)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file[1])
            self._file = None

    def _descriptor(self, version: int) -> int:
        if self._file is None or self._file[0] != version:
            self.close()
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"{version}.{self._place.run}.{self._engine}.jsonl"
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            self._file = version, descriptor
            if os.fstat(descriptor).st_size == 0:
                os.write(descriptor, _written({"config": self._place.config_hash}))
        return self._file[1]


def prune(folder: Path, *, useless: Callable[[int], bool]) -> None:
    """Forget the turns that began under a `useless(version)`. Engines may be writing."""
    for version, _, path in _files(folder):
        if useless(version):
            path.unlink(missing_ok=True)


# reading -------------------------------------------------------------------------------------------------------------


def read_journal(folder: Path, *, config_hash: str, oldest: int, newest: int) -> dict[str, Past]:
    """`{uid: its finished turns}` as far as they can be gone on with, under the weights of version `newest`.

    That is: written under the same config, no token older than version `oldest`, and cut before the first turn with a
    token newer than `newest`: those weights are gone. Such turns are deleted, since other weights will have their
    version soon; files of another config are ignored.
    """
    found: defaultdict[str, defaultdict[tuple[int, int], list[dict[str, Any]]]]
    found = defaultdict(lambda: defaultdict(list))  # uid -> (run, attempt) -> lines
    for version, run, path in _files(folder):
        if version > newest:
            path.unlink(missing_ok=True)
            continue
        lines = list(_lines(path, config_hash=config_hash))
        kept = [line for line in lines if _newest_version(line) <= newest]
        if len(kept) < len(lines):
            _rewrite(path, [{"config": config_hash}, *kept])
        for line in kept:
            found[line["uid"]][run, int(line["attempt"])].append(line)
    out: dict[str, Past] = {}
    for uid, attempts in found.items():
        past: Past | None = None
        for order in sorted(attempts):
            past = _gone_on(past, attempts[order])
        if past is not None and all(turn.oldest_version >= oldest for turn in past.turns):
            out[uid] = past
    return out


def _rewrite(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """A kill leaves the old file or the new one."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_bytes(b"".join(_written(line) for line in lines))
    partial.replace(path)


def _gone_on(past: Past | None, lines: Sequence[dict[str, Any]]) -> Past | None:
    """`past` with the turns of one more attempt; turns behind a gap are of no use."""
    for line in lines:
        turns = past.turns if past is not None and past.prompt == line["prompt"] else ()
        number = int(line["number"])
        if number <= len(turns):
            past = Past(line["prompt"], (*turns[:number], _unpacked(line)))
    return past


class KeptTurns:
    """What the engines of this run have written of one trajectory, while others go on writing."""

    def __init__(self, place: JournalPlace) -> None:
        self._place = place  # other runs' files are older; `read_journal` has judged them

    async def of(self, task: Task, engine: str) -> Past | None:
        """The turns that `task` went on from and those that this attempt finished on `engine`; None if there are none.

        A journal that cannot be read costs time, not the run: a warning, and what the task went on from.
        """
        try:
            return await asyncio.to_thread(self._read, task, engine)
        except OSError as error:
            log.warning("%s: its finished turns cannot be read, they are sampled again: %s", task.uid, error)
            return task.past

    def _read(self, task: Task, engine: str) -> Past | None:
        lines = []
        about = json.dumps(task.uid).encode()
        for _, run, path in _files(self._place.folder):
            if run == self._place.run and path.name.endswith(f".{run}.{engine}.jsonl"):
                with contextlib.suppress(FileNotFoundError):  # pruned in this moment
                    found = list(_lines(path, config_hash=self._place.config_hash, about=about))
                    lines += [line for line in found if (line["uid"], line["attempt"]) == (task.uid, task.attempt)]
        return _gone_on(task.past, lines)


def _files(folder: Path) -> list[tuple[int, int, Path]]:
    """(version, run, path), older versions first: turns are in the order in which they were written."""
    if not folder.is_dir():
        return []
    found = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    files = [(int(m[1]), int(m[2]), path) for m, path in found if m]
    return sorted(files)


def _lines(path: Path, *, config_hash: str, about: bytes = b"") -> Iterator[dict[str, Any]]:
    """Up to the first line that is not whole; only those that hold `about` are read."""
    with path.open("rb") as file:
        for number, raw in enumerate(file):
            if number and about not in raw:
                continue
            try:
                line = json.loads(raw) if raw.endswith(b"\n") else None
            except ValueError:
                line = None
            if not isinstance(line, dict):
                log.warning("%s, line %d is torn: the turn is sampled again", path, number + 1)
                return
            if number == 0:
                if line.get("config") != config_hash:
                    log.warning("%s was written under another config: its trajectories start afresh", path)
                    return
                continue
            yield line


# one turn ------------------------------------------------------------------------------------------------------------


def _packed(turn: FinishedTurn) -> dict[str, Any]:
    return {
        "turn": asdict(turn.turn),
        "seen": turn.seen,
        "ids": _base64(turn.ids, np.int32),
        "logprobs": _base64(turn.logprobs, np.float32),
        "mask": _runs(turn.mask),
        "versions": _runs(turn.versions),
    }


def _unpacked(line: dict[str, Any]) -> FinishedTurn:
    return FinishedTurn(
        turn=turn_from(line["turn"]),
        ids=np.frombuffer(base64.b64decode(line["ids"]), np.int32),
        mask=_from_runs(line["mask"], np.bool_),
        logprobs=np.frombuffer(base64.b64decode(line["logprobs"]), np.float32),
        versions=_from_runs(line["versions"], np.int32),
        seen=tuple(line["seen"]),
    )


def _newest_version(line: Mapping[str, Any]) -> int:
    """Of a packed turn; what the model did not sample has version -1."""
    return max(version for version, _ in line["versions"])


def _written(line: Mapping[str, Any]) -> bytes:
    return (json.dumps(line) + "\n").encode()


def _base64(array: np.ndarray, dtype: Any) -> str:
    return base64.b64encode(np.asarray(array, dtype=dtype).tobytes()).decode("ascii")


def _runs(array: np.ndarray) -> list[list[int]]:
    """`[7, 7, 7, -1]` as `[[7, 3], [-1, 1]]`."""
    edges = np.flatnonzero(np.diff(array.astype(np.int64), prepend=array[:1].astype(np.int64) - 1))
    counts = np.diff(edges, append=len(array))
    return [[int(array[at]), int(count)] for at, count in zip(edges, counts, strict=True)]


def _from_runs(runs: Sequence[Sequence[int]], dtype: Any) -> np.ndarray:
    return np.repeat(np.array([value for value, _ in runs], dtype=dtype), [count for _, count in runs])
