"""A run directory as the report reads it: its config, its metrics by step, its events, and its numbers in brief."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from aster.algo.intervals import paired_test
from aster.data.rollouts import rollout_files
from aster.errors import DataError
from aster.page.rows import sound_rows
from aster.page.steps import PHASES
from aster.tracking import LATEST, METRICS_FILE, read_events, read_lines, read_metrics

_ROLLOUTS = ("rollout_data", "val_rollout_data")
_MEAN_ACCURACY = re.compile(r"(val-core/(.+)/acc)/mean@(\d+)")  # a data source may have slashes of its own
_UNREAD = (
    "timing_per_token_ms/",
    "/tool_use_info/",
    "/causes/",
    "tool_use_info/extra",
    "/infra_",
    "events/",
    "began_unix",
)


@dataclass(frozen=True)
class Run:
    """Everything but the trajectories. `metrics[step][name]`; times are unix seconds."""

    name: str
    path: Path
    stage: str  # "sft", "rl", "eval", or "" where the config is gone
    run_id: str
    config_hash: str
    config: dict[str, Any]
    metrics: dict[int, dict[str, float]]
    events: list[dict[str, Any]]
    began: float
    ended: float
    began_at: dict[int, float]  # step -> unix time at which the driver began it
    notes: tuple[str, ...] = ()  # what could not be read

    def series(self, name: str) -> list[tuple[int, float]]:
        return [(step, values[name]) for step, values in self.metrics.items() if name in values]

    @property
    def names(self) -> list[str]:
        return sorted({name for values in self.metrics.values() for name in values})

    def phases(self) -> dict[int, dict[str, float]]:
        """Seconds of each step by phase, as `timing_s/*` has them."""
        wanted = {f"timing_s/{name}": name for name in (*(name for name, _ in PHASES), "step")}
        return {
            step: {short: values[name] for name, short in wanted.items() if _is_time(values.get(name))}
            for step, values in self.metrics.items()
            if _is_time(values.get("timing_s/step"))
        }


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Run directories among `paths` or directly inside them, oldest first. DataError when there is none.

    A run is what has metrics, or rollouts (a run that was copied in part, or that has just begun).
    """
    found: list[Path] = []
    for path in paths:
        if _is_run(path):
            found.append(path)
        elif path.is_dir():
            found += [inside for inside in path.iterdir() if _is_run(inside)]
        else:
            raise DataError(f"{path} does not exist: name a run directory, such as runs/NAME")
    if not found:
        raise DataError(
            f"no run in {', '.join(map(str, paths))}: a run directory holds {METRICS_FILE}, or name its parent"
        )
    return sorted(dict.fromkeys(found), key=lambda p: (_began(p), str(p)))


def _is_run(path: Path) -> bool:
    return (path / METRICS_FILE).is_file() or any((path / folder).is_dir() for folder in _ROLLOUTS)


def _began(path: Path) -> float:
    return next((float(line["time"]) for line in _lines(path) if "time" in line), math.inf)


def _lines(path: Path, *, on_bad_line: Callable[[str], None] = lambda _: None) -> Iterator[dict[str, Any]]:
    file = path / METRICS_FILE
    return read_lines(file, on_bad_line=on_bad_line) if file.is_file() else iter(())


def load_run(path: Path, *, name: str | None = None) -> Run:
    """What there is of it: a missing or half-written config or metrics file is a note, not an error."""
    file = path / METRICS_FILE
    config, notes = _config(path / "config.yaml")
    if not file.is_file():
        notes.append(f"{file} does not exist: no curves")
    first: dict[str, Any] = {}
    last: dict[str, Any] = {}
    began_at: dict[int, float] = {}
    for line in _lines(path, on_bad_line=notes.append):
        first = first or line
        last = line
        if (began := _beginning(line)) is not None:
            began_at[line["step"]] = began
    return Run(
        name=name or path.name,
        path=path,
        stage=str(config.get("stage", "")),
        run_id=str(last.get("run_id", "")),
        config_hash=str(last.get("config_hash", "")),
        config=config,
        metrics=read_metrics(file) if file.is_file() else {},
        events=read_events(file) if file.is_file() else [],
        began=float(first.get("time", 0.0)),
        ended=float(last.get("time", 0.0)),
        began_at=began_at,
        notes=tuple(notes),
    )


def _beginning(line: Mapping[str, Any]) -> float | None:
    """Of the step, where its line says so; else it ended when its files were written and the line behind them."""
    if "timing_s/step" not in line:
        return None
    if "timing_s/began_unix" in line:
        began = float(line["timing_s/began_unix"])
    else:
        ended, took = line.get("time", math.nan), float(line["timing_s/step"])
        began = ended - took - float(line.get("timing_s/record", 0.0))
    return began if _is_time(began) else None


def _is_time(value: float | None) -> TypeGuard[float]:
    """Not NaN, which a metric may be, and not beyond what can be drawn."""
    return value is not None and abs(value) < LATEST


def _config(file: Path) -> tuple[dict[str, Any], list[str]]:
    if not file.is_file():
        return {}, []
    try:
        # YAML has dates and sets, and names that are no text; the page is JSON
        config = json.loads(json.dumps(yaml.safe_load(file.read_text("utf-8")), default=str, skipkeys=True))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        return {}, [f"{file} cannot be read: {error}"]
    if not isinstance(config, dict):
        return {}, [f"{file} holds no config"]
    odd = [name for name in ("model", "run") if not isinstance(config.get(name, {}), dict)]
    return {k: v for k, v in config.items() if k not in odd}, [f"{file}: {name} is no section" for name in odd]


def page_data(run: Run) -> dict[str, Any]:
    """The run as the page's script wants it. Series nobody draws stay out, so that long runs stay small."""
    series = {}
    for name in run.names:
        if not any(part in name for part in _UNREAD):
            points = run.series(name)
            series[name] = [[step for step, _ in points], [_rounded(value) for _, value in points]]
    return {
        "name": run.name,
        "stage": run.stage,
        "path": str(run.path),
        "run_id": run.run_id,
        "config_hash": run.config_hash,
        "description": str(run.config.get("description", "")),
        "began": run.began,
        "ended": run.ended,
        "steps": max(run.metrics, default=0),
        "planned": _planned(run),
        "series": series,
        "events": [{"step": e["step"], "kind": e["event"], "message": e["message"]} for e in run.events],
        "config": _flat(run.config),
    }


def _planned(run: Run) -> int | None:
    """Steps that the recipe asks for; None where the data decides."""
    steps = run.config.get("run", {}).get("steps") if run.stage in {"rl", "sft"} else None
    return steps if isinstance(steps, int) and steps > 0 else None


def _rounded(value: float) -> float:
    """Seven digits are more than a pixel."""
    return float(f"{value:.7g}")


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


# accuracy ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Accuracy:
    """One validated (run, step, source): mean over problems with its interval, and the verdicts behind it."""

    run: str
    step: int
    source: str
    metric: str  # "mean@16"
    mean: float
    low: float | None
    high: float | None
    verdicts: dict[str, list[float]]  # row_id -> one verdict per sample; empty where the rows are not on disk
    best: float | None = None  # pass@n and maj@n, where n > 1
    majority: float | None = None


def accuracies(run: Run) -> list[Accuracy]:
    """The first and the last validation of a run, per source."""
    out = []
    for name in run.names:
        if found := _MEAN_ACCURACY.fullmatch(name):
            core, source, n = found.groups()
            points = run.series(name)
            for step, mean in dict.fromkeys([points[0], points[-1]]):
                values = run.metrics[step]
                low, high = values.get(f"{name}/ci_low"), values.get(f"{name}/ci_high")
                verdicts = _verdicts(run.path, step, source)
                best, majority = (values.get(f"{core}/{kind}@{n}/mean") for kind in ("best", "maj"))
                out.append(Accuracy(run.name, step, source, f"mean@{n}", mean, low, high, verdicts, best, majority))
    return out


def comparison(all_accuracies: Sequence[Accuracy]) -> list[dict[str, Any]]:
    """Rows for the accuracy table: each against the first one of its source on the same problems (`paired_test`)."""
    rows = []
    for a in all_accuracies:
        base = next((b for b in all_accuracies if b.source == a.source and b.metric == a.metric), a)
        rows.append(
            {
                "run": a.run,
                "step": a.step,
                "source": a.source,
                "metric": a.metric,
                "mean": a.mean,
                "low": a.low,
                "high": a.high,
                "best": None if a.metric == "mean@1" else a.best,
                "majority": None if a.metric == "mean@1" else a.majority,
                "problems": len(a.verdicts) or None,
                "versus": None if base is a else _difference(base, a),
            }
        )
    return rows


def _difference(base: Accuracy, other: Accuracy) -> dict[str, Any] | None:
    shared = sorted(set(base.verdicts) & set(other.verdicts))
    if not shared:
        return None
    means = ([sum(a.verdicts[r]) / len(a.verdicts[r]) for r in shared] for a in (base, other))
    paired = paired_test(*means)
    return {
        "run": base.run,
        "step": base.step,
        "mean": paired.mean,
        "low": paired.low,
        "high": paired.high,
        "p": paired.p_value,
        "problems": paired.problems,
    }


def _verdicts(path: Path, step: int, source: str) -> dict[str, list[float]]:
    folder = path / "val_rollout_data"
    out: dict[str, list[float]] = {}
    if folder.is_dir():
        for _, file in rollout_files(folder, step_min=step, step_max=step):
            for row in sound_rows(file, on_bad_row=lambda _: None):  # the table says which lines are no rows
                if row.get("acc") is not None and row.get("data_source") == source:
                    out.setdefault(str(row.get("row_id")), []).append(float(row["acc"]))
    return out
