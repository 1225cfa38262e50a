"""One step on the clock: what the learner and every engine did when, and who waited for whom.

The learner's part comes from the step's `timing_s/*`, the engines' from the trajectories' own clocks. Both are unix
times of their machines; on a cluster they are as comparable as its clocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

PHASES = (
    ("gen", "rollouts"),
    ("old_log_prob", "log-probs"),
    ("update_actor", "update"),
    ("validation_wait", "validation"),
    ("publish", "weights"),
)
_COLUMNS = (
    "uid",
    "kind",
    "lost",
    "engine",
    "cause",
    "reward",
    "timing",
    "turns.list.element.began_s",
    "turns.list.element.ended_s",
    "turns.list.element.call.seconds",
    "turns.list.element.call.queue_s",
    "turns.list.element.further_calls.list.element.seconds",
)
_MS = 1000
_APART_S = 86_400.0


@dataclass(frozen=True)
class Clocked:
    """One trajectory on the clock; spans are (began, ended) in seconds since `began`."""

    uid: str
    engine: str
    began: float  # unix seconds
    total_s: float
    score_s: float  # of the verifier, behind total_s
    queue_s: float
    right: bool | None  # None: lost by our infrastructure
    lost: bool  # replaced by a retry
    generating: tuple[tuple[float, float], ...]
    calling: tuple[tuple[float, float], ...]


def read_clocks(path: Path) -> list[Clocked]:
    """All trajectories of one `trajectories/STEP.parquet`, lost attempts included; texts and ids are not read."""
    return [_clocked(row) for row in pq.ParquetFile(path).read(columns=list(_COLUMNS)).to_pylist()]


def _clocked(row: Mapping[str, Any]) -> Clocked:
    turns, timing = row["turns"] or [], row["timing"]
    calling = []
    for turn in turns:
        seconds = (turn["call"] or {}).get("seconds") or 0.0
        seconds += sum(c["seconds"] or 0.0 for c in turn.get("further_calls") or [])
        if turn["call"] is not None:
            calling.append((turn["ended_s"], turn["ended_s"] + seconds))
    return Clocked(
        uid=row["uid"],
        engine=row["engine"] or "",
        began=timing["began_unix"],
        total_s=timing["total_s"],
        score_s=timing.get("score_s") or 0.0,
        queue_s=timing["queue_s"],
        right=None if row["reward"] is None else row["reward"] > 0.5,
        lost=bool(row["lost"]),
        generating=tuple((t["began_s"], t["ended_s"]) for t in turns),
        calling=tuple(calling),
    )


def clocks_of_rows(rows: Sequence[Mapping[str, Any]]) -> list[Clocked]:
    """The same from a rollout file's rows, where there is no parquet: turn after turn, so waiting falls at the end."""
    out = []
    for row in rows:
        if not row.get("began_unix") or row.get("seconds") is None:
            continue
        at, generating, calling = 0.0, [], []
        for turn in row.get("turns") or []:
            generating.append((at, at + turn["seconds"]))
            at += turn["seconds"]
            if turn.get("call"):
                calling.append((at, at + turn["call"]["seconds"]))
                at += turn["call"]["seconds"]
        right = None if row.get("acc") is None else bool(row["acc"])
        out.append(
            Clocked(
                uid=str(row.get("uid") or ""),
                engine=str(row.get("engine") or ""),
                began=float(row["began_unix"]),
                total_s=float(row["seconds"]),
                score_s=0.0,
                queue_s=float(row.get("queue_s") or 0.0),
                right=right,
                lost=False,
                generating=tuple(generating),
                calling=tuple(calling),
            )
        )
    return out


def step_view(
    clocks: Sequence[Clocked], *, phases: Mapping[str, float], began: float | None, row_of: Mapping[str, int]
) -> dict[str, Any] | None:
    """The page's picture of one step, in ms from its beginning; None where nothing has a clock.

    `phases`: seconds by PHASES' names and "step"; `began`: unix time at which the driver began it.
    `row_of`: uid -> row of the table, for the trajectories that are in the page.
    """
    clocks = sorted((c for c in clocks if c.began > 0), key=lambda c: (c.began, -c.total_s))
    learner = _learner(phases)
    if clocks and began is not None and abs(clocks[0].began - began) > _APART_S:
        began = None  # two clocks that cannot be of one step: a copied file, or a machine whose clock is wrong
    if began is None or not learner:
        began, learner = None, []
    if not clocks and not learner:
        return None
    # rollouts of an asynchronous run began in an earlier step
    zero = min([*([began] if began is not None else []), *(c.began for c in clocks)])
    first = zero if began is None else began
    end = max([first + sum(s for _, s in learner), *(c.began + c.total_s + c.score_s for c in clocks)])
    engines = sorted({c.engine for c in clocks})
    places = {name: i for i, name in enumerate(engines)}

    def ms(unix: float) -> int:
        return round((unix - zero) * _MS)

    at, lanes = first - zero, []
    for name, seconds in learner:
        lanes.append([name, round(at * _MS), round((at + seconds) * _MS)])
        at += seconds
    return {
        "end": ms(end),
        "learner": lanes,
        "engines": engines,
        "t": [
            [
                places[c.engine],
                ms(c.began),
                ms(c.began + c.total_s),
                2 if c.lost else None if c.right is None else int(c.right),
                row_of.get(c.uid, -1) if not c.lost else -1,
                [round(x * _MS) for span in c.generating for x in span],
                [round(x * _MS) for span in c.calling for x in span],
                round(c.score_s * _MS),
            ]
            for c in clocks
        ],
        "said": sentences(clocks, dict(learner), began=first),
    }


def _learner(phases: Mapping[str, float]) -> list[tuple[str, float]]:
    known = [(label, phases[name]) for name, label in PHASES if phases.get(name, 0.0) > 0]
    rest = phases.get("step", 0.0) - sum(s for _, s in known)
    return [*known, ("rest", rest)] if known and rest > 0.001 else known


def sentences(clocks: Sequence[Clocked], learner: Mapping[str, float], *, began: float) -> list[str]:
    """Who waited for whom, in words, with the numbers they rest on."""
    out = []
    whole = sum(learner.values())
    gen = learner.get("rollouts", 0.0)
    if whole and gen:
        out.append(f"The learner waited {gen:.1f} s for rollouts, {gen / whole:.0%} of the step's {whole:.1f} s.")
    done = sorted(c.began + c.total_s for c in clocks)
    if len(done) >= 10:
        slow = done[-1] - done[int(0.9 * len(done)) - 1]
        share = f", {slow / gen:.0%} of that wait" if gen else ""
        out.append(f"The slowest tenth of {len(done)} trajectories took {slow:.1f} s longer than the rest{share}.")
    generate = sum(b - a for c in clocks for a, b in c.generating)
    tools = sum(b - a for c in clocks for a, b in c.calling)
    total = sum(c.total_s for c in clocks)
    if total:
        queue = sum(c.queue_s for c in clocks)
        queued = f" ({queue / total:.0%} waiting for room in the sandbox)" if queue > 0.005 * total else ""
        spent = f"{generate / total:.0%} of its time generating, {tools / total:.0%} in tools{queued}"
        out.append(f"A trajectory spent {spent}.")
    if done and whole > gen > 0:
        idle = began + whole - max(done[-1], began)
        if idle > 0:
            out.append(f"After the last answer the engines had nothing to do for {idle:.1f} s of it.")
    return out
