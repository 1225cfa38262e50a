"""What the trace costs the driver: seconds and bytes of one step of 1,024 trajectories with 12 calls each.

One JSON line. `write_s` is everything that `Tracer.group` does for the step, lanes included; the training thread pays
it while groups come home.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

import numpy as np

from aster.trace import Tracer
from aster.trace_file import TraceFile
from aster.types import Cause, PromptRow, Timing, ToolCall, ToolOutcome, Trajectory, TrajectoryGroup, Turn


def trajectory(row: int, sample: int, *, calls: int, chance: random.Random) -> Trajectory:
    began = chance.uniform(0, 60)
    at, turns = 0.0, []
    for index in range(calls + 1):
        done = at + chance.uniform(1, 8)
        call = ToolCall("x", "ok", ToolOutcome.SUCCESS, "1", seconds=chance.uniform(0.01, 2)) if index < calls else None
        turns.append(Turn(index * 10, index * 10 + 10, "stop", at, done, call))
        at = done + (call.seconds if call else 0.0)
    n = 10 * (calls + 1)
    return Trajectory(
        uid=f"bench/train/1/{row}/{sample}",
        row_id=str(row),
        sample=sample,
        prompt_ids=np.zeros(4, np.int32),
        ids=np.zeros(n, np.int32),
        mask=np.ones(n, bool),
        behaviour_logprobs=np.zeros(n, np.float32),
        versions=np.zeros(n, np.int32),
        turns=tuple(turns),
        cause=Cause.ANSWERED,
        engine=f"engine-{row % 8}",
        sandbox=f"node-{row % 2}",
        timing=Timing(began_unix=1.7e9 + began, total_s=at, score_s=0.01),
        reward=1.0,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--calls", type=int, default=12)
    args = parser.parse_args()
    chance = random.Random(0)
    groups = [
        TrajectoryGroup(
            PromptRow(str(p), (), "1", "bench"),
            1,
            tuple(trajectory(p, i, calls=args.calls, chance=chance) for i in range(8)),
        )
        for p in range(args.prompts)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        tracer = Tracer(TraceFile(path))
        began = time.perf_counter()
        for group in groups:
            tracer.group(group)
        tracer.flush()
        seconds = time.perf_counter() - began
        tracer.close()
        events = json.loads(path.read_text())
        print(
            json.dumps(
                {
                    "bench": "trace",
                    "trajectories": 8 * args.prompts,
                    "calls": args.calls,
                    "write_s": round(seconds, 3),
                    "megabytes": round(path.stat().st_size / 1e6, 2),
                    "events": len(events),
                    "lanes": sum(e["name"] == "thread_name" for e in events),
                }
            )
        )


if __name__ == "__main__":
    main()
