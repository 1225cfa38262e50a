"""An evaluation as a person reads it: tables for the terminal, the step curve as CSV. Its numbers: `aster.eval`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from aster import metrics
from aster.config import Recipe
from aster.data.evaluations import Scores, compare
from aster.rescore import Rescored
from aster.types import TrajectoryGroup


@dataclass(frozen=True)
class EvalResult:
    """One evaluated setting: its recipe, its groups in the order of the data, and its `metrics.validation_metrics`."""

    recipe: Recipe
    groups: tuple[TrajectoryGroup, ...]
    values: dict[str, float]


def scores_of(groups: Sequence[TrajectoryGroup]) -> Scores:
    scores: Scores = {}
    for group in groups:
        if group.scored:
            verdicts = [float(metrics.is_right(t)) for t in group.scored]
            scores.setdefault(group.row.data_source, {})[group.row.row_id] = verdicts
    return scores


def summary_table(results: Sequence[EvalResult]) -> Table:
    """avg@n with its 95 % interval, per setting and data source."""
    table = Table(title="evaluation")
    for column in (
        "run",
        "data",
        "problems x samples",
        "T / top_p",
        "accuracy",
        "95 % interval",
        "calls per trajectory",
    ):
        table.add_column(column)
    for result in results:
        sampling = result.recipe.eval_sampling()
        for source in dict.fromkeys(g.row.data_source for g in result.groups):
            mine = [g for g in result.groups if g.row.data_source == source]
            calls = [len(t.calls) for g in mine for t in g.scored]
            n, core = _samples(result), f"val-core/{source}/acc"
            if f"{core}/mean@{n}" not in result.values:  # our failures lost every sample
                table.add_row(result.recipe.run.name, source, f"{len(mine)} x {n}", "", "lost", "", "")
                continue
            table.add_row(
                result.recipe.run.name,
                source,
                f"{len(mine)} x {n}",
                f"{sampling.temperature:g} / {sampling.top_p:g}",
                f"{result.values[f'{core}/mean@{n}']:.3f}",
                f"{result.values[f'{core}/mean@{n}/ci_low']:.3f} to {result.values[f'{core}/mean@{n}/ci_high']:.3f}",
                f"{sum(calls) / max(len(calls), 1):.2f}",
            )
    return table


def comparison_table(a: Scores, b: Scores, *, names: tuple[str, str]) -> Table:
    """The paired difference per data source, and what it rests on."""
    table = Table(title=f"{names[1]} minus {names[0]}, on the same problems")
    for column in ("data", "problems", "difference", "95 % interval", "p (sign flips)"):
        table.add_column(column)
    for source, d in compare(a, b).items():
        table.add_row(source, str(d.problems), f"{d.mean:+.3f}", f"{d.low:+.3f} to {d.high:+.3f}", f"{d.p_value:.4f}")
    return table


def curve_of(results: dict[int, EvalResult]) -> str:
    """CSV by step and data source; p: paired against the first step."""
    lines = ["step,data_source,mean,ci_low,ci_high,problems,samples,difference_to_first,p"]
    first = scores_of(next(iter(results.values())).groups)
    for step, result in results.items():
        n, mine = _samples(result), scores_of(result.groups)
        for source, difference in compare(first, mine).items():
            core = f"val-core/{source}/acc/mean@{n}"
            numbers = [result.values[key] for key in (core, f"{core}/ci_low", f"{core}/ci_high")]
            tail = [difference.problems, n, f"{difference.mean:.6g}", f"{difference.p_value:.6g}"]
            lines.append(",".join([str(step), source, *(f"{x:.6g}" for x in numbers), *map(str, tail)]))
    return "\n".join(lines) + "\n"


def _samples(result: EvalResult) -> int:
    """Asked of each problem; fewer than the recipe's where sampling stopped early."""
    return max(len(g.trajectories) for g in result.groups)


def print_rescored(result: Rescored, console: Console) -> None:
    table = Table(title="math-verify on the last 500 characters")
    for column in ("data", "step", "rows", "accuracy"):
        table.add_column(column)
    for source, by_step in result.table.scores.items():
        for step, value in sorted(by_step.items()):
            table.add_row(source, str(step), str(result.table.rows[source][step]), f"{value:.4f}")
    console.print(table)
    for reason, count in sorted(result.table.skipped.items()):
        console.print(f"left out, {reason}: {count}")
    console.print(
        f"{len(result.changed)} verdicts differ from the stored ones, {len(result.failures)} could not be given: "
        "report/rescore.json lists them"
    )
