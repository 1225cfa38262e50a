"""Learning from recorded trajectories, killed in the middle of a step and resumed: the bits of a run that was not.

One rank, and two over gloo, each a process of its own, fp32 on CPU. The trajectories lie on disk as `aster train`
leaves them; the driver makes samples of them, so advantages, packing and the order of updates are those of a run.
"""

from __future__ import annotations

import os
import signal
from collections import defaultdict
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import FakeLearners, FakePool, MemoryLog, row, trajectory, work
from gang import run_gang
from learners import VOCAB, read_checkpoint, recipe, write_model

from actors.learner import Learner
from aster.algo.packing import denominators, pack
from aster.checkpoints import newest
from aster.config import Recipe
from aster.data.prompts import PromptStream
from aster.data.trajectories import read_trajectories, write_trajectories_parquet
from aster.driver import GrpoLoop
from aster.types import MicroBatch, Sample, Trajectory, TrajectoryGroup

STEPS, PROMPTS, GROUP, MINI = 3, 4, 3, 2  # two updates a step
KILLED_IN = 3  # the checkpoint before it has moments, and its schedule is past the warm-up


def _recipe(world_size: int) -> Recipe:
    return recipe(
        learner={"world_size": world_size, "micro_batch_tokens": 64},
        optim={"lr": 1e-2, "schedule": "cosine_with_min_lr", "warmup_steps": 2, "weight_decay": 0.1},
        rollout={"prompts_per_step": PROMPTS, "group_size": GROUP},
        algo={"mini_batch_prompts": MINI},
    )


def _record(folder: Path) -> None:
    """`STEPS` steps of a run: random tokens with observations in between, a reward for one sample in three."""
    rng = np.random.default_rng(0)
    for step in range(1, STEPS + 1):
        groups = []
        for prompt in range(PROMPTS):
            members = []
            for sample in range(GROUP):
                n = int(rng.integers(5, 30))
                mask = rng.random(n) < 0.7
                mask[0] = True
                one = trajectory(work(row(prompt)), sample, version=step - 1, reward=float(sample == prompt % GROUP))
                members.append(
                    replace(
                        one,
                        ids=rng.integers(0, VOCAB, n).astype(np.int32),
                        mask=mask,
                        behaviour_logprobs=np.where(mask, rng.normal(-4.5, 0.3, n), 0).astype(np.float32),
                        versions=np.where(mask, step - 1, -1).astype(np.int32),
                    )
                )
            groups.append(TrajectoryGroup(row(prompt), step, tuple(members), "train"))
        write_trajectories_parquet(folder, groups, step=step)


def _mini_batches(recipe: Recipe, file: Path) -> list[list[Sample]]:
    members: dict[str, list[Trajectory]] = defaultdict(list)
    for one in read_trajectories(file):
        members[one.row_id].append(one)
    loop = GrpoLoop(
        recipe=recipe,
        learners=FakeLearners([]),
        pool=FakePool([]),
        prompts=PromptStream([row(i) for i in range(PROMPTS)], batch=PROMPTS, seed=0, epochs=STEPS),
        log=MemoryLog(),
        decode=str,
    )
    groups = [TrajectoryGroup(row(i), 1, tuple(members[f"row-{i}"]), "train") for i in range(PROMPTS)]
    samples = [loop.samples_of(group, index) for index, group in enumerate(groups)]
    return [[*chain(*samples[start : start + MINI])] for start in range(0, PROMPTS, MINI)]


def _learn(
    rank: int, world_size: int, port: int, model: str, root: str, run: str, killed_in: int | None
) -> list[dict[str, Any]]:
    """Every step that is not in a checkpoint of `run` yet; SIGKILL after the first rows of step `killed_in`."""
    folder = Path(root, run)
    learner = Learner(
        _recipe(world_size),
        model_path=model,
        total_steps=STEPS * PROMPTS // MINI,
        rank=rank,
        world_size=world_size,
        master=("127.0.0.1", port),
    )
    done = newest(folder)
    first = 1
    if done is not None:
        first = int(done.name.removeprefix("global_step_")) + 1
        assert learner.load(str(done / "actor")) == (first - 1) * PROMPTS // MINI
    told = []
    for step in range(first, STEPS + 1):
        minis = _mini_batches(learner.recipe, Path(root, "trajectories", f"{step}.parquet"))
        packed = [[rows[rank] for rows in pack(mini, row_tokens=64, dp_size=world_size)] for mini in minis]
        for mini, rows in zip(minis, [[_with_old(learner, r) for r in rows] for rows in packed], strict=True):
            tokens, groups = denominators(mini)
            for micro in rows:
                stats = learner.forward_backward(micro, num_loss_tokens=tokens, num_groups=groups)
                told.append({"step": step, **vars(replace(stats, seconds=0.0))})
                if step == killed_in:
                    os.kill(os.getpid(), signal.SIGKILL)
            told.append({"step": step, **vars(replace(learner.optim_step(), seconds=0.0))})
        learner.save(str(folder / f"global_step_{step}" / "actor"))
        learner.saved()
        if rank == 0:
            (folder / f"global_step_{step}" / "driver.json").write_text("{}")
    learner.close()
    return told


def _with_old(learner: Learner, micro: MicroBatch) -> MicroBatch:
    return replace(micro, old_logprobs=learner.log_probs(micro).logprobs)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("recorded")
    _record(root / "trajectories")
    return str(write_model(root / "model")), str(root)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_gang_killed_in_a_step_and_resumed_has_the_weights_and_moments_of_one_that_was_not(recorded, world_size):
    model, root = recorded
    folder = Path(root, f"gang{world_size}")
    whole, parts = f"whole{world_size}", f"parts{world_size}"
    told = run_gang(world_size, _learn, model, root, whole, None, folder=folder / "a")
    with pytest.raises(AssertionError, match="died"):
        run_gang(world_size, _learn, model, root, parts, KILLED_IN, folder=folder / "b")
    assert newest(Path(root, parts)).name == f"global_step_{KILLED_IN - 1}"
    again = run_gang(world_size, _learn, model, root, parts, None, folder=folder / "c")

    for rank in range(world_size):
        assert again[rank] == [line for line in told[rank] if line["step"] >= KILLED_IN]
        assert all(not line.get("skipped") for line in told[rank])
    final, other, before = (
        read_checkpoint(Path(root, run, f"global_step_{step}", "actor"))
        for run, step in ((whole, STEPS), (parts, STEPS), (whole, KILLED_IN - 1))
    )
    assert {name.rpartition(".")[2] for name in final} == {"weight", "exp_avg", "exp_avg_sq"}
    assert final.keys() == other.keys()
    for name, tensor in final.items():
        assert torch.equal(tensor, other[name]), name
        assert not torch.equal(tensor, before[name]), f"{name} did not change after the kill"
