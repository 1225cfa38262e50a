"""Token-exact trajectories on disk: `trajectories/{step}.parquet`, from which a `Trajectory` comes back bit for bit.

One row per trajectory, attempts that a retry replaced included (`lost`). Ids, masks, log-probs and versions are
list columns filled straight from the arrays. The texts a person wants to read are in `rollout_data` (`data.rollouts`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aster.errors import DataError
from aster.types import Cause, Timing, ToolCall, ToolOutcome, Trajectory, TrajectoryGroup, Turn, Verdicts

_CALL = pa.struct(
    [
        ("code", pa.string()),
        ("status", pa.string()),
        ("outcome", pa.string()),
        ("observation", pa.string()),
        ("seconds", pa.float64()),
        ("queue_s", pa.float64()),
        ("state_lost", pa.bool_()),
        ("extra_calls_dropped", pa.int32()),
        ("tool", pa.string()),
    ]
)
_TURN = pa.struct(
    [
        ("start", pa.int32()),
        ("stop", pa.int32()),
        ("finish_reason", pa.string()),
        ("began_s", pa.float64()),
        ("ended_s", pa.float64()),
        ("call", _CALL),
        ("further_calls", pa.list_(_CALL)),
    ]
)
_TIMING = pa.struct([(name, pa.float64()) for name in Timing.__dataclass_fields__])
_VERDICTS = pa.struct([("strict", pa.bool_()), ("math_verify", pa.bool_()), ("pred", pa.string())])

_ARRAYS: dict[str, np.dtype] = {
    "prompt_ids": np.dtype(np.int32),
    "ids": np.dtype(np.int32),
    "mask": np.dtype(np.bool_),
    "behaviour_logprobs": np.dtype(np.float32),
    "versions": np.dtype(np.int32),
}
_SCALARS: dict[str, pa.DataType] = {
    "uid": pa.string(),
    "row_id": pa.string(),
    "sample": pa.int32(),
    "cause": pa.string(),
    "reward": pa.float64(),
    "final_text": pa.string(),
    "engine": pa.string(),
    "sandbox": pa.string(),
    "parent": pa.string(),
    "branch_turn": pa.int32(),
    "error": pa.string(),
}
GAP_COLUMN = "learner_gap"
_GAP = np.dtype(np.int8)
_ROW_GROUP = 256  # trajectories
_REPEATED = ["step", "data_source", "kind", "row_id", "cause", "engine"]


def write_trajectories_parquet(
    folder: Path, groups: Sequence[TrajectoryGroup], *, step: int, gaps: Mapping[str, np.ndarray] | None = None
) -> Path:
    """`folder/{step}.parquet`; atomic. Readers: `read_trajectories`, or any parquet tool.

    `gaps`: uid -> [T] int8, how much likelier the learner finds each token than the engine did
    (`importance.stored_gap`); the column `learner_gap`, empty where nobody asked. For readers of the file only.
    Written in row groups: the columns of a whole step would be a second copy of its tokens.
    """
    rows = [(g, t, lost) for g in groups for lost, part in ((False, g.trajectories), (True, g.lost)) for t in part]
    path = folder / f"{step}.parquet"
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{path.name}.partial"
    gaps = gaps or {}
    schema = _table([], step=step, gaps=gaps).schema
    # Token columns as they are: a dictionary of log-probs costs three times the time and a fifth more space.
    with pq.ParquetWriter(
        partial, schema, compression="zstd", use_dictionary=_REPEATED, write_statistics=_REPEATED
    ) as writer:
        for start in range(0, max(len(rows), 1), _ROW_GROUP):
            writer.write_table(_table(rows[start : start + _ROW_GROUP], step=step, gaps=gaps))
    partial.replace(path)
    return path


def _table(
    rows: Sequence[tuple[TrajectoryGroup, Trajectory, bool]], *, step: int, gaps: Mapping[str, np.ndarray]
) -> pa.Table:
    trajectories = [t for _, t, _ in rows]
    columns: dict[str, pa.Array] = {
        "step": pa.array([step] * len(rows), pa.int64()),
        "data_source": pa.array([g.row.data_source for g, _, _ in rows], pa.string()),
        "kind": pa.array([g.kind for g, _, _ in rows], pa.string()),
        "lost": pa.array([lost for _, _, lost in rows], pa.bool_()),
    }
    for name, kind in _SCALARS.items():
        columns[name] = pa.array([getattr(t, name) for t in trajectories], kind)
    for name, dtype in _ARRAYS.items():
        columns[name] = _list_column([getattr(t, name) for t in trajectories], dtype)
    nothing = np.zeros(0, _GAP)
    columns[GAP_COLUMN] = _list_column([nothing if lost else gaps.get(t.uid, nothing) for _, t, lost in rows], _GAP)
    columns["turns"] = _lists(
        [len(t.turns) for t in trajectories], _turn_structs([turn for t in trajectories for turn in t.turns])
    )
    columns["timing"] = _structs([t.timing for t in trajectories], _TIMING)
    columns["verdicts"] = _structs([t.verdicts for t in trajectories], _VERDICTS)
    return pa.table(columns)


def _turn_structs(turns: Sequence[Turn]) -> pa.StructArray:
    """Column by column: Arrow takes several times as long to read the same out of nested dicts."""
    further = [call for turn in turns for call in turn.further_calls]
    calls = {
        "call": _structs([turn.call for turn in turns], _CALL),
        "further_calls": _lists([len(turn.further_calls) for turn in turns], _structs(further, _CALL)),
    }
    return _structs(turns, _TURN, **calls)


def _structs(records: Sequence[Any], kind: pa.StructType, **columns: pa.Array) -> pa.StructArray:
    """The records' fields by name, those in `columns` taken from there; a record that is None is null."""
    missing = [record is None for record in records]
    fields = [kind.field(i) for i in range(kind.num_fields)]
    arrays = [
        columns[f.name] if f.name in columns else pa.array([getattr(r, f.name, None) for r in records], f.type)
        for f in fields
    ]
    return pa.StructArray.from_arrays(arrays, fields=fields, mask=pa.array(missing) if any(missing) else None)


def _lists(lengths: Sequence[int], values: pa.Array) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def read_trajectories(path: Path, *, uids: Sequence[str] | None = None, lost: bool = False) -> Iterator[Trajectory]:
    """Stream the trajectories of one file; `uids` picks some, `lost` yields the replaced attempts instead.

    Raises `DataError`, naming the file, for one that is not there, is cut off or holds something else.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist: trajectories of step N lie in RUN/trajectories/N.parquet")
    wanted = None if uids is None else set(uids)
    for batch in _batches(path):
        arrays = {name: _split(batch.column(name), dtype) for name, dtype in _ARRAYS.items()}
        unread = {*_ARRAYS, GAP_COLUMN} & set(batch.schema.names)
        scalars = batch.drop_columns(sorted(unread)).to_pylist()
        for index, row in enumerate(scalars):
            if row["lost"] == lost and (wanted is None or row["uid"] in wanted):
                yield _trajectory(row, {name: parts[index] for name, parts in arrays.items()})


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    try:
        file = pq.ParquetFile(path)
        missing = sorted({"lost", "turns", *_ARRAYS} - set(file.schema_arrow.names))
        if missing:
            raise DataError(f"{path} holds no trajectories: it lacks the columns {', '.join(missing)}")
        yield from file.iter_batches(batch_size=64)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file: {error}") from None


def _trajectory(row: dict[str, Any], arrays: dict[str, np.ndarray]) -> Trajectory:
    turns = tuple(turn_from(turn) for turn in row["turns"])
    plain: dict[str, Any] = {name: row[name] for name in _SCALARS if name != "cause" and name in row} | arrays
    return Trajectory(
        **plain,
        turns=turns,
        cause=Cause(row["cause"]),
        timing=Timing(**row["timing"]),
        verdicts=Verdicts(**row["verdicts"]),
    )


def turn_from(turn: dict[str, Any]) -> Turn:
    """A `Turn` of what `asdict` made of it."""
    call = None if turn["call"] is None else _call(turn["call"])
    return Turn(**{**turn, "call": call, "further_calls": tuple(_call(c) for c in turn["further_calls"])})


def _call(call: dict[str, Any]) -> ToolCall:
    return ToolCall(**{**call, "outcome": ToolOutcome(call["outcome"])})


def _list_column(arrays: Sequence[np.ndarray], dtype: np.dtype) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum([len(a) for a in arrays])]).astype(np.int64)
    values = np.concatenate([np.asarray(a, dtype=dtype) for a in arrays]) if arrays else np.zeros(0, dtype)
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values))


def _split(column: pa.Array, dtype: np.dtype) -> list[np.ndarray]:
    """Own, contiguous arrays, so that a kept trajectory does not hold its whole batch in memory."""
    flat = column.flatten().to_numpy(zero_copy_only=False).astype(dtype, copy=False)
    ends = np.cumsum(column.value_lengths().to_numpy(zero_copy_only=False))
    return [part.copy() for part in np.split(flat, ends[:-1])]
