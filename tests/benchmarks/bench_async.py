"""Steps an hour of asynchronous training against the best synchronous layout, at equal reward. Prints one JSON line.

    make bench-async ARGS="--from runs/quickstart-0"      cold-started model and prompts of an earlier quickstart
    make bench-async                                      makes them first (prepare, base, SFT: about four minutes)

Whole training runs of `cpu_rl_stage1`, real engine, learner and sandboxes, on two cores. The layouts:

    one    synchronous: one engine and the tools, then the learner on both cores
    two    synchronous: an engine on each core, then the learner on both
    async  one engine, the tools and one learner at the same time; rollouts at most one version old

Every seed (order of the prompts, sampling) trains all layouts one after the other from the same weights, then answers
the same held-out problems. `steps_per_hour` leaves out the first two steps of a run. `cpu_s_per_step` is the work of
all cores in a step: no layout can take less time than that over their number. `speedup` is the median over the seeds of
async against the synchronous layout that was faster on that seed; `reward_difference` is async minus that layout, per
problem the mean over the seeds, with Student's 95 % interval over problems.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import psutil  # vllm's

from aster import launch, merge, prepare, sft, train
from aster.algo.intervals import paired_test
from aster.config import Recipe
from aster.data.rollouts import read_rows
from aster.quickstart import Plan
from aster.roles import SandboxFactory

LAYOUTS: dict[str, tuple[str, ...]] = {
    "one": ("rollout.engines=1", "learner.cpu_threads=2"),
    "two": ("rollout.engines=2", "rollout.max_num_seqs=64", "learner.cpu_threads=2"),
    "async": ("rollout.engines=1", "rollout.max_num_seqs=256", "learner.cpu_threads=1", "rollout.max_staleness=1"),
}
SPEEDUP, WIDTH = 1.3, 0.1  # at least so many times the steps; the interval of the rewards' difference at most so wide
_WARM_UP = 2  # steps of a run that are not timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", type=Path, help="directory of a quickstart (default: make one)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-async"))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--problems", type=int, default=512, help="held-out problems at the end of each run")
    args = parser.parse_args()
    if args.steps <= _WARM_UP:
        parser.error(f"--steps {args.steps}: at least {_WARM_UP + 1}, since {_WARM_UP} are not timed")
    with contextlib.redirect_stdout(sys.stderr):  # the line alone goes to stdout
        result = measure(args)
    print(json.dumps(result))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    plan = Plan(args.source or args.out / "start", seed=0)
    first = plan.base()
    runs: dict[str, list[dict[str, Any]]] = {layout: [] for layout in args.layouts}
    with launch.cluster(first), launch.sandboxes(first) as sandboxes:
        if not (plan.models / "sft").is_dir():
            assert sandboxes is not None
            asyncio.run(prepare.quickstart(plan.data, seed=plan.seed, sandboxes=sandboxes))
            for recipe, name in ((plan.base(), "base"), (plan.sft(), "sft")):
                asyncio.run(sft.run(recipe))
                merge.merge(recipe.run.path, plan.models / name, dtype="float32")
        for seed in range(args.seeds):
            for layout in args.layouts:
                runs[layout].append(trained(plan, layout, seed, args, sandboxes))
    return told(runs, args)


def trained(
    plan: Plan, layout: str, seed: int, args: argparse.Namespace, sandboxes: SandboxFactory | None
) -> dict[str, Any]:
    """One run: seconds of its timed steps, and right or wrong by held-out problem."""
    recipe = Recipe.load(
        "cpu_rl_stage1",
        [
            f"run.dir={args.out}",
            f"run.name={layout}-{seed}",
            f"run.seed={seed}",
            f"run.steps={args.steps}",
            f"run.val_every={args.steps}",
            f"run.save_every={args.steps}",
            "run.resume=false",
            "run.tensorboard=false",
            f"data.shuffle_seed={seed}",
            f"data.train_files=[{plan.data / 'train.parquet'}]",
            f"data.val_files=[{plan.data / 'heldout.parquet'}]",
            f"data.val_max_rows={args.problems}",
            f"model.path={plan.models / 'sft'}",
            *LAYOUTS[layout],
        ],
    )
    with CpuClock() as clock:
        asyncio.run(train.run(recipe, sandboxes))
    lines = [json.loads(line) for line in (recipe.run.path / "metrics.jsonl").read_text().splitlines()]
    steps = {line["step"]: line for line in lines if "timing_s/step" in line}
    timed = [steps[step]["timing_s/step"] for step in range(_WARM_UP + 1, args.steps + 1)]
    first, last = steps[_WARM_UP + 1], steps[args.steps]
    ended = last["timing_s/began_unix"] + last["timing_s/step"]
    rows = read_rows(recipe.run.path / "val_rollout_data" / f"{args.steps}.jsonl")
    return {
        "seconds": statistics.mean(timed),
        "cpu_s": (clock.at(ended) - clock.at(first["timing_s/began_unix"])) / len(timed),
        "scores": {row["row_id"]: float(bool(row["acc"])) for row in rows},
        "share_stale": statistics.mean(line.get("training/stale_groups", 0.0) for line in steps.values()),
    }


class CpuClock:
    """CPU seconds that all cores of this machine have worked, by the time of the day."""

    def __enter__(self) -> CpuClock:
        self._read: list[tuple[float, float]] = []
        self._over = threading.Event()
        self._reader = threading.Thread(target=self._follow, daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._reader.join()

    def at(self, unix: float) -> float:
        times, seconds = zip(*self._read, strict=True)
        return float(np.interp(unix, times, seconds))

    def _follow(self) -> None:
        while True:
            worked = psutil.cpu_times()
            self._read.append((time.time(), worked.user + worked.nice + worked.system + worked.irq + worked.softirq))
            if self._over.wait(0.5):
                return


def told(runs: Mapping[str, Sequence[Mapping[str, Any]]], args: argparse.Namespace) -> dict[str, Any]:
    line: dict[str, Any] = {
        "benchmark": "async",
        "steps": args.steps,
        "seeds": args.seeds,
        "steps_per_hour": {
            layout: [round(3600 / run["seconds"], 1) for run in of_layout] for layout, of_layout in runs.items()
        },
        "cpu_s_per_step": {layout: [round(run["cpu_s"], 1) for run in of_layout] for layout, of_layout in runs.items()},
        "cores": os.cpu_count(),
        "reward": {
            layout: [round(statistics.mean(run["scores"].values()), 3) for run in of_layout]
            for layout, of_layout in runs.items()
        },
        "load_average": round(os.getloadavg()[0], 1),
    }
    synchronous = [layout for layout in runs if layout != "async"]
    if "async" not in runs or not synchronous:
        return line
    best = min(synchronous, key=lambda layout: statistics.median(run["seconds"] for run in runs[layout]))
    speedup = statistics.median(
        min(runs[layout][seed]["seconds"] for layout in synchronous) / run["seconds"]
        for seed, run in enumerate(runs["async"])
    )
    rows = sorted(set.intersection(*(set(run["scores"]) for layout in (best, "async") for run in runs[layout])))
    means = {
        layout: [statistics.mean(run["scores"][r] for run in runs[layout]) for r in rows] for layout in (best, "async")
    }
    test = paired_test(means[best], means["async"])
    return line | {
        "best_synchronous": best,
        "reward_difference": [round(test.mean, 4), round(test.low, 4), round(test.high, 4)],
        "targets": {
            "speedup": {"is": round(speedup, 3), "must": f">= {SPEEDUP:g}", "met": speedup >= SPEEDUP},
            "equal_reward": {
                "is": [round(test.low, 4), round(test.high, 4)],
                "must": f"contains 0, narrower than {WIDTH:g}",
                "met": test.low <= 0 <= test.high and test.high - test.low < WIDTH,
            },
        },
    }


if __name__ == "__main__":
    main()
