"""What the journal of finished turns costs: bytes and microseconds of a turn, against writing its bare arrays.

    make bench-journal ARGS="--tokens 500"

Turns of `--tokens` sampled tokens, an observation of a fifth of that and a call of 400 characters, written alternately
to the journal and as raw ids and log-probs to a file; then read back as a resumed run reads them. One line of JSON.
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

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[2])]

from aster.data.journal import JournalPlace, TurnJournal, read_journal  # noqa: E402
from aster.types import Budget, FinishedTurn, Sampling, Task, ToolCall, ToolOutcome, Turn  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--trajectories", type=int, default=256)
    parser.add_argument("--turns", type=int, default=8)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder), args.tokens, args.trajectories, args.turns)))


def measure(folder: Path, tokens: int, trajectories: int, turns: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    journal = TurnJournal(JournalPlace(folder / "journal", "c"), engine="engine-0")
    raw = os.open(folder / "raw", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    kept: list[float] = []
    bare: list[float] = []
    for at in range(trajectories):
        task = Task(f"run/train/1/row/{at}", "row", at, (), "", Budget(1, 1, 1), Sampling(), seed=0)
        for number in range(turns):
            turn = a_turn(rng, tokens)
            began = time.perf_counter()
            journal.append(task, "0123456789abcdef", number, turn)
            between = time.perf_counter()
            os.write(raw, turn.ids.tobytes() + turn.logprobs.tobytes())
            kept.append(between - began)
            bare.append(time.perf_counter() - between)
    journal.close()
    os.close(raw)
    began = time.perf_counter()
    found = read_journal(folder / "journal", config_hash="c", oldest=0, newest=1)
    read_s = time.perf_counter() - began
    assert sum(len(past.turns) for past in found.values()) == trajectories * turns
    size = sum(file.stat().st_size for file in (folder / "journal").iterdir())
    return {
        "tokens_per_turn": tokens + tokens // 5,
        "turns": trajectories * turns,
        "bytes_per_turn": round(size / (trajectories * turns)),
        "raw_bytes_per_turn": round((folder / "raw").stat().st_size / (trajectories * turns)),
        "write_us_median": round(1e6 * statistics.median(kept), 1),
        "write_us_p99": round(1e6 * float(np.percentile(kept, 99)), 1),
        "raw_write_us_median": round(1e6 * statistics.median(bare), 1),
        "read_us_per_turn": round(1e6 * read_s / (trajectories * turns), 1),
    }


def a_turn(rng: np.random.Generator, tokens: int) -> FinishedTurn:
    seen = tokens // 5
    call = ToolCall("x = 1\n" * 67, "ok", ToolOutcome.SUCCESS, "12345 " * 20, 0.1)
    sampled = np.arange(tokens + seen) < tokens
    return FinishedTurn(
        turn=Turn(0, tokens, "stop", 1.0, 2.0, call),
        ids=rng.integers(0, 150_000, tokens + seen).astype(np.int32),
        mask=sampled,
        logprobs=np.where(sampled, rng.normal(size=tokens + seen), 0).astype(np.float32),
        versions=np.where(sampled, 1, -1).astype(np.int32),
        seen=("0" * 32,),
    )


if __name__ == "__main__":
    main()
