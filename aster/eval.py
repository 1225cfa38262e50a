"""`aster eval`: sample a benchmark with the tool, score it with both verifiers, put an interval on every score.

    aster eval --recipe eval_90k model.path=models/rl 'data.val_files=[data/aime25.parquet]' eval.preset=paper
    aster eval --checkpoint runs/rl_stage1_18k 'data.val_files=[...]'     every checkpoint of a run: the step curve
    aster eval --against runs/other --until-decided ...                 paired comparison; stop when it is decided
    aster eval --compare runs/a runs/b                                  two evaluations that are there, paired
    aster eval --rescore runs/a                                         judge stored answers again

Writes val_rollout_data/STEP.jsonl, trajectories/STEP.parquet, disagreements/STEP.jsonl (answers that the two verifiers
judge differently), metrics, evaluations/STEP.json with the hashes of weights, data and config (eval.json: the newest),
and curve.csv for several checkpoints. An evaluation that was killed goes on where it was. Needs neither optimizer nor
learner.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from aster import launch, merge, metrics
from aster.agent.chat import ChatRenderer
from aster.checkpoints import checkpoints_of
from aster.command import parse_recipe, print_resolved, run_verb
from aster.config import Recipe
from aster.data.evaluations import (
    Parts,
    Scores,
    compare,
    disagreements,
    files_hash,
    fingerprint,
    finished,
    joined,
    look_at,
    read_scores,
    write_json,
)
from aster.data.prompts import read_prompts
from aster.data.rollouts import write_trajectories_parquet, write_validation
from aster.errors import ConfigError, DataError
from aster.eval_tables import EvalResult, comparison_table, curve_of, print_rescored, scores_of, summary_table
from aster.rescore import rescore
from aster.roles import SandboxFactory
from aster.tracking import Progress, Tracker
from aster.types import PromptRow, TrajectoryGroup
from aster.validation import Inbox, evaluate

__all__ = ["EvalResult", "Rival", "main", "round_sizes", "run"]

ROUNDS = 8  # with --until-decided the samples of a problem are drawn in so many rounds, with a look after each
ALPHA = 0.05  # chance that two equally good models are told apart by --until-decided


@dataclass(frozen=True)
class Rival:
    """A finished evaluation to compare with; `until_decided`: stop sampling when the difference is decided."""

    path: Path
    scores: Scores
    until_decided: bool = False

    def is_decided(self, groups: Sequence[TrajectoryGroup], *, planned: int) -> bool:
        if not self.until_decided:
            return False
        seen = look_at(self.scores, scores_of(groups), planned=planned, alpha=ALPHA)
        return seen is not None and seen.decided


def main(argv: Sequence[str] | None = None) -> int:
    recipe, args = parse_recipe(
        "eval", argv, stage="eval", about=__doc__ or "", default="eval_90k", options=_add_options
    )
    if args.against and (args.compare or args.rescore):
        raise ConfigError(f"--against {args.against} is for an evaluation that samples; compare two with --compare A B")
    if args.until_decided and not args.against:
        raise ConfigError("--until-decided compares with a finished evaluation: name it with --against RUN")
    if args.dry_run:
        print_resolved(recipe)
        return 0
    console = Console()
    if args.rescore:
        print_rescored(rescore(args.rescore), console)
        return 0
    if args.compare:
        a, b = args.compare
        console.print(comparison_table(read_scores(a), read_scores(b), names=(str(a), str(b))))
        return 0
    rival = Rival(args.against, read_scores(args.against), args.until_decided) if args.against else None
    models = checkpoints_of(args.checkpoint) if args.checkpoint else {0: Path(recipe.model.path)}
    _require_problems([recipe])
    if not args.checkpoint:
        launch.require_model(recipe)
    recipe = _naming_a_model(recipe, list(models.values()))
    results: dict[int, EvalResult] = {}
    with launch.cluster(recipe), launch.sandboxes(recipe) as sandboxes:
        for step, path in models.items():
            with _as_model_directory(path, recipe) as model:
                (results[step],) = asyncio.run(
                    run(
                        [recipe],
                        sandboxes,
                        step=step,
                        model=model,
                        weights=files_hash([path]),
                        rival=rival,
                        reuse=len(models) > 1 and recipe.run.resume,
                        goes_on=bool(results),
                    )
                )
    if len(results) > 1:
        curve = curve_of(results)
        (recipe.run.path / "curve.csv").write_text(curve, "utf-8")
        console.print(curve)
    console.print(summary_table(list(results.values())))
    if rival is not None:
        last = scores_of(list(results.values())[-1].groups)
        console.print(comparison_table(rival.scores, last, names=(str(rival.path), recipe.run.name)))
    return 0


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--checkpoint",
        type=Path,
        action="append",
        help="instead of model.path, and as often as needed: a model directory, a global_step_N, or a run with several",
    )
    parser.add_argument("--against", type=Path, metavar="RUN", help="a finished evaluation to compare with, paired")
    parser.add_argument(
        "--until-decided",
        action="store_true",
        help=f"with --against: stop sampling when the difference on these problems is decided (error <= {ALPHA:g})",
    )
    mode.add_argument("--compare", type=Path, nargs=2, metavar="RUN", help="compare two evaluations, sample nothing")
    mode.add_argument("--rescore", type=Path, metavar="DIR", help="judge stored answers again, sample nothing")


async def run(
    recipes: Sequence[Recipe],
    sandboxes: SandboxFactory | None,
    *,
    step: int = 0,
    model: Path | None = None,
    weights: str | None = None,
    rival: Rival | None = None,
    reuse: bool = False,
    goes_on: bool = False,
) -> list[EvalResult]:
    """Evaluate one model under one or several settings (sampling, tool on or off), on engines that start once.

    All recipes must agree on `model`, `rollout` and `budget`: these shape the engine. `step` names the files. `model`
    is sampled in place of `model.path`, which is what the run's config and its hash name all the same; `weights` is its
    hash where that was taken of other files. `reuse`: a step that is finished, of the same weights, data and settings,
    is read and not sampled again. `goes_on`: as in `Tracker.open`.
    """
    first = recipes[0]
    for other in recipes[1:]:
        if (other.model, other.rollout, other.max_model_len) != (first.model, first.rollout, first.max_model_len):
            raise ConfigError("settings evaluated together must agree on model, rollout and budget")
    _require_problems(recipes)
    rows_of = [read_prompts(recipe.data.val_files, max_rows=recipe.data.val_max_rows) for recipe in recipes]
    if rival is not None:
        theirs = {row_id for problems in rival.scores.values() for row_id in problems}
        if not any(row.row_id in theirs for rows in rows_of for row in rows):
            raise DataError(f"--against {rival.path} shares no problem with data.val_files: it is of other data")
    served = first if model is None else _with_model(first, model)
    launch.require_model(served)
    weights = weights or files_hash([served.model.path])
    renderer = ChatRenderer.from_model_dir(served.model.path)
    decode, markers = renderer.decode, renderer.markers
    results = []
    async with contextlib.AsyncExitStack() as stack:
        sampler = _Sampler(served, sandboxes, stack)
        for recipe, rows in zip(recipes, rows_of, strict=True):
            looking = rival is not None and rival.until_decided
            rounds = round_sizes(recipe.eval.samples, looking=looking)
            decided_against = rival.scores if rival is not None and looking else None
            made_of = fingerprint(recipe, weights=weights, rounds=rounds, decided_against=decided_against)
            path = recipe.run.path
            if reuse and (groups := finished(path, rows, step=step, made_of=made_of)):
                n = max(len(g.trajectories) for g in groups)
                values = metrics.validation_metrics(groups, n=n, decode=decode, markers=markers)
                results.append(EvalResult(recipe, tuple(groups), values))
                continue
            parts = Parts(path / "parts" / str(step), rows, made_of=made_of, resume=recipe.run.resume)
            seen = SamplesDone(len(rows) * recipe.eval.samples, stage=recipe.run.name)
            with Tracker.open(recipe, total_steps=None, extra=[seen], goes_on=goes_on) as tracker:
                began = time.monotonic()
                groups = await _sample(recipe, rows, parts, sampler, seen, rounds=rounds, step=step, rival=rival)
                n = max(len(g.trajectories) for g in groups)
                values = metrics.validation_metrics(groups, n=n, decode=decode, markers=markers)
                values["timing_s/testing"] = time.monotonic() - began
                tracker.log(step, values)
            write_validation(path / "val_rollout_data", groups, step=step, decode=decode)
            write_trajectories_parquet(path / "trajectories", groups, step=step)
            _write_result(recipe, groups, values, made_of=made_of, step=step, samples=n, rival=rival)
            parts.remove()
            results.append(EvalResult(recipe, tuple(groups), values))
    return results


class _Sampler:
    """Engines that start when the first sample is needed; a finished evaluation that is only read needs none."""

    def __init__(self, recipe: Recipe, sandboxes: SandboxFactory | None, stack: contextlib.AsyncExitStack) -> None:
        self._recipe, self._sandboxes, self._stack = recipe, sandboxes, stack
        self._running: tuple[launch.Rollouts, Inbox] | None = None

    async def sample(
        self,
        recipe: Recipe,
        rows: Sequence[PromptRow],
        *,
        step: int,
        done: Callable[[TrajectoryGroup], None],
    ) -> dict[str, TrajectoryGroup]:
        """By row id. `done` hears of every problem as soon as it is."""
        if self._running is None:
            rollouts = await self._stack.enter_async_context(launch.rollouts(self._recipe, sandboxes=self._sandboxes))
            self._running = rollouts, Inbox(rollouts.pool.groups())
        rollouts, inbox = self._running
        groups = await evaluate(recipe, rollouts.pool, inbox, rows, step=step, done=done)
        return {g.row.row_id: g for g in groups}


class SamplesDone(Progress):
    """The progress of an evaluation, which may take hours: samples judged and how many of them are right so far.

    The quick ones come first, so the share moves until the end; the line with the interval is the result.
    """

    def __init__(self, total: int, *, stage: str, console: Console | None = None) -> None:
        super().__init__(total, stage=stage, unit="samples", every_s=10.0, console=console)
        self._done = self._judged = self._right = 0

    def add(self, groups: Sequence[TrajectoryGroup]) -> None:
        self._done += sum(len(g.trajectories) for g in groups)
        verdicts = [metrics.is_right(t) for g in groups for t in g.scored]
        self._judged += len(verdicts)
        self._right += sum(verdicts)
        if self._judged and self._done < self._total:
            self.show(self._done, f"right so far {self._right / self._judged:.3f}")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        super().write(self._done, values)

    def event(self, step: int, kind: str, message: str) -> None:
        super().event(self._done, kind, message)


async def _sample(
    recipe: Recipe,
    rows: Sequence[PromptRow],
    parts: Parts,
    sampler: _Sampler,
    seen: SamplesDone,
    *,
    rounds: Sequence[int],
    step: int,
    rival: Rival | None,
) -> list[TrajectoryGroup]:
    """All samples of all rows, those of `parts` first; `rounds` of so many of a problem, with a look after each."""
    sampled: list[dict[str, TrajectoryGroup]] = []
    for round_, size in enumerate(rounds):
        done = parts.read(round_=round_, step=step)
        seen.add(list(done.values()))
        todo = [row for row in rows if row.row_id not in done]
        if todo:
            part = recipe.model_copy(
                update={
                    "eval": recipe.eval.model_copy(update={"samples": size}),
                    "run": recipe.run.model_copy(update={"seed": recipe.run.seed + 1_000_003 * round_}),
                }
            )

            def keep(group: TrajectoryGroup, round_: int = round_) -> None:
                parts.add(group, round_=round_)
                seen.add([group])

            done |= await sampler.sample(part, todo, step=step, done=keep)
        sampled.append(done)
        if rival is not None and rival.is_decided(joined(sampled, rows), planned=sum(rounds)):
            break
    return joined(sampled, rows)


def round_sizes(samples: int, *, looking: bool) -> list[int]:
    """Samples of a problem per round. A look needs two of each, so there are at most samples / 2 rounds.

    >>> round_sizes(16, looking=True), round_sizes(5, looking=True), round_sizes(16, looking=False)
    ([2, 2, 2, 2, 2, 2, 2, 2], [3, 2], [16])
    """
    rounds = max(1, min(ROUNDS, samples // 2)) if looking else 1
    return [samples // rounds + (i < samples % rounds) for i in range(rounds)]


def _require_problems(recipes: Sequence[Recipe]) -> None:
    if not all(recipe.data.val_files for recipe in recipes):
        raise ConfigError(
            "data.val_files is empty: name at least one parquet, e.g. data.val_files=[data/aime25.parquet]"
        )


def _naming_a_model(recipe: Recipe, models: Sequence[Path]) -> Recipe:
    """With the first of `models` where `model.path` is empty: readers of the run look there for its tokenizer. A
    learner's checkpoint has one in huggingface/."""
    if recipe.model.path:
        return recipe
    first = models[0]
    return _with_model(recipe, first if (first / "config.json").is_file() else first / "huggingface")


def _with_model(recipe: Recipe, path: Path) -> Recipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": str(path)})})


@contextlib.contextmanager
def _as_model_directory(path: Path, recipe: Recipe) -> Iterator[Path]:
    """A learner's checkpoint is merged for the body; a model directory is itself."""
    if (path / "config.json").is_file():
        yield path
        return
    recipe.run.path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=recipe.run.path, prefix="merged-") as scratch:
        target = Path(scratch) / "model"
        merge.merge(path, target, dtype=recipe.model.compute_dtype)
        yield target


# what is written -----------------------------------------------------------------------------------------------------


def _write_result(
    recipe: Recipe,
    groups: Sequence[TrajectoryGroup],
    values: dict[str, float],
    *,
    made_of: dict[str, str],
    step: int,
    samples: int,
    rival: Rival | None,
) -> None:
    path = recipe.run.path
    differing = [asdict(d) for d in disagreements(groups)]
    lines = [json.dumps(d, ensure_ascii=False) + "\n" for d in differing]
    (path / "disagreements").mkdir(exist_ok=True)
    (path / "disagreements" / f"{step}.jsonl").write_text("".join(lines), "utf-8")
    sampling = recipe.eval_sampling()
    result: dict[str, object] = {
        "config_hash": recipe.config_hash,
        "hashes": made_of,
        "step": step,
        "samples": samples,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "verdicts_that_differ": len(differing),
        **values,
    }
    if rival is not None:
        mine = scores_of(groups)
        seen = look_at(rival.scores, mine, planned=recipe.eval.samples, alpha=ALPHA)
        result["against"] = {
            "run": str(rival.path),
            "paired": {source: asdict(d) for source, d in compare(rival.scores, mine).items()},
            "these_problems": None if seen is None else asdict(seen),
        }
    write_json(path / "evaluations" / f"{step}.json", result)
    write_json(path / "eval.json", result)


if __name__ == "__main__":
    sys.exit(run_verb("eval"))
