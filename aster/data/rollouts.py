"""Rollouts on disk as JSON lines: what a person, the filter, the report and the reference's own scripts read.

`rollout_data/{step}.jsonl` and `val_rollout_data/{step}.jsonl` carry the reference's columns (input, output, score,
step, acc, pred, final_reward; validation also reward and non_tensor_*) and ours after them. Token ids live in
`trajectories/{step}.parquet` (`data.trajectories`). A file appears under its name only when it is complete.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from aster.data.formats import valid
from aster.data.trajectories import read_trajectories, write_trajectories_parquet
from aster.errors import DataError
from aster.types import ToolCall, Trajectory, TrajectoryGroup, Turn

__all__ = [
    "Decode",
    "DecodeOnce",
    "ScoreTable",
    "accuracy_of",
    "average_scores",
    "ground_truth_of",
    "read_rows",
    "read_trajectories",
    "rollout_files",
    "write_rollouts",
    "write_trajectories_parquet",
    "write_validation",
]


class Decode(Protocol):
    """`ChatRenderer.decode`."""

    def __call__(self, ids: np.ndarray, /, *, skip_special: bool = False) -> str: ...


class DecodeOnce:
    """`decode` for two readers of one step: what `keep` has decoded, a later call hands out without decoding.

    Texts are let go when they are handed out, and at most `room` characters wait; what finds no room is decoded twice.
    The texts of a large step would weigh as much as its tokens.
    """

    def __init__(self, decode: Decode, *, skip_special: bool, room: int = 32 << 20) -> None:
        self._decode, self._skip_special, self._room = decode, skip_special, room
        self._kept: dict[bytes, str] = {}

    def keep(self, ids: np.ndarray) -> str:
        text = self._decode(ids, skip_special=self._skip_special)
        if len(text) <= self._room:
            self._kept[_digest(ids)] = text
            self._room -= len(text)
        return text

    def __call__(self, ids: np.ndarray, /, *, skip_special: bool = False) -> str:
        kept = self._kept.pop(_digest(ids), None) if self._kept and skip_special == self._skip_special else None
        if kept is None:
            return self._decode(ids, skip_special=skip_special)
        self._room += len(kept)
        return kept


def _digest(ids: np.ndarray) -> bytes:
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


# writing -------------------------------------------------------------------------------------------------------------


def write_rollouts(folder: Path, groups: Sequence[TrajectoryGroup], *, step: int, decode: Decode) -> Path:
    """`folder/{step}.jsonl`, one row per trajectory; special tokens are skipped in the texts, as the reference does.

    Lost attempts that were replaced are not rows; a trajectory we lost for good is one, with null score and acc.
    """
    rows = (
        _row(g, t, prompt=prompt, step=step, decode=decode, skip_special=True)
        for g in groups
        for t, prompt in _with_prompts(g, decode=decode, skip_special=True)
    )
    return _write_lines(folder / f"{step}.jsonl", rows)


def write_validation(folder: Path, groups: Sequence[TrajectoryGroup], *, step: int, decode: Decode) -> Path:
    """`folder/{step}.jsonl` with the validation columns of the reference; special tokens stay in the texts."""
    return _write_lines(folder / f"{step}.jsonl", _validation_rows(groups, step=step, decode=decode))


def _validation_rows(groups: Iterable[TrajectoryGroup], *, step: int, decode: Decode) -> Iterator[dict[str, Any]]:
    for group in groups:
        for t, prompt in _with_prompts(group, decode=decode, skip_special=False):
            row = _row(group, t, prompt=prompt, step=step, decode=decode, skip_special=False)
            verdict = t.verdicts.math_verify if t.verdicts.math_verify is not None else row["acc"]
            yield row | {
                "acc": None if t.reward is None else verdict,
                "reward": t.reward,
                "non_tensor_data_source": group.row.data_source,
                "non_tensor_reward_model": {"ground_truth": group.row.ground_truth, "style": "rule-lighteval/MATH_v2"},
                "non_tensor_uid": t.uid,
            }


def _with_prompts(group: TrajectoryGroup, *, decode: Decode, skip_special: bool) -> Iterator[tuple[Trajectory, str]]:
    """Each trajectory with the text of its prompt, which is that of the one before as a rule."""
    ids: np.ndarray | None = None
    text = ""
    for t in group.trajectories:
        if ids is None or not np.array_equal(ids, t.prompt_ids):
            ids, text = t.prompt_ids, decode(t.prompt_ids, skip_special=skip_special)
        yield t, text


def _row(
    group: TrajectoryGroup, t: Trajectory, *, prompt: str, step: int, decode: Decode, skip_special: bool
) -> dict[str, Any]:
    output, spans = _decode_turns(t, decode=decode, skip_special=skip_special)
    sampled = t.versions[t.mask]
    return {
        "input": prompt,
        "output": output,
        "score": t.reward,
        "step": step,
        "acc": None if t.reward is None else t.reward > 0.5,
        "pred": t.verdicts.pred,
        "final_reward": t.reward,
        "row_id": t.row_id,
        "uid": t.uid,
        "sample": t.sample,
        "data_source": group.row.data_source,
        "ground_truth": group.row.ground_truth,
        "num_turns": len(t.turns) + len(t.calls) + 1,
        "tool_calls": len(t.calls),
        "stop_reason": t.cause.value,
        "error": t.error,
        "acc_strict": t.verdicts.strict,
        "acc_math_verify": t.verdicts.math_verify,
        "prompt_tokens": len(t.prompt_ids),
        "response_tokens": len(t.ids),
        "model_tokens": t.model_tokens,
        "policy_version": int(sampled.max()) if len(sampled) else None,
        "policy_version_oldest": int(sampled.min()) if len(sampled) else None,
        "mean_logprob": float(t.behaviour_logprobs[t.mask].mean(dtype=np.float64)) if len(sampled) else None,
        "engine": t.engine,
        "began_unix": t.timing.began_unix,
        "seconds": t.timing.total_s,
        "generate_s": t.timing.generate_s,
        "tool_s": t.timing.tool_s,
        "queue_s": t.timing.queue_s,
        "turns": [_turn(turn, span) for turn, span in zip(t.turns, spans, strict=True)],
    }


def _turn(turn: Turn, span: tuple[int, int]) -> dict[str, Any]:
    """`text` are the characters of `output` that the model wrote in this turn; up to the next turn is observation."""
    return {
        "text": span,
        "tokens": turn.stop - turn.start,
        "finish_reason": turn.finish_reason,
        "seconds": round(turn.ended_s - turn.began_s, 4),
        "call": None if turn.call is None else _call(turn.call),
    } | ({"further_calls": [_call(c) for c in turn.further_calls]} if turn.further_calls else {})


def _call(call: ToolCall) -> dict[str, Any]:
    return {
        "tool": call.tool,
        "code": call.code,
        "code_lines": len(call.code.splitlines()),
        "status": call.status,
        "outcome": call.outcome.value,
        "seconds": round(call.seconds, 4),
        "queue_s": round(call.queue_s, 4),
        "state_lost": call.state_lost,
    }


def _decode_turns(t: Trajectory, *, decode: Decode, skip_special: bool) -> tuple[str, list[tuple[int, int]]]:
    """The response's text, and where each turn's own text lies in it. Turn borders are special tokens, so decoding
    piece by piece gives the text of the whole."""
    text = ""
    spans = []
    at = 0
    for turn in t.turns:
        text += decode(t.ids[at : turn.start], skip_special=skip_special) if turn.start > at else ""
        begin = len(text)
        text += decode(t.ids[turn.start : turn.stop], skip_special=skip_special)
        spans.append((begin, len(text)))
        at = turn.stop
    return text + (decode(t.ids[at:], skip_special=skip_special) if at < len(t.ids) else ""), spans


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return path


# reading -------------------------------------------------------------------------------------------------------------

_STEP_FILE = re.compile(r"(\d+)\.jsonl")


def rollout_files(folder: Path, *, step_min: int | None = None, step_max: int | None = None) -> list[tuple[int, Path]]:
    """`(step, path)` of every `{step}.jsonl` in `folder`, in order; both ends included. Other files are ignored."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a directory: name the folder that holds the STEP.jsonl files of a run")
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := _STEP_FILE.fullmatch(p.name)) and not p.is_dir()]
    low, high = step_min if step_min is not None else 0, step_max if step_max is not None else 10**18
    return sorted((step, path) for step, path in found if low <= step <= high)


def read_rows(path: Path, *, on_bad_line: Callable[[str], None] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of one file, one at a time. A line that is no JSON object is a `DataError`, or goes to `on_bad_line`."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = line if number > 1 else line.removeprefix(codecs.BOM_UTF8)
            if not text.strip():
                continue
            try:
                row = json.loads(text.decode("utf-8"))
                problem = "" if isinstance(row, dict) else f"a JSON {type(row).__name__}, not an object"
            except UnicodeDecodeError as error:
                problem = f"not UTF-8 ({error.reason} at byte {error.start})"
            except (ValueError, RecursionError) as error:
                problem = f"not JSON ({error})"
            if not problem:
                yield row
                continue
            message = f"{path}, line {number}: {problem}"
            if on_bad_line is None:
                raise DataError(f"{message}. Was the file cut off while it was written?")
            on_bad_line(message)


def accuracy_of(value: Any, *, where: str) -> float | None:
    """A row's `acc`, or `score` where it has none: true, false, or a number from 0 to 1; None = never judged.

    A reward of -1 and 1 is not taken for one: where its wrong answers begin is for the run that wrote it to say.
    """
    if value is None:
        return None
    if isinstance(value, int | float) and 0 <= value <= 1:  # bool is an int, NaN is in no range
        return float(value)
    raise DataError(
        f"{where}: acc (or score) must be true, false or a number from 0 to 1, got {value!r:.80}; "
        "of rewards on another scale make a column acc"
    )


def ground_truth_of(row: dict[str, Any]) -> str:
    """Of a validation row, ours or the reference's; empty where it has none that is a text or a number."""
    model = row.get("non_tensor_reward_model")
    for truth in (model.get("ground_truth") if isinstance(model, dict) else None, row.get("ground_truth")):
        if isinstance(truth, str) or (isinstance(truth, int | float) and not isinstance(truth, bool)):
            text = str(truth)
            if text and not (isinstance(truth, float) and not math.isfinite(truth)):
                return text
    return ""


# scoring -------------------------------------------------------------------------------------------------------------


@dataclass
class ScoreTable:
    """`scores[source][step]` = mean verdict; `skipped[reason]` = rows that could not be judged."""

    scores: dict[str, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))
    rows: dict[str, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))
    skipped: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def csv(self, source: str) -> str:
        """`step,avg_score` lines, by step: the reference's curve file."""
        lines = [f"{step},{value!r}" for step, value in sorted(self.scores[source].items())]
        return "\n".join(["step,avg_score", *lines]) + "\n"


def average_scores(
    folder: Path,
    *,
    verify: Callable[[str, str], bool],
    sources: Sequence[str] | None = None,
    last_chars: int = 500,
    on_row: Callable[[int, dict[str, Any], bool], None] | None = None,
) -> ScoreTable:
    """Judge every validation row again: `verify(end of output, ground truth)`, mean per source and step.

    Reads ours and the reference's own files. `sources` names those to look at (null = all). Rows without a ground
    truth, and lines that are no JSON, are counted and left out, never wrong; so are rows that our failures lost.
    """
    table = ScoreTable()
    for step, path in rollout_files(folder):
        verdicts: dict[str, list[bool]] = defaultdict(list)

        def bad_line(message: str) -> None:
            table.skipped["not JSON"] += 1

        for row in read_rows(path, on_bad_line=bad_line):
            source = row.get("non_tensor_data_source") or row.get("data_source")
            source = valid(str(source)) if isinstance(source, str | int) else None
            truth = ground_truth_of(row)
            if source is None or (sources is not None and source not in sources):
                table.skipped["source"] += 1
            elif not truth:
                table.skipped["no ground truth"] += 1
            elif row.get("error") and row.get("score") is None:
                table.skipped["lost to infrastructure"] += 1
            else:
                verdict = verify(str(row.get("output") or "")[-last_chars:], truth)
                verdicts[source].append(verdict)
                if on_row is not None:
                    on_row(step, row, verdict)
        for source, seen in verdicts.items():
            table.scores[source][step] = sum(seen) / len(seen)
            table.rows[source][step] = len(seen)
    return table
