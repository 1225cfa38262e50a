"""How fast `aster filter` reads rollouts, and what memory it needs. Prints one JSON line.

    make bench-filter                                  1 GB of generated rollouts, 17,398 problems, 8 rollouts each time
    make bench-filter ARGS="--gigabytes 4 --threads 2"

The rollouts are written to a temporary folder (`--folder` names where; they are removed), in files of 1,024 rows in
the reference's columns with a row_id. `aster filter` runs as a process of its own: its wall time and its largest
resident memory, imports included. `--text` leaves the row ids out, so that rows are joined by their prompt.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from aster.data.prompts import user_message, write_prompts
from aster.types import PromptRow

PROMPTS_PER_STEP, GROUP = 128, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of rollouts, 10^9 bytes (%(default)s)")
    parser.add_argument("--problems", type=int, default=17398, help="rows of the dataset (%(default)s)")
    parser.add_argument("--characters", type=int, default=16000, help="of one output (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="passed on (%(default)s)")
    parser.add_argument("--text", action="store_true", help="rollouts without row ids")
    parser.add_argument("--folder", help="where the temporary folder is made")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        rows, size = write(folder, args)
        began = time.perf_counter()
        done = subprocess.run(
            [
                *(sys.executable, "-m", "aster.filter", "--dataset", str(folder / "dataset.parquet")),
                *("--rollout-dir", str(folder / "rollouts"), "--output", str(folder / "kept.parquet")),
                *("--threads", str(args.threads)),
            ],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=3600,
        )
        seconds = time.perf_counter() - began
        if done.returncode:
            raise SystemExit(f"aster filter failed:\n{done.stderr}")
    counts = dict(line.rsplit(maxsplit=1) for line in done.stdout.splitlines() if line.startswith(("kept ", "rows ")))
    result = {
        "gigabytes": round(size / 1e9, 3),
        "rollouts": rows,
        "problems": args.problems,
        "joined_by": "text" if args.text else "row_id",
        "threads": args.threads,
        "kept": int(counts["kept"].replace(",", "")),
        "seconds": round(seconds, 2),
        "rows_per_s": round(rows / seconds, 1),
        "megabytes_per_s": round(size / 1e6 / seconds, 1),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024, 1),
    }
    print(json.dumps(result))


def write(folder: Path, args: argparse.Namespace) -> tuple[int, int]:
    """dataset.parquet and rollouts/STEP.jsonl; returns (rollouts, bytes of them)."""
    rng = random.Random(0)
    problems = [
        PromptRow(
            f"row-{i}", ({"role": "user", "content": user_message(f"What is {i} + 1? " * 12)},), str(i + 1), "bench"
        )
        for i in range(args.problems)
    ]
    write_prompts(folder / "dataset.parquet", problems)
    (folder / "rollouts").mkdir()
    words = " ".join(rng.choice(("add", "the", "next", "value", "and", "check")) for _ in range(args.characters))
    size = step = rows = 0
    while size < args.gigabytes * 1e9:
        step += 1
        with open(folder / "rollouts" / f"{step}.jsonl", "w", encoding="utf-8") as file:
            for problem in rng.sample(problems, min(PROMPTS_PER_STEP, len(problems))):
                chance = rng.choice((0.0, 0.5, 0.9, 1.0))
                for sample in range(GROUP):
                    file.write(_line(problem, words, sample, step, rng.random() < chance, args) + "\n")
                    rows += 1
        size += (folder / "rollouts" / f"{step}.jsonl").stat().st_size
    return rows, size


def _line(problem: PromptRow, words: str, sample: int, step: int, right: bool, args: argparse.Namespace) -> str:
    start = (step * 7919 + sample * 104729) % args.characters
    row: dict[str, object] = {
        "input": f"system\n# Tools\nuser\n{problem.messages[-1]['content']}\nassistant\n<think>\n",
        "output": words[start : start + args.characters],
        "score": float(right),
        "step": step,
        "acc": right,
        "pred": problem.ground_truth,
        "final_reward": float(right),
    }
    return json.dumps(row if args.text else row | {"row_id": problem.row_id, "sample": sample})


if __name__ == "__main__":
    main()
