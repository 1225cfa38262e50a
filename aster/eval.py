"""`aster eval`: sample a benchmark with the tool, score it with both verifiers, put an interval on the score.

    aster eval --recipe eval_90k model.path=models/rl data.val_files=[data/aime25.parquet] eval.preset=paper

Writes `val_rollout_data/0.jsonl`, metrics and `eval.json` under the run directory. Needs neither optimizer nor learner.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from aster import launch, metrics
from aster.command import parse_recipe, print_resolved, run_verb
from aster.config import Recipe
from aster.data.prompts import read_prompts
from aster.data.rollouts import write_validation
from aster.driver import Inbox, evaluate
from aster.errors import ConfigError
from aster.roles import SandboxFactory
from aster.tracking import Tracker
from aster.types import TrajectoryGroup


@dataclass(frozen=True)
class EvalResult:
    """One evaluated setting: its recipe, its groups in the order of the data, and the metrics of spec 3.4."""

    recipe: Recipe
    groups: tuple[TrajectoryGroup, ...]
    values: dict[str, float]


def main(argv: Sequence[str] | None = None) -> int:
    recipe, args = parse_recipe("eval", argv, stage="eval", about=__doc__ or "", default="eval_90k")
    if args.dry_run:
        print_resolved(recipe)
        return 0
    launch.require_model(recipe)
    with launch.cluster(recipe), launch.sandboxes(recipe) as sandboxes:
        (result,) = asyncio.run(run([recipe], sandboxes))
    Console().print(summary_table([result]))
    return 0


async def run(recipes: Sequence[Recipe], sandboxes: SandboxFactory | None) -> list[EvalResult]:
    """Evaluate one model under one or several settings (sampling, tool on or off), on engines that start once.

    All recipes must agree on `model`, `rollout` and `budget`: these shape the engine.
    """
    first = recipes[0]
    for other in recipes[1:]:
        if (other.model, other.rollout, other.max_model_len) != (first.model, first.rollout, first.max_model_len):
            raise ConfigError("settings evaluated together must agree on model, rollout and budget")
    if not all(recipe.data.val_files for recipe in recipes):
        raise ConfigError(
            "data.val_files is empty: name at least one parquet, e.g. data.val_files=[data/aime25.parquet]"
        )
    rows_of = [read_prompts(recipe.data.val_files, max_rows=recipe.data.val_max_rows) for recipe in recipes]
    results = []
    async with launch.rollouts(first, sandboxes=sandboxes) as rollouts:
        inbox = Inbox(rollouts.pool.groups())
        for recipe, rows in zip(recipes, rows_of, strict=True):
            with Tracker.open(recipe, total_steps=1) as tracker:
                began = time.monotonic()
                groups = await evaluate(recipe, rollouts.pool, inbox, rows, step=0)
                values = metrics.validation_metrics(groups, n=recipe.eval.samples, decode=rollouts.renderer.decode)
                values["timing_s/testing"] = time.monotonic() - began
                tracker.log(0, values)
            path = recipe.run.path
            write_validation(path / "val_rollout_data", groups, step=0, decode=rollouts.renderer.decode)
            (path / "eval.json").write_text(
                json.dumps({"config_hash": recipe.config_hash, **values}, indent=1), "utf-8"
            )
            results.append(EvalResult(recipe, tuple(groups), values))
    return results


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
        n = result.recipe.eval.samples
        sampling = result.recipe.eval_sampling()
        for source in dict.fromkeys(g.row.data_source for g in result.groups):
            mine = [g for g in result.groups if g.row.data_source == source]
            calls = [len(t.calls) for g in mine for t in g.scored]
            core = f"val-core/{source}/acc"
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


if __name__ == "__main__":
    sys.exit(run_verb("eval"))
