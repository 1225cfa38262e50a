"""`aster report`: one self-contained HTML page for one or several runs; opens from disk, loads nothing.

    aster report runs/stage1
    aster report runs/quickstart-0                    every run inside it, in the order in which they were made
    aster report runs/a runs/b --output compare.html

Curves, the collapse monitor, accuracies with paired intervals, and every trajectory with its turns.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from aster.command import run_verb
from aster.errors import ConfigError
from aster.page.runs import Run, accuracies, comparison, find_runs, load_run, page_data
from aster.page.trajectories import Trajectories, collect


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    paths = find_runs(args.runs)
    output = args.output or default_output(args.runs, paths)
    if args.dry_run:
        print("\n".join([*(f"would read {path}" for path in paths), f"would write {output}"]))
        return 0
    write_report(paths, output, limit=args.max_trajectories, max_chars=args.max_chars)
    print(f"{output}  ({output.stat().st_size / 1e6:.1f} MB, {len(paths)} run{'s' * (len(paths) > 1)})")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="aster report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, or folders of them")
    parser.add_argument("--output", type=Path, help="the page (RUN/report.html; of several runs, next to them)")
    parser.add_argument("--max-trajectories", type=int, default=10_000, help="in the page, over all runs (%(default)s)")
    parser.add_argument("--max-chars", type=int, default=20_000, help="of one text in the page (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be read and written, then stop")
    return parser


def default_output(asked: Sequence[Path], runs: Sequence[Path]) -> Path:
    """In the one directory that was asked for, else in the common parent of the runs."""
    if len(asked) == 1:
        return asked[0] / "report.html"
    return Path(os.path.commonpath([path.resolve().parent for path in runs])) / "report.html"


def write_report(paths: Sequence[Path], output: Path, *, limit: int = 10_000, max_chars: int = 20_000) -> None:
    """Read the run directories in `paths` and write the page; atomic."""
    if limit < 0 or max_chars < 100:
        raise ConfigError(f"--max-trajectories {limit} must not be negative, --max-chars {max_chars} at least 100")
    names = _distinct_names(paths)
    runs = [load_run(path, name=name) for path, name in zip(paths, names, strict=True)]
    trajectories = collect(list(enumerate(paths)), limit=limit, max_chars=max_chars)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    parent = Path(os.path.commonpath([path.resolve().parent for path in paths])).name
    title = names[0] if len(paths) == 1 else f"{parent}: {len(paths)} runs"
    partial.write_text(render(runs, trajectories, title=title), encoding="utf-8")
    partial.replace(output)


def render(runs: Sequence[Run], trajectories: Trajectories, *, title: str) -> str:
    """The page's text. Everything the scripts show is in the elements `data`, `rows` and `chunk-K`."""
    data: dict[str, Any] = {
        "title": title,
        "made": time.time(),
        "runs": [page_data(run) for run in runs],
        "accuracy": comparison([a for run in runs for a in accuracies(run)]),
        "trajectories_total": trajectories.total,
        "chunks": len(trajectories.chunks),
    }
    rows = json.dumps(trajectories.rows, ensure_ascii=False, separators=(",", ":")).encode()
    blocks = [_block("rows", base64.b64encode(gzip.compress(rows, mtime=0)).decode())]
    blocks += [_block(f"chunk-{number}", text) for number, text in enumerate(trajectories.chunks)]
    parts = {
        "TITLE": _escape(f"{title} · Aster"),
        "STYLE": _asset("style.css"),
        "DATA": _in_script(json.dumps(data, ensure_ascii=False, separators=(",", ":"))),
        "BLOCKS": "\n".join(blocks),
        "SCRIPT": _asset("charts.js") + "\n" + _asset("viewer.js"),
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


if __name__ == "__main__":
    sys.exit(run_verb("report"))
