"""`aster synthesize`: cold-start conversations from a teacher's trajectories: correct ones, dense in tool calls.

    aster eval --recipe eval_90k model.path=TEACHER data.val_files=[problems.parquet] run.name=teacher eval.samples=4
    aster synthesize --from runs/teacher --dataset problems.parquet --model TEACHER --out data/cold \\
        --decontaminate aime25.parquet hmmt25.parquet
    aster sft --recipe sft model.path=STUDENT data.train_files=[data/cold/sft.parquet]

The teacher is any model that vLLM serves here: `aster eval` samples it in the same agent loop and sandbox, and goes on
where it was when it is killed. Kept is what was answered correctly with more than nine calls, all of which succeeded,
in at most 32,768 tokens. `--min-calls 2 --max-calls 4 --limit 1000` selects a subset by interaction density instead.

Writes sft.parquet (OpenAI's form), dropped.jsonl (every trajectory that was left out, and why) and report.json. The
same input always gives the same files.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from aster.agent.chat import ChatRenderer
from aster.agent.demonstrations import Selection, Wanted, select
from aster.command import run_verb
from aster.data.conversations import write_conversations
from aster.data.prompts import read_prompts
from aster.data.raw import Overlap
from aster.data.trajectories import read_trajectories
from aster.errors import ConfigError, DataError
from aster.types import Trajectory


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    wanted = _wanted(args)
    files = [file for run in args.runs for file in trajectory_files(run)]
    print(f"{len(files)} trajectory files of {len(args.runs)} runs")
    if args.dry_run:
        return 0
    rows = {row.row_id: row for row in read_prompts(args.dataset)}
    found = select(
        _all(files),
        rows,
        ChatRenderer.from_model_dir(args.model),
        wanted=wanted,
        contaminated_by=Overlap(read_prompts(args.decontaminate)) if args.decontaminate else lambda _: "",
        per_problem=args.per_problem,
        limit=args.limit,
        seed=args.seed,
    )
    write(args.out, found)
    print(text_of(found))
    if not found.kept:
        raise DataError(
            f"none of the {len(found.calls_before)} trajectories was kept; see {args.out / 'dropped.jsonl'}"
        )
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
        "--model", required=True, metavar="DIR", help="the teacher: its tokenizer and template are read"
    )
    parser.add_argument("--out", type=Path, required=True, help="the directory to write")
    parser.add_argument("--min-calls", type=int, default=Wanted.min_calls, help="fewest calls (%(default)s)")
    parser.add_argument("--max-calls", type=int, help="most calls (any number)")
    parser.add_argument("--max-tokens", type=int, default=Wanted.max_tokens, help="prompt and response (%(default)s)")
    parser.add_argument("--per-problem", type=int, help="keep at most so many of one problem (all)")
    parser.add_argument("--limit", type=int, help="draw so many of what is kept (all)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (%(default)s)")
    parser.add_argument(
        "--decontaminate", nargs="+", default=[], metavar="PARQUET", help="evaluation sets to keep apart"
    )
    parser.add_argument("--dry-run", action="store_true", help="say which files would be read, then stop")
    return parser


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
        raise DataError(f"{folder} holds no STEP.parquet: name the directory of a run of `aster eval` or `aster train`")
    return found


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
