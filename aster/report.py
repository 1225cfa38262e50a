"""`aster report`: one self-contained HTML page for one or several runs; opens from disk, loads nothing.

    aster report runs/stage1
    aster report runs/quickstart-0                    every run inside it, in the order in which they were made
    aster report runs/a runs/b --output compare.html  two runs side by side
    aster report --follow runs/stage1                 while it trains: written again every 30 s, and reloaded by itself

Curves, the collapse monitor, accuracies with paired intervals, one step on the clock, and every trajectory with its
turns and tokens. A run that is half-written is reported as far as it goes.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from aster.algo.importance import GAP_UNIT
from aster.command import run_verb
from aster.errors import ConfigError, DataError
from aster.page.runs import Run, accuracies, comparison, find_runs, load_run, page_data
from aster.page.tokens import NATS_PER_UNIT, texts_for
from aster.page.trajectories import Collector, Source, Trajectories, pack, page_json

SCRIPTS = ("base.js", "overview.js", "charts.js", "curves.js", "step.js", "table.js", "viewer.js", "start.js")
_IDLE_S = 3600.0  # a followed run that writes nothing for so long has ended


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.follow and not args.dry_run:
        return follow(args)
    paths = find_runs(args.runs)
    output = args.output or default_output(args.runs, paths)
    if args.dry_run:
        again = f", again every {args.every:g} s" if args.follow else ""
        print("\n".join([*(f"would read {path}" for path in paths), f"would write {output}{again}"]))
        return 0
    write_report(paths, output, limit=args.max_trajectories, max_chars=args.max_chars, tokenizer=args.tokenizer)
    print(f"{output}  ({output.stat().st_size / 1e6:.1f} MB, {len(paths)} run{'s' * (len(paths) > 1)})")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="aster report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, or folders of them")
    parser.add_argument("--output", type=Path, help="the page (RUN/report.html; of several runs, next to them)")
    parser.add_argument(
        "--follow",
        action="store_true",
        help="write the page again while a run goes on, until Ctrl-C, or until nothing new came for an hour; an open "
        "page reloads itself and says how old its numbers are",
    )
    parser.add_argument("--every", type=float, default=30.0, metavar="SECONDS", help="with --follow (%(default)s)")
    parser.add_argument("--max-trajectories", type=int, default=10_000, help="in the page, over all runs (%(default)s)")
    parser.add_argument(
        "--max-chars",
        type=int,
        default=20_000,
        help="of one text in the page (%(default)s; less where many trajectories would make the page too large)",
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="where tokenizer.json is, if not in the run's model.path"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be read and written, then stop")
    return parser


def default_output(asked: Sequence[Path], runs: Sequence[Path]) -> Path:
    """In the one directory that was asked for, else in the common parent of the runs."""
    if len(asked) == 1:
        return asked[0] / "report.html"
    return Path(os.path.commonpath([path.resolve().parent for path in runs])) / "report.html"


# one page ------------------------------------------------------------------------------------------------------------


def write_report(
    paths: Sequence[Path],
    output: Path,
    *,
    limit: int = 10_000,
    max_chars: int = 20_000,
    tokenizer: Path | None = None,
    every: float | None = None,
    collector: Collector | None = None,
) -> None:
    """Read the run directories in `paths` and write the page; atomic.

    `every`: the page is written again after so many seconds, and says so. `collector` remembers what it has read.
    """
    if limit < 0 or max_chars < 100:
        raise ConfigError(f"--max-trajectories {limit} must not be negative, --max-chars {max_chars} at least 100")
    names = _distinct_names(paths)
    runs = [load_run(path, name=name) for path, name in zip(paths, names, strict=True)]
    texts = texts_for(
        {run.path: str(run.config.get("model", {}).get("path") or "") for run in runs}, override=tokenizer
    )
    sources = [Source(run.path, texts[run.path], phases=run.phases(), began=run.began_at) for run in runs]
    trajectories = (collector or Collector(limit=limit, max_chars=max_chars)).collect(sources)
    parent = Path(os.path.commonpath([path.resolve().parent for path in paths])).name
    title = ", ".join(names) if len(names) < 3 or not parent else f"{parent}: {len(paths)} runs"
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    partial.write_text(render(runs, trajectories, title=title, every=every), encoding="utf-8", errors="replace")
    partial.replace(output)


def render(runs: Sequence[Run], trajectories: Trajectories, *, title: str, every: float | None = None) -> str:
    """The page's text. Everything the scripts show is in the elements `data`, `rows`, `chunk-K` and `step-K`."""
    data: dict[str, Any] = {
        "title": title,
        "made": time.time(),
        "every": every,
        "runs": [page_data(run) for run in runs],
        "accuracy": comparison([a for run in runs for a in accuracies(run)]),
        "trajectories_total": trajectories.total,
        "chunks": len(trajectories.chunks),
        "steps": trajectories.step_index,
        "notes": [*(note for run in runs for note in run.notes), *trajectories.notes],
        "units": {"lp": NATS_PER_UNIT, "r": GAP_UNIT},
    }
    blocks = [_block("rows", pack(trajectories.rows))]
    blocks += [_block(f"chunk-{number}", text) for number, text in enumerate(trajectories.chunks)]
    blocks += [_block(f"step-{number}", text) for number, text in enumerate(trajectories.steps)]
    parts = {
        "TITLE": _escape(f"{title} · Aster"),
        "STYLE": _asset("style.css"),
        "DATA": _in_script(page_json(data)),
        "BLOCKS": "\n".join(blocks),
        "SCRIPT": "\n".join(_asset(name) for name in SCRIPTS),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda slot: parts[slot[1]], _asset("page.html"))


def _asset(name: str) -> str:
    return (resources.files("aster.page") / name).read_text("utf-8")


def _block(name: str, text: str) -> str:
    return f'<script type="text/plain" id="{name}">{text}</script>'


def _in_script(text: str) -> str:
    """JSON inside a script element: `<` may not open a tag there, and JSON can say it otherwise."""
    return text.replace("<", "\\u003c")


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    """The directory's name; with its parent's where two runs are called the same."""
    names = [path.resolve().name for path in paths]
    return [
        name if names.count(name) == 1 else f"{path.resolve().parent.name}/{name}"
        for path, name in zip(paths, names, strict=True)
    ]


# while a run goes on -------------------------------------------------------------------------------------------------


def follow(args: argparse.Namespace, *, idle_s: float = _IDLE_S) -> int:
    """Write the page every `args.every` seconds in which a run wrote something. The last page no longer reloads.

    The runs need not have begun: what the paths hold is looked up every time.
    """
    every = float(args.every)
    if not 1 <= every < math.inf:
        raise ConfigError(f"--every {every:g}: name at least 1 second, and a number")
    collector = Collector(limit=args.max_trajectories, max_chars=args.max_chars)
    seen: object = None
    output: Path | None = None
    changed_at = time.monotonic()
    options = {"limit": args.max_trajectories, "max_chars": args.max_chars, "tokenizer": args.tokenizer}
    print(f"following {', '.join(map(str, args.runs))} every {every:g} s; Ctrl-C ends it", flush=True)
    try:
        while time.monotonic() - changed_at < idle_s:
            try:
                paths = find_runs(args.runs)
                now = [_stamp(path) for path in paths]
                if now != seen:
                    output = args.output or default_output(args.runs, paths)
                    write_report(paths, output, every=every, collector=collector, **options)
                    print(f"{time.strftime('%H:%M:%S')}  {output}  ({output.stat().st_size / 1e6:.1f} MB)", flush=True)
                    seen, changed_at = now, time.monotonic()
            except (DataError, FileNotFoundError) as error:  # policy: not begun yet, or a file was just replaced
                print(f"{time.strftime('%H:%M:%S')}  waiting: {error}", flush=True)
            time.sleep(every)
        print(f"nothing new for {idle_s:g} s")
    except KeyboardInterrupt:
        print()
    if output is not None:
        write_report(find_runs(args.runs), output, collector=collector, **options)
        print(f"{output} is final")
    return 0


def _stamp(path: Path) -> tuple[object, ...]:
    """Changes when the run has written something that the page shows."""
    files = [path / "metrics.jsonl", *path.glob("*rollout_data/*.jsonl"), *path.glob("trajectories/*.parquet")]
    return tuple((str(file), stat.st_mtime_ns, stat.st_size) for file in sorted(files) if (stat := _stat(file)))


def _stat(file: Path) -> os.stat_result | None:
    return file.stat() if file.exists() else None


if __name__ == "__main__":
    sys.exit(run_verb("report"))
