"""Half-done trajectories on disk: each turn as soon as it is finished, so that a killed run goes on with them.

    journal/VERSION.START.ENGINE.jsonl     VERSION of the turn's first token, START of the engine's process (unix ms)
    {"config": HASH, ...}                  first line of a file
    {"uid": ..., "turn": 3, ...}           one line per finished turn, ids and log-probs as base64 of the raw arrays

Engines append, each to files of its own. The driver reads what another process left, once, when it starts; and of a
trajectory that was lost what its engine had written, so that its next attempt goes on from there. A turn is one
unbuffered write: it survives the death of the process, not that of the machine, for which the checkpoint is there.
A file ends with at most one torn line, and that turn is generated again. Versions are in the names so that what a
checkpoint has made useless goes by deleting files, while engines go on writing newer ones.

A turn number that was there before takes its trajectory back to that turn: it ran again, elsewhere or from its start.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from aster.data.trajectories import turn_from
from aster.types import FinishedTurn, Past, Task

log = logging.getLogger(__name__)

FOLDER = "journal"
_NAME = re.compile(r"(\d+)\.(\d+)\.(.+)\.jsonl")


def prompt_digest(prompt_ids: np.ndarray) -> str:
    """Turns belong to a prompt: with other tools or another template the same row is another conversation."""
    return hashlib.blake2b(np.asarray(prompt_ids, dtype=np.int32).tobytes(), digest_size=8).hexdigest()


# writing -------------------------------------------------------------------------------------------------------------


class TurnJournal:
    """One engine's. A disk that refuses ends the journal with a warning, not the run: it would only have saved time."""

    def __init__(self, folder: Path, *, engine: str, config_hash: str) -> None:
        self._folder, self._engine, self._config = folder, engine, config_hash
        self._start = time.time_ns() // 1_000_000
        self._file: tuple[int, int] | None = None  # version, descriptor
        self._broken = False

    def append(self, task: Task, prompt: str, number: int, turn: FinishedTurn) -> None:
        """Turn `number` of `task`, whose prompt has the digest `prompt`."""
        if self._broken:
            return
        version = turn.oldest_version
        head = {"uid": task.uid, "attempt": task.attempt, "prompt": prompt, "number": number}
        line = (json.dumps(head | _packed(turn)) + "\n").encode()
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
            path = self._folder / f"{version}.{self._start}.{self._engine}.jsonl"
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            self._file = version, descriptor
            if os.fstat(descriptor).st_size == 0:
                os.write(descriptor, (json.dumps({"config": self._config}) + "\n").encode())
        return self._file[1]


def prune(folder: Path, *, useless: Callable[[int], bool]) -> None:
    """Forget the turns that began under a `useless(version)`. Engines may be writing."""
    for version, _, path in _files(folder):
        if useless(version):
            path.unlink(missing_ok=True)


# reading -------------------------------------------------------------------------------------------------------------


@dataclass
class _Trajectory:
    order: tuple[int, int]  # start of the process, attempt: what an older one still wrote does not count
    prompt: str
    turns: list[FinishedTurn] = field(default_factory=list)


def read_journal(folder: Path, *, config_hash: str, oldest: int, newest: int) -> dict[str, Past]:
    """`{uid: its finished turns}` as far as they can be gone on with, under the weights of version `newest`.

    That is: written under the same config, no token older than version `oldest`, and cut before the first turn with a
    token newer than `newest`: those weights are gone. Files of newer versions are deleted, of another config ignored.
    """
    found: dict[str, _Trajectory] = {}
    for version, start, path in _files(folder):
        if version > newest:
            path.unlink(missing_ok=True)
            continue
        for line in _lines(path, config_hash=config_hash):
            order = start, int(line["attempt"])
            known = found.get(line["uid"])
            if known is not None and order < known.order:
                continue
            number, turn = int(line["number"]), _unpacked(line)
            if known is None or line["prompt"] != known.prompt:
                known = found[line["uid"]] = _Trajectory(order, line["prompt"])
            if number <= len(known.turns):
                known.order = order
                known.turns[number:] = [turn]
    past = {uid: Past(t.prompt, _usable(t.turns, oldest=oldest, newest=newest)) for uid, t in found.items()}
    return {uid: p for uid, p in past.items() if p.turns}


class KeptTurns:
    """What the engines of this run have written of one trajectory, while others go on writing."""

    def __init__(self, folder: Path, *, config_hash: str) -> None:
        self._folder, self._config = folder, config_hash
        self._since = time.time_ns() // 1_000_000  # older files are another process's; `read_journal` has judged them

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
        past, uid = task.past, json.dumps(task.uid).encode()
        for _, start, path in _files(self._folder):
            if start < self._since or path.name.split(".", 2)[2] != f"{engine}.jsonl":
                continue
            for line in _lines(path, config_hash=self._config, about=uid):
                if (line["uid"], line["attempt"]) != (task.uid, task.attempt):
                    continue
                turns = past.turns if past is not None and past.prompt == line["prompt"] else ()
                if int(line["number"]) <= len(turns):
                    past = Past(line["prompt"], (*turns[: line["number"]], _unpacked(line)))
        return past


def _usable(turns: Sequence[FinishedTurn], *, oldest: int, newest: int) -> tuple[FinishedTurn, ...]:
    whole = next((i for i, turn in enumerate(turns) if turn.newest_version > newest), len(turns))
    usable = tuple(turns[:whole])
    return usable if all(turn.oldest_version >= oldest for turn in usable) else ()


def _files(folder: Path) -> list[tuple[int, int, Path]]:
    """(version, start, path), in the order of start: a later process knows better."""
    if not folder.is_dir():
        return []
    found = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    files = [(int(m[1]), int(m[2]), path) for m, path in found if m]
    return sorted(files, key=lambda f: (f[1], f[0], f[2].name))


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


def _base64(array: np.ndarray, dtype: Any) -> str:
    return base64.b64encode(np.asarray(array, dtype=dtype).tobytes()).decode("ascii")


def _runs(array: np.ndarray) -> list[list[int]]:
    """`[7, 7, 7, -1]` as `[[7, 3], [-1, 1]]`."""
    edges = np.flatnonzero(np.diff(array.astype(np.int64), prepend=array[:1].astype(np.int64) - 1))
    counts = np.diff(edges, append=len(array))
    return [[int(array[at]), int(count)] for at, count in zip(edges, counts, strict=True)]


def _from_runs(runs: Sequence[Sequence[int]], dtype: Any) -> np.ndarray:
    return np.repeat(np.array([value for value, _ in runs], dtype=dtype), [count for _, count in runs])
