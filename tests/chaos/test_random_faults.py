"""A training run of some minutes while its parts are killed at random: engines, cells, sandbox node, verifier, learner.

What is survivable is survived. What is not ends the run with an error that names the part, and the same command goes on
from the checkpoint. Afterwards the files of every step are complete and no loss of ours is scored.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from faults import ROWS, assert_whole, kill_cells, taught_model, verifiers

pytest.importorskip("vllm", reason="vllm is not installed: make setup")

import psutil  # vllm's
import ray

from aster import launch, train
from aster.config import Recipe
from aster.data.prompts import write_prompts
from aster.data.trajectories import read_trajectories
from aster.errors import CircuitOpen, EngineLost, GangFailure, WeightSyncError
from aster.tracking import METRICS_FILE, read_metrics
from aster.types import Cause

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(2400)]

STEPS, PROMPTS, GROUP = 16, 2, 6
PAUSE_S = 6.0  # between two faults, on average
RESTARTS = 8
MOST = {"learner": 2, "engine core": 4, "engine actor": 2}  # each of these may cost a restart of some 30 s


class Monkey:
    """Kills something every few seconds; `done` counts what it did."""

    def __init__(self, seed: int, node: str) -> None:
        self.done: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._faults: dict[str, Callable[[], bool]] = {
            "cells": lambda: kill_cells(node) > 0,
            "sandbox node": lambda: self._kill("ray::ServeReplica:sandbox:SandboxPool"),
            "verifier killed": lambda: self._verifier(signal.SIGKILL),
            "verifier hung": lambda: self._verifier(signal.SIGSTOP),
            "engine core": lambda: self._kill("VLLM::EngineCore"),
            "engine actor": lambda: self._kill("ray::RolloutEngine"),
            "learner": lambda: self._kill("ray::LearnerRank"),
        }

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._random.uniform(0.5, 1.5) * PAUSE_S)
            fault = self._random.choice([f for f in self._faults if self.done[f] < MOST.get(f, 100)])
            if await asyncio.to_thread(self._faults[fault]):
                self.done[fault] += 1
                print(f"{time.strftime('%X')} {fault}", flush=True)

    def _kill(self, title: str) -> bool:
        """One process of that title among our descendants, if there is any."""
        found = []
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if process.cmdline()[:1] and process.cmdline()[0].startswith(title):
                    found.append(process)
        if not found:
            return False
        self._random.choice(found).kill()
        return True

    def _verifier(self, fault: int) -> bool:
        found = verifiers()
        for process in found:
            with suppress(psutil.Error):
                process.send_signal(fault)
        return bool(found)


def test_a_run_under_random_faults_ends_and_no_step_has_lost_repeated_or_misjudged_a_trajectory(tmp_path: Path) -> None:
    write_prompts(tmp_path / "train.parquet", ROWS)
    recipe = Recipe.load(
        "cpu_rl_stage1",
        [
            f"model.path={taught_model(tmp_path / 'model')}",
            f"data.train_files=[{tmp_path / 'train.parquet'}]",
            "data.val_files=[]",
            f"data.epochs={STEPS}",
            f"run.dir={tmp_path}",
            f"run.steps={STEPS}",
            "run.save_every=1",
            f"sandbox.backend={os.environ.get('ASTER_TEST_BACKEND', 'auto')}",
            "sandbox.sessions_per_cell=4",
            "rollout.engines=2",
            f"rollout.prompts_per_step={PROMPTS}",
            f"rollout.group_size={GROUP}",
            "rollout.max_num_seqs=16",
            "rollout.kv_cache_bytes=33554432",
            "rollout.max_infra_failed_rate=0.7",
            f"algo.mini_batch_prompts={PROMPTS}",
            "algo.reward=math_verify",
            "optim.lr=1e-5",
            "budget.max_response_tokens=240",
            "budget.max_tool_calls=4",
            "budget.trajectory_timeout_s=60",
        ],
    )
    ended: list[str] = []
    with launch.cluster(recipe), launch.sandboxes(recipe) as sandboxes:
        monkey = Monkey(int(os.environ.get("ASTER_CHAOS_SEED", "0")), ray.get_runtime_context().get_node_id())

        async def attempt() -> str:
            """One start of the command: "" = it reached its end."""
            killing = asyncio.create_task(monkey.run())
            try:
                async with asyncio.timeout(600):
                    await train.run(recipe, sandboxes)
            except (CircuitOpen, EngineLost, GangFailure, WeightSyncError) as error:
                return f"{type(error).__name__}: {error}"
            finally:
                killing.cancel()
            return ""

        while error := asyncio.run(attempt()):
            ended.append(error)
            print(f"ended: {error}", flush=True)
            assert len(ended) <= RESTARTS, ended
    print(f"faults: {dict(monkey.done)}; restarts: {len(ended)}", flush=True)
    assert monkey.done.total() >= 10
    assert len(monkey.done) >= 5

    run = recipe.run.path
    metrics = read_metrics(run / METRICS_FILE)
    rows: Counter[str] = Counter()
    for step in range(1, STEPS + 1):
        file = run / "trajectories" / f"{step}.parquet"
        final, lost = list(read_trajectories(file)), list(read_trajectories(file, lost=True))
        assert len({(t.row_id, t.sample) for t in final}) == len(final) == PROMPTS * GROUP, step
        rows.update({t.row_id for t in final})
        for t in (*final, *lost):
            assert (t.reward is None) == t.cause.is_ours, (step, t.uid, t.cause, t.error)
            assert_whole(t)
        causes = Counter(t.cause for t in (*final, *lost))
        assert {cause: metrics[step][f"causes/{cause}_count"] for cause in Cause} == {c: causes[c] for c in Cause}
        ours = sum(count for cause, count in causes.items() if cause.is_ours)
        assert metrics[step]["infra_failed_rate"] == ours / causes.total()
    assert set(rows.values()) == {STEPS * PROMPTS // len(ROWS)}, "each epoch has each row once"
