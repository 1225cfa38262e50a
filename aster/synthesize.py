"""`aster synthesize`: cold-start conversations from a teacher's trajectories: correct ones, dense in tool calls.

A teacher behind an OpenAI-compatible chat endpoint is sampled here, in our agent loop and sandbox:

    aster synthesize --endpoint http://host:8000/v1 --teacher gpt-oss-20b --samples 4 --from runs/teacher \\
        --dataset problems.parquet --model STUDENT --out data/cold --decontaminate aime25.parquet hmmt25.parquet

One that vLLM runs in this cluster is sampled by `aster eval`, which writes the same trajectories:

    aster eval --recipe eval_90k model.path=TEACHER 'data.val_files=[problems.parquet]' run.name=teacher eval.samples=4
    aster synthesize --from runs/teacher --dataset problems.parquet --model TEACHER --out data/cold

Both go on where they were when they are killed. Kept is what was answered correctly with more than nine calls, all of
which succeeded, in at most 32,768 tokens. `--min-calls 2 --max-calls 4 --limit 1000` selects a subset of existing
trajectories by interaction density instead. The endpoint's key is read from OPENAI_API_KEY.

Writes sft.parquet (OpenAI's form), dropped.jsonl (every trajectory that was left out, and why) and report.json. The
same input always gives the same files.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from aster import launch
from aster.agent.chat import ChatRenderer
from aster.agent.demonstrations import Selection, Wanted, select
from aster.agent.rewards import RewardPool
from aster.agent.sampling import sample
from aster.agent.teacher import ChatTeacher
from aster.command import require_writable, run_verb
from aster.config import Recipe
from aster.data.conversations import write_conversations
from aster.data.evaluations import files_hash
from aster.data.prompts import read_prompts
from aster.data.raw import Overlap
from aster.data.trajectories import read_trajectories
from aster.errors import ConfigError, DataError
from aster.roles import SandboxFactory
from aster.types import PromptRow, Trajectory


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_intermixed_args(argv)
    wanted = _wanted(args)
    recipe = _teaching(args)
    require_writable("--out", args.out, directory=True)
    rows = {row.row_id: row for row in read_prompts(args.dataset)}
    renderer = ChatRenderer.from_model_dir(args.model)
    if args.dry_run:
        print(f"{len(rows)} problems; {args.samples if args.endpoint else 0} samples of each would be made")
        return 0
    if args.endpoint:
        with launch.cluster(recipe), launch.sandboxes(recipe) as sandboxes:
            if sandboxes is None:
                raise ConfigError("tool.enabled=false leaves no sandbox for the teacher's calls: leave it true")
            asyncio.run(teach(args, recipe, list(rows.values()), renderer, sandboxes))
    files = [file for run in args.runs for file in trajectory_files(run)]
    found = select(
        _all(files),
        rows,
        renderer,
        wanted=wanted,
        contaminated_by=Overlap(read_prompts(args.decontaminate)) if args.decontaminate else lambda _: "",
        per_problem=args.per_problem,
        limit=args.limit,
        seed=args.seed,
    )
    write(args.out, found)
    print(text_of(found))
    if not found.kept:
        raise DataError(f"none of the {len(found.calls_before)} trajectories was kept{_why_none(found, args)}")
    print(args.out / "sft.parquet")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="aster synthesize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--from", dest="runs", nargs="+", type=Path, required=True, metavar="RUN", help="run directories"
    )
    parser.add_argument("--dataset", nargs="+", required=True, metavar="PARQUET", help="the problems that were sampled")
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="the model that sampled, or with --endpoint the student"
    )
    parser.add_argument("--out", type=Path, required=True, help="the directory to write")
    parser.add_argument("--min-calls", type=int, default=Wanted.min_calls, help="fewest calls (%(default)s)")
    parser.add_argument("--max-calls", type=int, help="most calls (any number)")
    parser.add_argument("--max-tokens", type=int, default=Wanted.max_tokens, help="prompt and response (%(default)s)")
    parser.add_argument("--per-problem", type=int, help="keep at most so many of one problem (all)")
    parser.add_argument("--limit", type=int, help="draw so many of what is kept (all)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw, and of the teacher's samples (%(default)s)")
    parser.add_argument(
        "--decontaminate", nargs="+", default=[], metavar="PARQUET", help="evaluation sets to keep apart"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, sample and write nothing")
    teacher = parser.add_argument_group("a teacher behind an endpoint")
    teacher.add_argument("--endpoint", metavar="URL", help="its API, e.g. http://host:8000/v1")
    teacher.add_argument("--teacher", metavar="NAME", help="its model name there")
    teacher.add_argument("--samples", type=int, default=1, help="trajectories of each problem (%(default)s)")
    teacher.add_argument("--concurrency", type=int, default=64, help="trajectories at once (%(default)s)")
    teacher.add_argument("--recipe", default="rl_stage2_32k", help="whose budget, tool and sandbox count (%(default)s)")
    teacher.add_argument(
        "overrides", nargs="*", metavar="key=value", help="of that recipe, e.g. sampling.temperature=0.6"
    )
    return parser


def _teaching(args: argparse.Namespace) -> Recipe:
    if bool(args.endpoint) != bool(args.teacher):
        raise ConfigError("--endpoint and --teacher go together: the API's URL and the model's name there")
    if args.endpoint and len(args.runs) != 1:
        raise ConfigError(f"--endpoint writes its trajectories into one run, --from names {len(args.runs)}")
    if args.overrides and not args.endpoint:
        raise ConfigError(f"{args.overrides[0]}: a recipe's values count with --endpoint only")
    for name in ("samples", "concurrency"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} {getattr(args, name)} must be at least 1")
    return Recipe.load(args.recipe, args.overrides)


def begin(args: argparse.Namespace, recipe: Recipe, rows: Sequence[PromptRow]) -> None:
    """RUN/teacher.json: what RUN is made with. ConfigError when it was begun with another student, other problems or
    settings."""
    run: Path = args.runs[0]
    problems = json.dumps([(row.row_id, row.messages, row.ground_truth) for row in rows], sort_keys=True)
    tokens = [Path(args.model, name) for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")]
    settings = {
        "teacher": args.teacher,
        "student": files_hash(file for file in tokens if file.is_file())[:16],
        "samples": args.samples,
        "seed": args.seed,
        "problems": hashlib.sha256(problems.encode()).hexdigest()[:16],
        "budget": recipe.budget.model_dump(mode="json"),
        "sampling": recipe.sampling.model_dump(mode="json"),
        "tool": recipe.tool.model_dump(mode="json"),
        "reward": recipe.algo.reward,
    }
    about = run / "teacher.json"
    if about.is_file():
        old = json.loads(about.read_text("utf-8"))
        if changed := [key for key in settings if old.get(key) != settings[key]]:
            raise ConfigError(
                f"{run} was begun with another {changed[0]}: {old.get(changed[0])}, now {settings[changed[0]]}; "
                "name another run with --from"
            )
    else:
        run.mkdir(parents=True, exist_ok=True)
        about.write_text(json.dumps(settings, indent=1) + "\n", "utf-8")


async def teach(
    args: argparse.Namespace,
    recipe: Recipe,
    rows: Sequence[PromptRow],
    renderer: ChatRenderer,
    sandboxes: SandboxFactory,
) -> None:
    """Sample the teacher into RUN/trajectories, or what of it is missing."""
    begin(args, recipe, rows)
    console = Console(stderr=True, highlight=False)
    rewards = RewardPool(reward=recipe.algo.reward)
    teacher = ChatTeacher(
        args.endpoint, model=args.teacher, renderer=renderer, api_key=os.environ.get("OPENAI_API_KEY")
    )
    try:
        await sample(
            rows,
            engine=teacher.conversation,
            sandboxes=sandboxes,
            renderer=renderer,
            rewards=rewards,
            budget=recipe.train_budget(),
            sampling=recipe.sampling.sampling(),
            tool=recipe.tool,
            folder=args.runs[0] / "trajectories",
            samples=args.samples,
            concurrency=args.concurrency,
            seed=args.seed,
            progress=lambda done, of: console.print(f"teacher {done}/{of} files"),
        )
    finally:
        await teacher.close()
        rewards.close()


def _wanted(args: argparse.Namespace) -> Wanted:
    for name in ("min_calls", "max_calls", "max_tokens", "per_problem", "limit"):
        value = getattr(args, name)
        least = 0 if name in ("min_calls", "max_calls") else 1
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least {least}")
    if args.max_calls is not None and args.max_calls < args.min_calls:
        raise ConfigError(f"--max-calls {args.max_calls} is below --min-calls {args.min_calls}: nothing would be kept")
    return Wanted(args.min_calls, args.max_calls, args.max_tokens)


def trajectory_files(run: Path) -> list[Path]:
    """`run`/trajectories/STEP.parquet in order of their steps."""
    folder = run / "trajectories"
    found = sorted((p for p in folder.glob("*.parquet") if p.stem.isdigit()), key=lambda p: int(p.stem))
    if not found:
        inside = run.name == "trajectories" and any(run.glob("*.parquet"))
        cure = f"name {run.parent}" if inside else "name the directory of a run of `aster eval` or `aster train`"
        raise DataError(f"{folder} holds no STEP.parquet: {cure}")
    return found


def _why_none(found: Selection, args: argparse.Namespace) -> str:
    """The commonest reason, with the cure where it is likely to be a wrong option."""
    reasons = found.report()["dropped"]
    if not reasons:
        return f": there is none in {', '.join(map(str, args.runs))}"
    commonest = max(reasons, key=lambda reason: reasons[reason])
    those = f"; are these problems ({', '.join(args.dataset)}) those that were sampled?"
    cure = {
        "of no problem in the dataset": those,
        "another prompt": those,
        "cannot be written as a conversation": f"; is {args.model} the model that sampled?",
        "too few calls": f"; --min-calls is {args.min_calls}",
    }.get(commonest, "")
    return f": {reasons[commonest]} {commonest}{cure}; see {args.out / 'dropped.jsonl'}"


def _all(files: Sequence[Path]) -> Iterator[Trajectory]:
    for file in files:
        yield from read_trajectories(file)


def write(out: Path, found: Selection) -> None:
    out.mkdir(parents=True, exist_ok=True)
    listed = "".join(json.dumps(drop, ensure_ascii=False) + "\n" for drop in found.dropped)
    (out / "dropped.jsonl").write_text(listed, "utf-8")
    (out / "report.json").write_text(json.dumps(found.report(), indent=1) + "\n", "utf-8")
    if found.kept:
        write_conversations(out / "sft.parquet", [d.messages for d in found.kept])


def text_of(found: Selection) -> str:
    """The report for a person."""
    report = found.report()
    lines = [f"{'trajectories':36}{report['trajectories']:8,}", f"{'kept':36}{report['kept']:8,}"]
    lines += [f"{'dropped: ' + reason:36}{count:8,}" for reason, count in report["dropped"].items()]
    lines.append(f"{'calls per trajectory':20}{'before':>8}{'after':>8}")
    for name, before in report["calls_before"].items():
        form = ".2f" if name == "mean" else ","
        lines.append(f"{name:20}{before:>8{form}}{report['calls_after'][name]:>8{form}}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_verb("synthesize"))
