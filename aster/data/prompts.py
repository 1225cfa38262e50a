"""Prompt files: rows in the columns of the paper's data sets, a stable id for each, and the order they are drawn in.

    prompt list<struct<content, role>> · reward_model struct<ground_truth, ...> · data_source · agent_name · extra_info

`row_id` joins rollouts to rows. It is the file's own `row_id` column, else `extra_info.index`, else `data_source` and
`id`, else a hash of the prompt. An id that occurs again gets the suffix `#2`, `#3` in order of appearance.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aster.errors import DataError
from aster.types import PromptRow

INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}.\n"
"""What every prompt file of the paper appends to the problem; `user_message` adds the newline before it."""
STYLE = "rule-lighteval/MATH_v2"
"""reward_model.style in all of the paper's files."""

_REQUIRED = ("prompt", "reward_model", "data_source")


def user_message(problem: str) -> str:
    """The user turn around a problem, exactly as in the paper's prompt files."""
    return f"\n{problem}{INSTRUCTION}"


def read_prompts(files: Sequence[str | Path], *, max_rows: int | None = None) -> list[PromptRow]:
    """All rows of all files in order, at most `max_rows`. Raises `DataError` naming the file, the row and the cure."""
    seen: Counter[str] = Counter()
    rows: list[PromptRow] = []
    for file in files:
        for index, record in enumerate(_records(Path(file))):
            if max_rows is not None and len(rows) >= max_rows:
                return rows
            rows.append(_row(record, seen, where=f"{file}, row {index}"))
    if not rows:
        raise DataError(f"no rows in {', '.join(map(str, files)) or 'an empty list of files'}")
    return rows


def write_prompts(path: str | Path, rows: Sequence[PromptRow]) -> None:
    """A parquet that `read_prompts` and the reference's loader both read; `row_id` has a column of its own."""
    records = [
        {
            "row_id": r.row_id,
            "prompt": [{"content": m["content"], "role": m["role"]} for m in r.messages],
            "reward_model": {"ground_truth": r.ground_truth, "style": STYLE},
            "data_source": r.data_source,
            "agent_name": r.agent_name,
            "solution": r.ground_truth,
            "ability": r.extra.get("ability", "MATH"),
            "extra_info": {"index": r.row_id, "need_tools_kwargs": False},
        }
        for r in rows
    ]
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".tmp")
    pq.write_table(pa.Table.from_pylist(records), partial)
    partial.replace(target)


class PromptStream:
    """Rows in the order of (seed, epoch), the last incomplete batch of an epoch dropped; resumes exactly.

    A row is open from `take` until `done`. The state remembers the open ones, whatever was taken after them, and a
    resumed stream hands them out first: a killed run loses no prompt and shows none twice.

    >>> stream = PromptStream(rows, batch=128, seed=1, epochs=3)       # doctest: +SKIP
    >>> stream.total_steps                                             # 17,398 rows: 3 x 135
    405
    """

    def __init__(self, rows: Sequence[PromptRow], *, batch: int, seed: int, epochs: int) -> None:
        if len(rows) < batch:
            raise DataError(
                f"{len(rows)} prompts do not fill one step of rollout.prompts_per_step={batch}: "
                f"lower it to at most {len(rows)} or give more rows"
            )
        self.rows = rows
        self.batch = batch
        self.seed = seed
        self.rows_per_epoch = len(rows) // batch * batch
        self.total_steps = len(rows) // batch * epochs
        self.taken = 0  # of the endless order, in rows
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))  # of one epoch
        self._open: list[PromptRow] = []
        self._again: deque[PromptRow] = deque()

    @property
    def epoch(self) -> int:
        return self.taken // self.rows_per_epoch

    def take(self) -> PromptRow:
        """The next row; goes on past the last epoch with further shuffles (a run with more `run.steps` than rows)."""
        row = self._again.popleft() if self._again else self._next()
        self._open.append(row)
        return row

    def done(self, row: PromptRow) -> None:
        """`row` was learnt from, or dropped for good. Another copy of it that is open, of a later epoch, stays so."""
        index = next((i for i, other in enumerate(self._open) if other.row_id == row.row_id), None)
        assert index is not None, f"row {row.row_id} is not open"
        del self._open[index]

    def state_dict(self) -> dict[str, Any]:
        return {
            "taken": self.taken,
            "open": [row.row_id for row in (*self._open, *self._again)],
            "seed": self.seed,
            "batch": self.batch,
            "rows": self._fingerprint(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a saved position. Raises `DataError` when rows, seed or batch differ: the order would, too."""
        mine = self.state_dict()
        changed = [k for k in ("rows", "seed", "batch") if state[k] != mine[k]]
        if changed:
            raise DataError(
                "the checkpoint was made with other data: "
                + ", ".join(f"{k} was {state[k]!r}, is {mine[k]!r}" for k in changed)
                + "; restore the old values or start a new run (another run.name, or run.resume=false)"
            )
        by_id = {row.row_id: row for row in self.rows}
        self.taken = int(state["taken"])
        self._open, self._again = [], deque(by_id[row_id] for row_id in state["open"])

    def _next(self) -> PromptRow:
        epoch, place = divmod(self.taken, self.rows_per_epoch)
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
        self.taken += 1
        return self.rows[self._order[1][place]]

    def _fingerprint(self) -> str:
        return hashlib.sha256("\n".join(r.row_id for r in self.rows).encode()).hexdigest()[:16]


def _records(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        what = "is a directory: name the parquet file in it" if path.is_dir() else "does not exist"
        raise DataError(f"{path} {what}")
    if path.suffix in (".jsonl", ".ndjson", ".json", ".csv"):
        raise DataError(f"{path} is no parquet file: `aster prepare --data {path} ...` makes one of raw problems")
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file: {error}") from None
    missing = [c for c in _REQUIRED if c not in file.schema_arrow.names]
    if missing:
        raise DataError(f"{path} lacks the columns {missing}; it has {file.schema_arrow.names}")
    try:
        for batch in file.iter_batches(batch_size=1024):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # a sound footer, and broken pages before it
        raise DataError(f"{path} is not a readable parquet file: {error}") from None


def _row(record: Mapping[str, Any], seen: Counter[str], *, where: str) -> PromptRow:
    messages = _messages(record["prompt"], where)
    reward_model = record["reward_model"]
    if not isinstance(reward_model, dict | None):
        raise DataError(f"{where}: reward_model must be a struct with ground_truth, got {type(reward_model).__name__}")
    truth = (reward_model or {}).get("ground_truth")
    if truth is None:
        raise DataError(f"{where}: reward_model.ground_truth is missing")
    extra = {
        k: v for k, v in (record.get("extra_info") or {}).items() if k not in {"tools_kwargs", "need_tools_kwargs"}
    }
    source = str(record["data_source"])
    row_id = _unique(_own_id(record, extra, source) or _hash(messages), seen)
    return PromptRow(row_id, messages, str(truth), source, record.get("agent_name") or "code_agent", extra)


def _messages(prompt: Any, where: str) -> tuple[dict[str, str], ...]:
    if not prompt:
        raise DataError(f"{where}: column prompt is empty")
    whole = isinstance(prompt, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in prompt
    )
    if not whole:
        raise DataError(
            f"{where}: prompt must be a list of messages with a role and a text, got {str(prompt)[:80]!r}: "
            "`aster prepare --data` makes such a file"
        )
    return tuple({"role": m["role"], "content": m["content"]} for m in prompt)


def _unique(own: str, seen: Counter[str]) -> str:
    """`own`, or with the first suffix that no other row has, whatever ids the file itself gives."""
    row_id = own
    while row_id in seen:
        seen[own] += 1
        row_id = f"{own}#{seen[own]}"
    seen[row_id] = 1
    return row_id


def _own_id(record: Mapping[str, Any], extra: Mapping[str, Any], source: str) -> str | None:
    if record.get("row_id") is not None:
        return str(record["row_id"])
    if extra.get("index") is not None:
        return str(extra["index"])
    if record.get("id") is not None:
        return f"{source}-{record['id']}"
    return None


def _hash(messages: Sequence[Mapping[str, str]]) -> str:
    return hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()[:16]
