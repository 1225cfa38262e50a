"""Judging stored validation rows again, as the reference's score script does: same rows, same average, same files.

    DIR/STEP.jsonl -> DIR/report/SOURCE.csv (step,avg_score) and DIR/report/rescore.json

Used by `aster eval --rescore DIR`. Reads our own files and the reference's; samples nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aster.agent.rewards import MATH_VERIFY_TAIL_CHARS, RewardPool
from aster.data.evaluations import write_json
from aster.data.rollouts import ScoreTable, average_scores, ground_truth_of
from aster.errors import DataError, RewardFailed

_LONGEST_NAME = 200  # bytes; a file system takes 255, and an ending comes


@dataclass
class Rescored:
    """The averages, every row whose verdict is not the one it was stored with, and those nobody could judge."""

    table: ScoreTable
    changed: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def rescore(folder: Path, *, timeout_s: float = 10.0) -> Rescored:
    """Judge every row of `folder` (a run directory, or one with STEP.jsonl files) with math-verify.

    An answer on which the verifier fails or hangs counts as wrong, as in the reference, and is listed.
    """
    inner = folder / "val_rollout_data"
    folder = inner if inner.is_dir() else folder
    result = Rescored(ScoreTable())
    pool = RewardPool(reward="math_verify", timeout_s=timeout_s)
    with asyncio.Runner() as runner:

        def verify(text: str, truth: str) -> bool:
            try:
                return bool(runner.run(pool.score(text, truth))[1].math_verify)
            except RewardFailed as error:
                result.failures.append(str(error))
                return False

        def on_row(step: int, row: dict[str, Any], right: bool) -> None:
            if row.get("acc") is not None and bool(row["acc"]) != right:
                output = str(row.get("output") or "")
                result.changed.append(
                    {
                        "step": step,
                        "uid": row.get("uid") or row.get("non_tensor_uid"),
                        "stored": bool(row["acc"]),
                        "math_verify": right,
                        "ground_truth": ground_truth_of(row),
                        "output_tail": output[-min(200, MATH_VERIFY_TAIL_CHARS) :],
                    }
                )

        try:
            result.table = average_scores(folder, verify=verify, on_row=on_row)
        finally:
            pool.close()
    if not result.table.scores:
        raise DataError(f"{folder} holds no row with a data source and a ground truth: nothing to judge")
    _write(folder / "report", result)
    return result


def _write(folder: Path, result: Rescored) -> None:
    table = result.table
    write_json(  # first: it has everything, and judging took long
        folder / "rescore.json",
        {
            "scores": table.scores,
            "rows": table.rows,
            "skipped": table.skipped,
            "verdicts_changed": result.changed,
            "verifier_failures": result.failures,
        },
    )
    for source in table.scores:
        (folder / f"{_file_name(source)}.csv").write_text(table.csv(source), "utf-8")


def _file_name(source: str) -> str:
    """A source may be named as on the Hub, openai/gsm8k, or like no file at all; two sources never share a name."""
    name = re.sub(r"[\x00-\x1f/%]", lambda found: f"%{ord(found[0]):02X}", source)
    if len(name.encode()) <= _LONGEST_NAME:
        return name
    short = name.encode()[: _LONGEST_NAME - 17].decode(errors="ignore")
    return f"{short}~{hashlib.sha256(name.encode()).hexdigest()[:16]}"
