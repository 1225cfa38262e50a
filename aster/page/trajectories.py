"""Trajectories as the report's table and viewer read them: one short row each, and their texts, tokens and clocks in
compressed blocks.

Rows are small and always loaded; a block is unpacked by the browser when one of its trajectories is opened. A block
never holds trajectories of two steps, so that a report which follows a run makes only the new ones.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aster.data.prompts import INSTRUCTION
from aster.data.rollouts import rollout_files
from aster.data.trajectories import GAP_COLUMN
from aster.page.rows import sound_rows
from aster.page.steps import Clocked, clocks_of_rows, read_clocks, step_view
from aster.page.tokens import TokenTexts, arrays_of, token_view
from aster.page.turns import cut, problem_of, turns_of

CHUNK = 40  # trajectories whose texts are unpacked together
PAGE_CHARS = 120_000_000  # of texts in one page; more trajectories leave less for each
STEP_VIEWS = 200  # steps with a timeline, evenly spaced
_SNIPPET = 160
_DETAILS = (
    "uid",
    "reward",
    "score",
    "error",
    "engine",
    "model_tokens",
    "prompt_tokens",
    "policy_version",
    "policy_version_oldest",
    "generate_s",
    "tool_s",
    "queue_s",
    "acc_strict",
    "acc_math_verify",
    "mean_logprob",
)
_TOKEN_COLUMNS = ("ids", "mask", "behaviour_logprobs", "versions", GAP_COLUMN)


@dataclass(frozen=True)
class Source:
    """One run as `collect` reads it."""

    path: Path
    texts: TokenTexts | str  # or why tokens cannot be shown
    phases: Mapping[int, Mapping[str, float]] = field(default_factory=dict)  # step -> seconds by phase
    began: Mapping[int, float] = field(default_factory=dict)  # step -> unix time at which the driver began it


@dataclass
class Trajectories:
    """What goes into the page. `rows` are dicts of short values; `chunks` base64 of gzip of a JSON list of details;
    `steps` what `chunks` is, of one timeline each, named by `step_index` [run, kind, step]."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    chunks: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    step_index: list[tuple[int, str, int]] = field(default_factory=list)
    total: int = 0  # on disk
    notes: list[str] = field(default_factory=list)  # what could not be read


@dataclass(frozen=True)
class _Step:
    """The files of one step of one run; `rows` lines are in the first."""

    run: int
    kind: str
    step: int
    file: Path | None
    arrays: Path | None
    lines: int

    @property
    def stamp(self) -> tuple[object, ...]:
        """Changes when a file does."""
        stats = [
            (p.stat().st_mtime_ns, p.stat().st_size) if p and p.exists() else None for p in (self.file, self.arrays)
        ]
        return (self.run, self.kind, self.step, *stats)


@dataclass(frozen=True)
class _Part:
    """One step, ready for the page but for the numbers of its rows and chunks."""

    rows: list[dict[str, Any]]
    chunks: list[str]
    clocks: list[Clocked]  # of the rows; the arrays know more
    uids: list[str]
    notes: list[str]


class Collector:
    """Reads the trajectories of runs; called again, it reads only what is new or has changed."""

    def __init__(self, *, limit: int, max_chars: int) -> None:
        self._limit, self._max_chars = limit, max_chars
        self._parts: dict[tuple[object, ...], _Part] = {}
        self._clocks: dict[tuple[object, ...], list[Clocked]] = {}
        self._lines: dict[tuple[object, ...], int] = {}

    def collect(self, sources: Sequence[Source]) -> Trajectories:
        """Rows of all rollout files. Past the limit every file gives the same number, its first ones; texts lose their
        middle past `max_chars`, or earlier where so many trajectories would make a page of over PAGE_CHARS.

        Both bounds go down in leaps: a step that was read is read again only when one of them does.
        """
        steps = [s for index, source in enumerate(sources) for s in self._steps(index, source)]
        total = sum(s.lines for s in steps)
        quota = _quota([s.lines for s in steps], self._limit)
        room = _leading_bits(PAGE_CHARS // max(min(total, self._limit), 1))
        chars = max(100, min(self._max_chars, room))
        timed = {steps[i].stamp for i in _evenly(len(steps), STEP_VIEWS)}
        out = Trajectories(total=total)
        parts: dict[tuple[object, ...], _Part] = {}
        clocks: dict[tuple[object, ...], list[Clocked]] = {}
        for step in steps:
            source = sources[step.run]
            key = (*step.stamp, quota, chars)
            part = parts[key] = self._parts.get(key) or _read(step, source, quota=quota, max_chars=chars)
            first_row, first_chunk = len(out.rows), len(out.chunks)
            out.rows += [row | {"c": row["c"] + first_chunk} for row in part.rows]
            out.chunks += part.chunks
            out.notes += part.notes
            if step.stamp in timed:
                is_training = step.kind == "train"
                seen = clocks[key] = self._clocks.get(key) or _clocks(step, part, quota=quota)
                view = step_view(
                    seen,
                    phases=source.phases.get(step.step, {}) if is_training else {},
                    began=source.began.get(step.step) if is_training else None,
                    row_of={uid: first_row + n for n, uid in enumerate(part.uids)},
                )
                if view is not None:
                    out.steps.append(pack(view))
                    out.step_index.append((step.run, step.kind, step.step))
        self._parts, self._clocks = parts, clocks
        return out

    def _steps(self, run: int, source: Source) -> Iterator[_Step]:
        path = source.path
        arrays = {int(p.stem): p for p in (path / "trajectories").glob("*.parquet") if p.stem.isdigit()}
        folders = [("train", path / "rollout_data"), ("val", path / "val_rollout_data")]
        files = [(k, s, f) for k, folder in folders if folder.is_dir() for s, f in rollout_files(folder)]
        trained = any(kind == "train" for kind, *_ in files)
        for kind, step, file in files:
            # a training run writes the arrays of its training steps; an evaluation those of what it sampled
            theirs = arrays.get(step) if kind == "train" or not trained else None
            yield _Step(run, kind, step, file, theirs, self._count(file))

    def _count(self, path: Path) -> int:
        stat = path.stat()
        key = (path, stat.st_mtime_ns, stat.st_size)
        if key not in self._lines:
            with path.open("rb") as file:
                self._lines[key] = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
        return self._lines[key]


def page_json(value: object) -> str:
    """As the page's scripts can parse it: JSON has no NaN and no infinities, which travel as text."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except ValueError:
        return page_json(_finite(value))


def _finite(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def pack(value: object) -> str:
    raw = page_json(value).encode("utf-8", "surrogatepass")
    return base64.b64encode(gzip.compress(raw, mtime=0)).decode()


def _quota(sizes: Sequence[int], limit: int) -> int:
    """A number of rows per file such that the sum stays within `limit`, about the largest; small files leave room to
    others."""
    if sum(sizes) <= limit:
        return limit
    low, high = 0, max(sizes)
    while low < high:
        middle = (low + high + 1) // 2
        if sum(min(size, middle) for size in sizes) <= limit:
            low = middle
        else:
            high = middle - 1
    return _leading_bits(low)


def _leading_bits(number: int) -> int:
    """With its three leading bits, so four values between a number and twice that; at most a fifth is lost.

    >>> [_leading_bits(n) for n in (0, 5, 1111, 1300, 1791, 1792)]
    [0, 5, 1024, 1280, 1536, 1792]
    """
    low = max(number.bit_length() - 3, 0)
    return number >> low << low


def _evenly(count: int, most: int) -> list[int]:
    """At most `most` of them, the last one included; those before mostly stay chosen while `count` grows.

    >>> _evenly(3, 5), _evenly(9, 3), _evenly(10, 4)
    ([0, 1, 2], [0, 4, 8], [0, 4, 8, 9])
    """
    if count <= most:
        return list(range(count))
    stride = 1
    while len(range(0, count - 1, stride)) >= most:
        stride *= 2
    return [*range(0, count - 1, stride), count - 1]


# one step ------------------------------------------------------------------------------------------------------------


def _read(step: _Step, source: Source, *, quota: int, max_chars: int) -> _Part:
    notes: list[str] = []
    found: list[dict[str, Any]] = []
    if step.file is not None:
        for row in sound_rows(step.file, on_bad_row=notes.append):
            if len(found) >= quota:
                break
            found.append(row)
    wanted = {str(row["uid"]) for row in found if row.get("uid")}
    tokens: dict[str, dict[str, Any]] = {}
    lost: list[dict[str, Any]] = []
    if step.arrays is not None and quota:
        try:
            if isinstance(source.texts, TokenTexts):
                tokens = dict(_token_views(step.arrays, source.texts, uids=wanted, max_chars=max_chars))
            lost = list(_lost(step.arrays, step=step.step, texts=source.texts, most=quota))
        except (pa.ArrowException, OSError, KeyError) as error:  # policy: half a run is reported without this file
            notes.append(f"{step.arrays} cannot be read ({error}): its steps have no tokens and no clock")
    rows: list[dict[str, Any]] = []
    details: list[dict[str, Any]] = []
    for row in [*found, *lost]:
        number = len(details)
        rows.append(_row(row, step) | {"c": number // CHUNK, "i": number % CHUNK})
        detail = _details(row, max_chars=max_chars)
        if row.get("uid") in tokens and not row.get("replaced"):
            detail["tk"] = tokens[str(row["uid"])]
        elif isinstance(source.texts, str) and step.arrays is not None:
            detail["no_tk"] = source.texts
        details.append(detail)
    chunks = [pack(details[i : i + CHUNK]) for i in range(0, len(details), CHUNK)]
    uids = [str(row.get("uid") or "") for row in found]
    return _Part(rows, chunks, clocks_of_rows(found), uids, notes)


def _clocks(step: _Step, part: _Part, *, quota: int) -> list[Clocked]:
    if step.arrays is None or not quota:
        return part.clocks
    try:
        return read_clocks(step.arrays)
    except (pa.ArrowException, OSError, KeyError):  # policy: as in `_read`, whose note says so
        return part.clocks


def _token_views(
    path: Path, texts: TokenTexts, *, uids: set[str], max_chars: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """By uid, of those in `uids`. Row groups that hold none of them are not read."""
    file = pq.ParquetFile(path)
    there = set(file.schema_arrow.names)
    columns = [name for name in _TOKEN_COLUMNS if name in there]
    for group in range(file.num_row_groups):
        head = file.read_row_group(group, columns=["uid", "lost"]).to_pydict()
        mine = [i for i, uid in enumerate(head["uid"]) if uid in uids and not head["lost"][i]]
        if not mine:
            continue
        table = file.read_row_group(group, columns=columns).take(mine)
        lists = {name: [np.asarray(v.values) for v in table.column(name)] for name in columns}
        for index, row in enumerate(mine):
            yield head["uid"][row], token_view(arrays_of(lists, index), texts, max_chars=max_chars)


def _lost(path: Path, *, step: int, texts: TokenTexts | str, most: int) -> Iterator[dict[str, Any]]:
    """Attempts that our infrastructure lost and a retry replaced, as rows of a rollout file would say it."""
    names = ["uid", "row_id", "sample", "data_source", "lost", "cause", "error", "engine", "turns", "timing", "ids"]
    names += ["prompt_ids"]
    table = pq.read_table(path, columns=names, filters=[("lost", "=", True)]).slice(0, most)
    for row in table.to_pylist():
        timing = row["timing"]
        yield {
            **{name: row[name] for name in ("uid", "row_id", "sample", "data_source", "error", "engine")},
            "acc": None,
            "replaced": True,
            "stop_reason": row["cause"],
            "tool_calls": sum(turn["call"] is not None for turn in row["turns"]),
            "response_tokens": len(row["ids"]),
            "began_unix": timing["began_unix"],
            "seconds": timing["total_s"],
            **{name: timing[name] for name in ("generate_s", "tool_s", "queue_s")},
            **(_spelt(row, texts) if isinstance(texts, TokenTexts) else {"input": "", "output": "", "turns": []}),
        }


def _spelt(row: Mapping[str, Any], texts: TokenTexts) -> dict[str, Any]:
    """What a row of the arrays says in words: `input`, `output`, and the turns with where each stands in the output."""
    output, turns, at = "", [], 0
    for turn in row["turns"]:
        output += texts.text(row["ids"][at : turn["start"]])
        begin = len(output)
        output += texts.text(row["ids"][turn["start"] : turn["stop"]])
        turns.append(
            {
                "text": (begin, len(output)),
                "tokens": turn["stop"] - turn["start"],
                "finish_reason": turn["finish_reason"],
                "seconds": round(turn["ended_s"] - turn["began_s"], 4),
                "call": turn["call"],
            }
        )
        at = turn["stop"]
    return {"input": texts.text(row["prompt_ids"]), "output": output, "turns": turns}


def _row(row: dict[str, Any], step: _Step) -> dict[str, Any]:
    accuracy = row.get("acc")
    truth = row.get("ground_truth")
    if truth is None or truth == "":
        truth = (row.get("non_tensor_reward_model") or {}).get("ground_truth")
    problem = " ".join(problem_of(str(row.get("input") or "")).replace(INSTRUCTION, "").split())
    strict, other = row.get("acc_strict"), row.get("acc_math_verify")
    out = {
        "run": step.run,
        "kind": step.kind,
        "step": step.step,
        "src": row.get("data_source") or row.get("non_tensor_data_source") or "",
        "id": row.get("row_id") or "",
        "n": row.get("sample"),
        "ok": None if accuracy is None else int(bool(accuracy)),
        "cause": row.get("stop_reason") or "",
        "calls": row.get("tool_calls"),
        "tok": row.get("response_tokens"),
        "s": None if row.get("seconds") is None else round(float(row["seconds"]), 2),
        "pred": str(row.get("pred") or "")[:80],
        "gt": str(truth if truth is not None else "")[:80],
        "q": problem[:_SNIPPET],
    }
    if strict is not None and other is not None and strict != other:
        out["split"] = 1  # the two verifiers disagree
    if row.get("replaced"):
        out["rep"] = 1
    return out


def _details(row: dict[str, Any], *, max_chars: int) -> dict[str, Any]:
    return {
        "input": cut(str(row.get("input") or ""), max_chars),
        "turns": list(turns_of(row, max_chars=max_chars)),
        **{name: row[name] for name in _DETAILS if row.get(name) is not None},
    }
