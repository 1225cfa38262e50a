"""What the control plane costs per trajectory: the real driver and the real pool around fakes. One JSON line.

    make bench-control ARGS="--sizes 1024,8192,131072"

`GrpoLoop` runs one whole step (submit, pull, score, advantages, packing, two passes of the learner, metrics, rollouts
and trajectories on disk) at each size, in a process of its own. Engines and learners are fakes that answer at once; the
CPU time of making their answers is taken with a thread clock and subtracted. A trajectory comes home pickled, as from
another process, and reading it counts (what Ray itself takes for a call does not). It has 4 turns, 3 calls and 2,000
tokens. Its tokens are what training needs of each token, once: ids, mask, log-probs and versions (13 bytes, its record)
and the old log-probs of the proximal pass (4). All that is resident beyond them at the fullest moment of the step
counts: objects, texts, packed rows, copies, and what the allocator does not give back.

Both figures are slopes of a line through the sizes, so that what a process needs once is in neither. Texts are decoded
by a table, because a tokenizer's time is per token; `--verifier` asks math-verify's processes too, whose own CPU time
does not count here.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from actors.router import EnginePool
from aster.agent.rewards import RewardPool
from aster.config import Recipe
from aster.driver import GrpoLoop
from aster.types import (
    Cause,
    MicroBatch,
    OptimStats,
    PromptRow,
    PublishReport,
    StepStats,
    Task,
    TokenScores,
    ToolCall,
    ToolOutcome,
    Trajectory,
    Turn,
)

SIZES = (1024, 8192, 131_072)
GROUP = 8
PROMPT_TOKENS, RESPONSE_TOKENS, TURNS, OBSERVATION_TOKENS = 120, 1880, 4, 60
TOKEN_BYTES = 4 * PROMPT_TOKENS + 13 * RESPONSE_TOKENS  # the record
OLD_BYTES = 4 * (PROMPT_TOKENS + RESPONSE_TOKENS)  # what the proximal pass adds
CPU_S_AT_MOST, BYTES_AT_MOST = 1e-3, 20e3
_CODE = "total = 0\nfor k in range(1, {n}):\n    if k % 7 == {sample}:\n        total += k * k\nprint(total)"


class Clock:
    """CPU seconds of this thread that belong to the fakes, not to us."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began = 0.0

    def __enter__(self) -> None:
        self._began = time.thread_time()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.thread_time() - self._began


def make_trajectory(task: Task, engine: str) -> Trajectory:
    """4 turns, 3 calls with an observation after each, 2,000 tokens with the prompt. Arrays and texts of its own."""
    rng = np.random.default_rng(task.seed)
    mask = np.ones(RESPONSE_TOKENS, bool)
    length = (RESPONSE_TOKENS - (TURNS - 1) * OBSERVATION_TOKENS) // TURNS
    turns, at = [], 0
    for number in range(TURNS):
        stop = at + length if number < TURNS - 1 else RESPONSE_TOKENS
        call = None
        if number < TURNS - 1:
            mask[stop : stop + OBSERVATION_TOKENS] = False
            call = ToolCall(
                code=_CODE.format(n=number + 100, sample=task.sample),
                status="ok",
                outcome=ToolOutcome.SUCCESS,
                observation=f"{task.seed}\n" + f"{number} " * OBSERVATION_TOKENS,
                seconds=0.1,
            )
        turns.append(Turn(at, stop, "stop", float(number), number + 0.9, call))
        at = stop + OBSERVATION_TOKENS
    return Trajectory(
        uid=task.uid,
        row_id=task.row_id,
        sample=task.sample,
        prompt_ids=np.full(PROMPT_TOKENS, 7, np.int32),
        ids=rng.integers(0, 50_000, RESPONSE_TOKENS, dtype=np.int32),
        mask=mask,
        behaviour_logprobs=np.where(mask, -rng.random(RESPONSE_TOKENS, dtype=np.float32), np.float32(0)),
        versions=np.where(mask, np.int32(0), np.int32(-1)),
        turns=tuple(turns),
        cause=Cause.ANSWERED,
        final_text=f"So the answer is \\boxed{{{task.sample % 2}}}.",
        engine=engine,
    )


class Engine:
    """`router.EngineHandle` that answers after going once round the event loop."""

    def __init__(self, name: str, clock: Clock, *, capacity: int) -> None:
        self.name, self.capacity, self.lost = name, capacity, ""
        self.kv_tokens = 0  # not known
        self._clock = clock

    async def run(self, task: Task) -> Trajectory:
        await asyncio.sleep(0)
        with self._clock:
            sent = pickle.dumps(make_trajectory(task, self.name), protocol=5)
        trajectory: Trajectory = pickle.loads(sent)
        return trajectory

    async def cancel_all(self) -> None: ...

    async def close(self) -> None: ...


class Publisher:
    async def publish(self, source: object, version: int) -> PublishReport:
        return PublishReport(version, bytes=0, seconds=0.0, engines=1)

    async def admit(self, engine: object) -> bool:
        return True


class Learners:
    """`roles.LearnerGroup` with the log-probs that the engines had."""

    dp_size = 8

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    async def log_probs(self, microbatches: Sequence[MicroBatch], *, reference: bool = False) -> list[TokenScores]:
        with self._clock:
            return [
                TokenScores(m.behaviour_logprobs + np.float32(0.01), np.ones_like(m.behaviour_logprobs))
                for m in microbatches
            ]

    async def forward_backward(
        self, microbatches: Sequence[MicroBatch], *, num_loss_tokens: int, num_groups: int
    ) -> StepStats:
        with self._clock:
            return StepStats(tokens=sum(int(m.loss_mask.sum()) for m in microbatches))

    async def optim_step(self) -> OptimStats:
        return OptimStats(grad_norm=1.0, lr=1e-6, skipped=False)

    def weight_source(self) -> object:
        return self


class Prompts:
    """Rows without end; nothing is kept of them."""

    total_steps, epoch = 1, 0

    def __init__(self) -> None:
        self._next = 0

    def take(self) -> PromptRow:
        self._next += 1
        messages = ({"role": "user", "content": f"problem {self._next}"},)
        return PromptRow(f"row-{self._next}", messages, "1", "bench")

    def done(self, row: PromptRow) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Discard:
    def log(self, step: int, values: Mapping[str, float]) -> None: ...


def decode(ids: np.ndarray, /, *, skip_special: bool = False) -> str:
    return "word " * len(ids)


def resident(name: str) -> int:
    """Bytes: "VmRSS" now, "VmHWM" at most since this program began."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def one_step(size: int, folder: Path, *, verifier: bool) -> dict[str, Any]:
    """One step of `size` trajectories in this process: seconds of CPU and bytes beyond the tokens, by part."""
    prompts = size // GROUP
    recipe = Recipe.model_validate(
        {
            "stage": "rl",
            "run": {"dir": str(folder), "steps": 1, "val_every": 0, "val_before_train": False, "tensorboard": False},
            "budget": {"max_prompt_tokens": 256, "max_response_tokens": 4096},
            "rollout": {"prompts_per_step": prompts, "group_size": GROUP},
            "algo": {"mini_batch_prompts": max(prompts // 4, 1)},
        }
    )
    clock = Clock()
    parts: dict[str, float] = {}
    rewards = RewardPool(math_verify=verifier, workers=2)

    async def run() -> None:
        engines = [Engine(f"engine-{i}", clock, capacity=1024) for i in range(8)]
        pool = EnginePool(engines, rewards=rewards, publisher=Publisher())
        loop = GrpoLoop(recipe, Learners(clock), pool, Prompts(), Discard(), decode)
        for name in ("sample", "learn"):
            setattr(loop, name, _timed(name, getattr(loop, name), parts, clock))
        await loop.run()
        await pool.close()

    before, began = resident("VmRSS"), time.process_time()
    asyncio.run(run())
    cpu = time.process_time() - began - clock.seconds
    rewards.close()
    return {
        "trajectories": prompts * GROUP,
        "cpu_s": cpu,
        "parts_s": parts | {"metrics_and_files": cpu - sum(parts.values())},
        "fakes_s": clock.seconds,
        "tokens_bytes": prompts * GROUP * (TOKEN_BYTES + OLD_BYTES),
        "beyond_bytes": resident("VmHWM") - before - prompts * GROUP * (TOKEN_BYTES + OLD_BYTES),
    }


def _timed(
    name: str, method: Callable[..., Awaitable[Any]], parts: dict[str, float], clock: Clock
) -> Callable[..., Awaitable[Any]]:
    async def timed(*args: Any) -> Any:
        began, fakes = time.process_time(), clock.seconds
        result = await method(*args)
        parts[name] = parts.get(name, 0.0) + time.process_time() - began - (clock.seconds - fakes)
        return result

    return timed


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Of the least-squares line; per trajectory."""
    return float(np.polyfit(np.asarray(sizes, float), np.asarray(values, float), 1)[0])


def report(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The JSON line from one result of `one_step` per size."""
    sizes = [s["trajectories"] for s in steps]
    cpu, memory = slope(sizes, [s["cpu_s"] for s in steps]), slope(sizes, [s["beyond_bytes"] for s in steps])

    def verdict(value: float, bound: float, digits: int) -> dict[str, Any]:
        return {"is": round(value, digits), "must": f"<= {bound:g}", "met": value <= bound}

    return {
        "benchmark": "control",
        "sizes": sizes,
        "tokens_per_trajectory": PROMPT_TOKENS + RESPONSE_TOKENS,
        "cpu_ms_per_trajectory": verdict(1e3 * cpu, 1e3 * CPU_S_AT_MOST, 4),
        "kb_per_trajectory_beyond_tokens": verdict(memory / 1e3, BYTES_AT_MOST / 1e3, 2),
        "parts_ms": {
            part: round(1e3 * slope(sizes, [s["parts_s"][part] for s in steps]), 4) for part in steps[0]["parts_s"]
        },
        "cpu_s": [round(s["cpu_s"], 3) for s in steps],
        "beyond_mb": [round(s["beyond_bytes"] / 1e6, 1) for s in steps],
        "tokens_mb": [round(s["tokens_bytes"] / 1e6, 1) for s in steps],
        "load_average": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="trajectories of a step, two sizes at least")
    parser.add_argument("--verifier", action="store_true", help="ask math-verify's processes, as training does")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # a size, in this process
    parser.add_argument("--folder", default=None, help="where the runs are written; null = a temporary folder")
    args = parser.parse_args()
    sizes = sorted({int(size) for size in args.sizes.split(",")})
    if args.one is None and (len(sizes) < 2 or sizes[0] < GROUP):
        parser.error(f"--sizes={args.sizes}: a slope needs two sizes of at least {GROUP}")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if args.one is not None:
            print(json.dumps(one_step(args.one, Path(folder), verifier=args.verifier)))
            return
        more = ["--verifier"] if args.verifier else []
        steps = []
        for size in sizes:  # a process each: what the last size left behind would be resident in the next
            child = [sys.executable, __file__, "--one", str(size), "--folder", folder, *more]
            steps.append(json.loads(subprocess.run(child, check=True, stdout=subprocess.PIPE, timeout=3600).stdout))
    print(json.dumps(report(steps)))


if __name__ == "__main__":
    main()
