"""`aster quickstart`: the whole paper in miniature on this machine, with every real part.

    prepare -> SFT (base, cold start) -> eval -> GRPO stage 1 -> filter -> GRPO stage 2 -> merge -> eval -> report

One local Ray cluster and one sandbox service live through all of it; each stage is the verb of the same name with a
`cpu_*` recipe. Ends in a table, the claims that the run was to show (each kept or broken), and the path of report.html.
Exit status 3 when a claim is broken, which chance can do; 1, as for every verb, when the run itself failed.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from aster import eval as evaluation
from aster import filter as filtering
from aster import launch, merge, prepare, report, sft, train
from aster.algo.intervals import paired_test
from aster.command import print_resolved, run_verb
from aster.config import Recipe
from aster.data.prompts import read_prompts
from aster.data.rollouts import read_rows, rollout_files
from aster.errors import ConfigError
from aster.eval import EvalResult
from aster.metrics import is_right
from aster.types import TrajectoryGroup

MARKER = ".quickstart"
BROKEN_CLAIM = 3
"""Exit status. `make quickstart` looks for what the machine lacks after every other failure."""


@dataclass(frozen=True)
class Plan:
    """Where everything lives and the recipe of each stage. Paths are relative to the working directory."""

    root: Path
    seed: int
    overrides: tuple[str, ...] = ()

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def filtered(self) -> Path:
        return self.data / "filtered.parquet"

    def recipe(self, recipe: str, name: str, *more: str) -> Recipe:
        stage = [f"run.dir={self.root}", f"run.name={name}", f"run.seed={self.seed}", f"data.shuffle_seed={self.seed}"]
        return Recipe.load(recipe, [*stage, *more, *self.overrides])

    def base(self) -> Recipe:
        return self.recipe(
            "cpu_base", "base", f"model.path={self.data / 'model'}", f"data.train_files=[{self.data / 'base.parquet'}]"
        )

    def sft(self) -> Recipe:
        return self.recipe(
            "cpu_sft", "sft", f"model.path={self.models / 'base'}", f"data.train_files=[{self.data / 'sft.parquet'}]"
        )

    def stage1(self) -> Recipe:
        model = f"model.path={self.models / 'sft'}"
        return self.recipe("cpu_rl_stage1", "rl_stage1", model, *self._prompts(self.data / "train.parquet"))

    def stage2(self) -> Recipe:
        return self.recipe(
            "cpu_rl_stage2", "rl_stage2", f"model.path={self.models / 'stage1'}", *self._prompts(self.filtered)
        )

    def evals(self, model: str) -> list[Recipe]:
        """T = 1 as trained on all held-out problems; on half of them T = 0.6, as the paper reports, and no tool."""
        common = [f"model.path={self.models / model}", f"data.val_files=[{self.data / 'heldout.parquet'}]"]
        half = ["data.val_max_rows=256"]
        return [
            self.recipe("cpu_eval", f"eval_{model}_{name}", *common, *more)
            for name, more in (
                ("T1", ["eval.preset=repro"]),
                ("T06", ["eval.preset=paper", *half]),
                ("notool", ["eval.preset=repro", "tool.enabled=false", *half]),
            )
        ]

    def _prompts(self, train_file: Path) -> list[str]:
        return [f"data.train_files=[{train_file}]", f"data.val_files=[{self.data / 'heldout.parquet'}]"]


@dataclass(frozen=True)
class Claim:
    """One thing the run was to show, and whether it did."""

    text: str
    holds: bool


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="aster quickstart", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of task, initialisation, prompts and sampling (%(default)s)"
    )
    parser.add_argument("--dir", default=None, help="where everything is written (runs/quickstart-SEED)")
    parser.add_argument("--dry-run", action="store_true", help="print the stages with their resolved recipes and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="applied to every stage")
    args = parser.parse_intermixed_args(argv)
    plan = Plan(Path(args.dir or f"runs/quickstart-{args.seed}"), args.seed, tuple(args.overrides))
    if args.dry_run:
        for recipe in (plan.base(), plan.sft(), plan.stage1(), plan.stage2(), *plan.evals("stage2")):
            print(f"# ---- {recipe.run.name}")
            print_resolved(recipe)
        return 0
    claims = run(plan, Console(soft_wrap=True))
    return 0 if all(c.holds for c in claims) else BROKEN_CLAIM


def run(plan: Plan, console: Console) -> list[Claim]:
    """All stages in order. Returns the claims; everything else is on disk under `plan.root`."""
    _clear(plan.root)
    stage = Stages(console, total=9)
    began = time.monotonic()
    first = plan.base()
    with launch.cluster(first), launch.sandboxes(first) as sandboxes:
        if sandboxes is None:
            raise ConfigError("the quickstart is about the tool: leave tool.enabled=true")
        with stage("prepare", "task, tokenizer, model, cold-start conversations (their cells really run)") as done:
            done(asyncio.run(prepare.quickstart(plan.data, seed=plan.seed, sandboxes=sandboxes)))
        with stage("base", "copying and one-step arithmetic, from random weights") as done:
            done(_fit(plan.base(), plan.models / "base"))
        with stage("SFT", "cold start: dense tool use and head work, all of it correct") as done:
            done(_fit(plan.sft(), plan.models / "sft"))
        with stage("eval", "the cold-started model on held-out problems") as done:
            before = asyncio.run(evaluation.run(plan.evals("sft"), sandboxes))
            done(_accuracies(before))
        with stage("stage 1", "GRPO, outcome reward only") as done:
            asyncio.run(train.run(plan.stage1(), sandboxes))
            done(_merge(plan.stage1(), plan.models / "stage1"))
        with stage("filter", "drop the prompts that stage 1 always answers") as done:
            kept, rows = _filter(plan)
            done(f"{kept} of {rows} prompts kept")
        with stage("stage 2", "GRPO on what is left, longer budget") as done:
            asyncio.run(train.run(plan.stage2(), sandboxes))
            done(_merge(plan.stage2(), plan.models / "stage2"))
        with stage("eval", "the trained model on the same problems") as done:
            after = asyncio.run(evaluation.run(plan.evals("stage2"), sandboxes))
            done(_accuracies(after))
    with stage("report", "one offline page") as done:
        page = plan.root / "report.html"
        report.write_report(report.find_runs([plan.root]), page)
        done(str(page))
    console.print(_summary(before, after))
    claims = _claims(plan, before, after, kept=kept, rows=rows)
    for claim in claims:
        console.print(f"  [{'green' if claim.holds else 'bold red'}]{'✓' if claim.holds else '✗'}[/] {claim.text}")
    console.print(f"\n{time.monotonic() - began:.0f} s. Open [bold]{page}[/] in a browser; it needs no network.")
    return claims


class Stages:
    """`[3/9] SFT ...`, then what came of it and how long it took."""

    def __init__(self, console: Console, *, total: int) -> None:
        self.console = console
        self.total = total
        self.number = 0

    @contextmanager
    def __call__(self, name: str, about: str) -> Iterator[Callable[[str], None]]:
        self.number += 1
        self.console.print(f"[bold cyan]\\[{self.number}/{self.total}] {name}[/] [dim]{about}[/]")
        began = time.monotonic()

        def done(text: str) -> None:
            self.console.print(f"      {text} [dim]({time.monotonic() - began:.0f} s)[/]")

        yield done


def _clear(root: Path) -> None:
    """Begin with an empty directory. Only one that an earlier quickstart made is ever removed."""
    if root.exists() and any(root.iterdir()):
        if not (root / MARKER).is_file():
            raise ConfigError(f"{root} is not empty and no earlier quickstart made it: name another with --dir")
        shutil.rmtree(root)
    root.mkdir(parents=True, exist_ok=True)
    (root / MARKER).touch()


def _fit(recipe: Recipe, target: Path) -> str:
    asyncio.run(sft.run(recipe))
    return _merge(recipe, target)


def _merge(recipe: Recipe, target: Path) -> str:
    merge.merge(recipe.run.path, target, dtype="float32")
    return str(target)


def _accuracies(results: Sequence[EvalResult]) -> str:
    return " · ".join(f"{r.recipe.run.name.rsplit('_', 1)[1]} {_mean(r):.3f}" for r in results)


def _summary(before: Sequence[EvalResult], after: Sequence[EvalResult]) -> Table:
    table = Table(title="held-out problems, one sample each", box=box.SIMPLE, pad_edge=False)
    for column in ("(problems)", "after SFT", "after RL", "difference [95 %]", "calls"):
        table.add_column(column, no_wrap=True)
    for name, a, b in zip(("T = 1", "T = 0.6", "no tool"), before, after, strict=True):
        diff = paired_test(_scores(a.groups), _scores(b.groups))
        table.add_row(
            f"{name} ({len(a.groups)})",
            f"{_mean(a):.3f}",
            f"{_mean(b):.3f}",
            f"{diff.mean:+.3f} \\[{diff.low:+.3f}, {diff.high:+.3f}]",
            f"{_calls(a.groups):.2f} -> {_calls(b.groups):.2f}",
        )
    return table


def _claims(
    plan: Plan, before: Sequence[EvalResult], after: Sequence[EvalResult], *, kept: int, rows: int
) -> list[Claim]:
    (sft_T1, _, _), (rl_T1, _, rl_notool) = before, after
    rise = paired_test(_scores(sft_T1.groups), _scores(rl_T1.groups))
    stage1 = _validation(plan.stage2(), step=0)  # stage 1's model, as stage 2 found it
    stage2 = {g.row.row_id: scores for g, scores in zip(rl_T1.groups, _scores(rl_T1.groups), strict=True)}
    two_minus_one = paired_test(*_aligned(stage1, stage2))
    problems, start, alone = len(sft_T1.groups), _mean(sft_T1), _mean(rl_notool)
    calls = _calls(sft_T1.groups), _calls(rl_T1.groups)
    return [
        Claim(f"{problems} distinct held-out problems (at least 512)", problems >= 512),
        Claim(f"the cold start leaves room: {start:.3f} at T = 1 is within 0.20 and 0.70", 0.2 <= start <= 0.7),
        Claim(f"RL adds {rise.mean:+.3f}: at least +0.20, 95 % interval above 0", rise.mean >= 0.2 and rise.low > 0),
        Claim(f"without the tool accuracy falls to {alone:.3f}: below half", alone < _mean(rl_T1) / 2),
        Claim(f"no interaction collapse: {calls[0]:.2f} -> {calls[1]:.2f} calls a trajectory", calls[1] >= calls[0]),
        Claim(f"the filter drops {rows - kept} of {rows} prompts", 0 < kept < rows),
        Claim(
            f"stage 2 is not worse than stage 1: {two_minus_one.mean:+.3f} "
            f"({two_minus_one.low:+.3f} to {two_minus_one.high:+.3f})",
            two_minus_one.high >= 0,
        ),
    ]


def _scores(groups: Sequence[TrajectoryGroup]) -> list[float]:
    """The share of right samples per problem, as `aster eval` judges; one that lost all its samples counts as wrong."""
    return [_share([float(is_right(t)) for t in g.scored]) for g in groups]


def _share(verdicts: Sequence[float]) -> float:
    return sum(verdicts) / len(verdicts) if verdicts else 0.0


def _mean(result: EvalResult) -> float:
    return _share(_scores(result.groups))


def _calls(groups: Sequence[TrajectoryGroup]) -> float:
    counts = [len(t.calls) for g in groups for t in g.scored]
    return sum(counts) / max(len(counts), 1)


def _validation(recipe: Recipe, *, step: int) -> dict[str, float]:
    """Scores by row of one validation of a training run."""
    scores: dict[str, list[float]] = {}
    for row in read_rows(recipe.run.path / "val_rollout_data" / f"{step}.jsonl"):
        scores.setdefault(row["row_id"], []).extend([] if row["acc"] is None else [float(row["acc"])])
    return {row_id: _share(judged) for row_id, judged in scores.items()}


def _aligned(a: dict[str, float], b: dict[str, float]) -> tuple[list[float], list[float]]:
    rows = sorted(a.keys() & b.keys())
    return [a[r] for r in rows], [b[r] for r in rows]


def _filter(plan: Plan) -> tuple[int, int]:
    """Rows kept and rows there were."""
    train = plan.data / "train.parquet"
    files = [path for _, path in rollout_files(plan.stage1().run.path / "rollout_data")]
    seen = filtering.accuracies(read_prompts([train]), files)
    bounds = filtering.Bounds()
    filtering.write_filtered(train, plan.filtered, seen, bounds=bounds)
    filtering.plot_distribution(seen, plan.root / "filter.png", bounds=bounds)
    counts = seen.counts(bounds)
    return counts["kept"], counts["rows"]


if __name__ == "__main__":
    sys.exit(run_verb("quickstart"))
