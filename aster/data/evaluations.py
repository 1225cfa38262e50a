"""What an evaluation is made of and what it leaves: hashes of its inputs, its parts on disk, scores per problem.

A part is one problem's finished samples, `parts/{step}/round_{r}/{row}.parquet`. A killed evaluation reads them back
and samples the rest; its fingerprint says that both halves belong together. Judging and sampling are done elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from aster.algo.intervals import PairedDifference, paired_test
from aster.algo.sequential import Look, look
from aster.config import Recipe
from aster.data.formats import valid
from aster.data.rollouts import accuracy_of, read_rows, rollout_files
from aster.data.trajectories import read_trajectories, write_trajectories_parquet
from aster.errors import ConfigError, DataError
from aster.types import PromptRow, Trajectory, TrajectoryGroup

Scores = dict[str, dict[str, list[float]]]
"""`scores[data source][row id]` = the verdicts of its samples, 0.0 or 1.0; what our failures lost is left out."""

_SETTINGS = ("model.compute_dtype", "data.val_max_rows", "budget.", "sampling.", "tool.", "eval.", "algo.reward")


# hashes --------------------------------------------------------------------------------------------------------------


def files_hash(paths: Iterable[str | Path]) -> str:
    """sha256 over names (relative to what was given) and contents, in order of name; directories count with all in
    them. Reads everything: about 1 GB/s."""
    total = hashlib.sha256()
    for path in map(Path, paths):
        members = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for member in members:
            with member.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            name = member.relative_to(path) if member != path else member.name
            total.update(f"{name} {digest}\n".encode())
    return total.hexdigest()


def fingerprint(
    recipe: Recipe, *, weights: str, rounds: Sequence[int], decided_against: Scores | None = None
) -> dict[str, str]:
    """Everything that a score depends on: weights (their hash), data, the settings that shape a trajectory, the samples
    of each round (their seeds differ), and the scores that may end the sampling after a round."""
    settings = {k: v for k, v in recipe.flat().items() if k.startswith(_SETTINGS) or k == "run.seed"}
    made_of = {
        "weights": weights,
        "data": files_hash(recipe.data.val_files),
        "settings": _json_hash(settings),
        "rounds": " ".join(map(str, rounds)),
    }
    return made_of if decided_against is None else made_of | {"rival": _json_hash(decided_against)}


def _json_hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# parts ---------------------------------------------------------------------------------------------------------------


class Parts:
    """The finished problems of one evaluation. Raises `ConfigError` when `folder` holds those of another one."""

    def __init__(self, folder: Path, rows: Sequence[PromptRow], *, made_of: Mapping[str, str], resume: bool) -> None:
        self.folder = folder
        self._rows = {row.row_id: (index, row) for index, row in enumerate(rows)}
        marker = folder / "fingerprint.json"
        if folder.exists() and not resume:
            shutil.rmtree(folder)
        if marker.is_file():
            before = json.loads(marker.read_text("utf-8"))
            changed = [key for key, value in made_of.items() if before.get(key) != value]
            if changed:
                raise ConfigError(
                    f"{folder} holds an unfinished evaluation with other {' and '.join(changed)}: give this one "
                    "another run.name, or start over with run.resume=false"
                )
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / "fingerprint.tmp"
        partial.write_text(json.dumps(dict(made_of), indent=1), "utf-8")
        partial.replace(marker)

    def add(self, group: TrajectoryGroup, *, round_: int) -> None:
        """Keep a problem whose samples all have a verdict. One that our failures cut short is sampled again."""
        if len(group.scored) == len(group.trajectories):
            index, _ = self._rows[group.row.row_id]
            write_trajectories_parquet(self.folder / f"round_{round_}", [group], step=index)

    def read(self, *, round_: int, step: int) -> dict[str, TrajectoryGroup]:
        """By row id."""
        found = {}
        for row_id, (index, row) in self._rows.items():
            path = self.folder / f"round_{round_}" / f"{index}.parquet"
            if path.is_file():
                done, lost = tuple(read_trajectories(path)), tuple(read_trajectories(path, lost=True))
                found[row_id] = TrajectoryGroup(row, step, done, kind="val", lost=lost)
        return found

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def finished(
    run: Path, rows: Sequence[PromptRow], *, step: int, made_of: Mapping[str, str]
) -> list[TrajectoryGroup] | None:
    """The groups of a finished step, in the order of `rows`; None unless it is there and was made of the same."""
    result = run / "evaluations" / f"{step}.json"
    if not result.is_file() or json.loads(result.read_text("utf-8")).get("hashes") != dict(made_of):
        return None
    path = run / "trajectories" / f"{step}.parquet"
    by_row: dict[str, list[Trajectory]] = {row.row_id: [] for row in rows}
    for trajectory in read_trajectories(path):
        by_row[trajectory.row_id].append(trajectory)
    return [TrajectoryGroup(row, step, tuple(by_row[row.row_id]), kind="val") for row in rows]


def joined(rounds: Sequence[Mapping[str, TrajectoryGroup]], rows: Sequence[PromptRow]) -> list[TrajectoryGroup]:
    """Rounds of samples as one group per row, samples numbered on, in the order of `rows`."""
    out = []
    for row in rows:
        groups = [r[row.row_id] for r in rounds]
        trajectories = [t for g in groups for t in g.trajectories]
        if len(groups) > 1:
            trajectories = [
                replace(t, sample=i, uid=f"{t.uid.rpartition('/')[0].partition('~')[0]}/{i}")
                for i, t in enumerate(trajectories)
            ]
        out.append(replace(groups[0], trajectories=tuple(trajectories), lost=tuple(t for g in groups for t in g.lost)))
    return out


# scores and their comparison -----------------------------------------------------------------------------------------


def read_scores(path: Path) -> Scores:
    """Of a run directory (its newest step), a val_rollout_data folder, or one STEP.jsonl; ours carry row ids."""
    if path.is_dir():
        folder = path / "val_rollout_data"
        files = rollout_files(folder if folder.is_dir() else path)
        if not files:
            raise DataError(
                f"{path} holds no STEP.jsonl: name a run directory, its val_rollout_data, or one file in it"
            )
        path = files[-1][1]
    elif not path.is_file():
        raise DataError(f"{path} does not exist: name a run directory, its val_rollout_data, or one STEP.jsonl")
    scores: Scores = {}
    for number, row in enumerate(read_rows(path), 1):
        source, row_id = row.get("non_tensor_data_source") or row.get("data_source"), row.get("row_id")
        if source is None or row_id is None:
            raise DataError(f"{path}: a row without row_id or data source cannot be paired; evaluate that model here")
        accuracy = accuracy_of(row.get("acc"), where=f"{path}, row {number}")
        if accuracy is not None:
            scores.setdefault(str(source), {}).setdefault(str(row_id), []).append(accuracy)
    return scores


def compare(a: Scores, b: Scores) -> dict[str, PairedDifference]:
    """b - a on the problems that both have, per data source."""
    out = {}
    for source in sorted(set(a) & set(b)):
        shared = sorted(set(a[source]) & set(b[source]))
        if shared:
            out[source] = paired_test(
                [float(np.mean(a[source][r])) for r in shared], [float(np.mean(b[source][r])) for r in shared]
            )
    if not out:
        raise DataError("the two evaluations share no problem: they are of different data")
    return out


def look_at(a: Scores, b: Scores, *, planned: int, alpha: float) -> Look | None:
    """The stopping rule over all shared problems of all sources; None while some problem lacks its second sample."""
    pairs = [
        (a[s][r], b[s][r])
        for s in sorted(set(a) & set(b))
        for r in sorted(set(a[s]) & set(b[s]))
        if len(a[s][r]) > 1 and len(b[s][r]) > 1
    ]
    if not pairs:
        return None
    counts = [np.array([[sum(one), len(one)] for one in side]) for side in zip(*pairs, strict=True)]
    (a_correct, a_samples), (b_correct, b_samples) = counts[0].T, counts[1].T
    return look(a_correct, a_samples, b_correct, b_samples, planned=planned, alpha=alpha)


@dataclass(frozen=True)
class Disagreement:
    """One answer that the two verifiers judge differently."""

    row_id: str
    sample: int
    data_source: str
    ground_truth: str
    pred: str
    strict: bool
    math_verify: bool
    final_text: str  # its last 200 characters


def disagreements(groups: Sequence[TrajectoryGroup]) -> Iterator[Disagreement]:
    for group in groups:
        for t in group.scored:
            v = t.verdicts
            if v.strict is not None and v.math_verify is not None and v.strict != v.math_verify:
                yield Disagreement(
                    row_id=group.row.row_id,
                    sample=t.sample,
                    data_source=group.row.data_source,
                    ground_truth=group.row.ground_truth,
                    pred=v.pred,
                    strict=v.strict,
                    math_verify=v.math_verify,
                    final_text=t.final_text[-200:],
                )


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Atomic; makes the directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(valid(json.dumps(value, indent=1, ensure_ascii=False)), "utf-8")
    partial.replace(path)
