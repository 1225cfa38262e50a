"""How large the report is and how fast a browser has it: of a finished run, and of 10,000 trajectories made from it.

    make bench-report ARGS="runs/quickstart-0"

Seconds from the navigation until the page is ready (every curve drawn, the table filled, a step on the clock), until a
trajectory is open, and until all texts are searched; medians of `--times` loads in a Chromium that has seen nothing.
One line of JSON. The targets: under 5 MB and 2 s for the quickstart, under 5 s for 10,000 trajectories.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from browser import CHROMIUM, Browser  # noqa: E402

from aster.data.rollouts import read_rows, rollout_files  # noqa: E402
from aster.page.runs import find_runs  # noqa: E402
from aster.report import write_report  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, default=Path("runs/quickstart-0"), help="runs (%(default)s)")
    parser.add_argument("--trajectories", type=int, default=10_000)
    parser.add_argument("--times", type=int, default=5)
    args = parser.parse_args()
    if CHROMIUM is None:
        sys.exit("bench_report: no chromium on this machine")
    with tempfile.TemporaryDirectory() as scratch:
        as_it_is = measure(find_runs([args.run]), Path(scratch) / "run.html", times=args.times)
        source = max(find_runs([args.run]), key=lambda path: _trajectories(path))
        many = multiply(source, Path(scratch) / "many", trajectories=args.trajectories)
        made = measure([many], Path(scratch) / "many.html", times=args.times)
    print(json.dumps({"bench": "report", "load": round(os.getloadavg()[0], 2), "run": as_it_is, "many": made}))


def measure(runs: list[Path], page: Path, *, times: int) -> dict[str, float]:
    began = time.monotonic()
    write_report(runs, page)
    wrote = time.monotonic() - began
    ready, opened, searched = [], [], []
    rows = 0
    for _ in range(times):
        with Browser() as browser:
            browser.size(1400, 900)
            ready.append(browser.open(page))
            rows = browser.evaluate("ROWS.length")
            opened.append(
                browser.evaluate(
                    "(async () => { const t = performance.now(); await open(7); return performance.now() - t; })()"
                )
            )
            browser.press("Escape")
            search = "filter.text = 'zzzz'; filter.deep = true; await refresh();"
            searched.append(
                browser.evaluate(
                    f"(async () => {{ const t = performance.now(); {search} return performance.now() - t; }})()"
                )
            )
    return {
        "trajectories": rows,
        "mb": round(page.stat().st_size / 1e6, 2),
        "write_s": round(wrote, 2),
        "ready_s": round(statistics.median(ready), 3),
        "slowest_ready_s": round(max(ready), 3),
        "open_one_s": round(statistics.median(opened) / 1000, 3),
        "search_all_texts_s": round(statistics.median(searched) / 1000, 3),
    }


def _trajectories(path: Path) -> int:
    folder = path / "rollout_data"
    if not folder.is_dir() or not (path / "trajectories").is_dir():
        return 0
    return sum(1 for _, file in rollout_files(folder) for _ in read_rows(file))


def multiply(run: Path, to: Path, *, trajectories: int) -> Path:
    """A run of so many trajectories: the steps of `run` again and again, under other numbers and ids."""
    for folder in ("rollout_data", "trajectories"):
        (to / folder).mkdir(parents=True)
    (to / "config.yaml").write_text((run / "config.yaml").read_text("utf-8"), "utf-8")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    files = rollout_files(run / "rollout_data")
    step = made = 0
    with (to / "metrics.jsonl").open("w", encoding="utf-8") as metrics:
        while made < trajectories:
            old, file = files[step % len(files)]
            step += 1
            rows = [row | {"step": step, "uid": f"{step}/{row['uid']}"} for row in read_rows(file)]
            rows = rows[: trajectories - made]
            made += len(rows)
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (to / "rollout_data" / f"{step}.jsonl").write_text(text, "utf-8")
            table = pq.read_table(run / "trajectories" / f"{old}.parquet")
            uids = pa.array([f"{step}/{uid.as_py()}" for uid in table.column("uid")])
            table = table.set_column(table.column_names.index("uid"), "uid", uids)
            pq.write_table(table, to / "trajectories" / f"{step}.parquet", compression="zstd")
            for line in lines:
                if line["step"] == old:
                    metrics.write(json.dumps(line | {"step": step}) + "\n")
    return to


if __name__ == "__main__":
    main()
