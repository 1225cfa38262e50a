"""The pictures of the report in README.md, from runs on this machine; `make pictures` calls it.

    python tests/report_pictures.py runs/quickstart-0                   an overview, a step, a trajectory, its tokens
    python tests/report_pictures.py runs/quickstart-0 --compare A B     and two runs side by side

They show what the runs hold; nothing is made up. With the font Inter installed (Debian: fonts-inter) the letters are
those of the pictures in the repository.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from browser import CHROMIUM, Browser  # noqa: E402

from aster.page.runs import find_runs, load_run  # noqa: E402
from aster.report import write_report  # noqa: E402

IMAGES = Path(__file__).parents[1] / ".github" / "images"
_MOST_BYTES = 300_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished quickstart, or another folder with GRPO runs")
    parser.add_argument("--compare", type=Path, nargs=2, metavar="RUN", help="two runs for the picture side by side")
    parser.add_argument("--to", type=Path, default=IMAGES)
    args = parser.parse_args()
    if CHROMIUM is None:
        sys.exit("report_pictures: no chromium on this machine")
    args.to.mkdir(parents=True, exist_ok=True)
    trained = [path for path in find_runs([args.run]) if load_run(path).stage == "rl"]
    with tempfile.TemporaryDirectory() as scratch, Browser() as browser:
        page = Path(scratch) / "report.html"
        write_report(find_runs([args.run]), page)
        browser.size(1180, 900)
        browser.open(page)
        browser.screenshot(args.to / "report-overview.png", of="main", height=1640)
        write_report(trained[-1:], page)
        browser.open(page)
        browser.screenshot(args.to / "report-step.png", of="#step", height=760)
        browser.choose("#filter-calls", "3")
        browser.wait("document.querySelector('#count').textContent && filter.calls === '3'")
        browser.size(1180, 820)
        browser.click("#table tbody tr")
        browser.wait("document.querySelector('#viewer').open")
        browser.screenshot(args.to / "report-trajectory.png")
        browser.press("3")
        browser.wait("document.querySelector('.tokens')")
        browser.screenshot(args.to / "report-tokens.png")
        if args.compare:
            write_report(args.compare, page)
            browser.size(1180, 900)
            browser.open(page)
            browser.screenshot(args.to / "report-collapse.png", of="main", height=1000)
    for picture in sorted(args.to.glob("report-*.png")):
        size = picture.stat().st_size
        print(f"{picture}  {size / 1e3:.0f} kB{'  TOO LARGE' if size > _MOST_BYTES else ''}")


if __name__ == "__main__":
    main()
