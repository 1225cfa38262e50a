"""Trajectories of a teacher for many problems, on disk as they are finished, so that a killed run goes on.

`folder/N.parquet` holds all samples of the problems N * 32 to N * 32 + 31. A file is there or it is not: going on
means making those that are missing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from aster.agent.chat import ChatRenderer
from aster.agent.episode import Generate
from aster.agent.rewards import RewardPool
from aster.agent.rollout import run_episode
from aster.config import ToolConfig
from aster.data.trajectories import write_trajectories_parquet
from aster.errors import AsterError, CircuitOpen, ConfigError, RewardFailed, leaves
from aster.roles import SandboxFactory
from aster.types import Budget, Cause, PromptRow, Sampling, Task, Trajectory, TrajectoryGroup

PROBLEMS_PER_FILE = 32
_ENOUGH_LOST = 8  # the last file may be a single trajectory, and its loss says nothing about the others


async def sample(
    rows: Sequence[PromptRow],
    *,
    engine: Callable[[Sequence[dict[str, str]]], Generate],
    sandboxes: SandboxFactory,
    renderer: ChatRenderer,
    rewards: RewardPool,
    budget: Budget,
    sampling: Sampling,
    tool: ToolConfig,
    folder: Path,
    samples: int = 1,
    concurrency: int = 64,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> int:
    """`samples` trajectories of every row, `concurrency` at a time; returns how many were sampled by this call.

    `engine(messages)` is the engine of one trajectory. What we lose is kept with its cause. CircuitOpen when all of a
    file were lost, and these were many or the whole run: then the endpoint or the sandbox is gone, and going on would
    only write that down.
    """
    if tool.force_first_call:
        raise ConfigError("tool.force_first_call=true: a chat endpoint cannot be made to go on from a call's opening")
    room = asyncio.Semaphore(concurrency)

    async def one(row: PromptRow, number: int) -> Trajectory:
        uid = f"teacher/train/0/{row.row_id}/{number}"
        task = Task(uid, row.row_id, number, row.messages, "code_agent", budget, sampling, seed=seed + number)
        async with room:
            out = await run_episode(
                task, generate=engine(row.messages), sandboxes=sandboxes, renderer=renderer, tool=tool, engine="teacher"
            )
            if out.cause.is_ours:
                return out
            try:
                return out.with_reward(*await rewards.score(out.final_text, row.ground_truth))
            except RewardFailed as error:
                return out.failed(Cause.REWARD_FAILED, str(error))

    files = -(-len(rows) // PROBLEMS_PER_FILE)
    missing = [number for number in range(files) if not (folder / f"{number}.parquet").is_file()]
    made, there = 0, files - len(missing)
    # So many files at once that the slowest trajectory of one holds up no other; `room` serves them in their order.
    window = asyncio.Semaphore(2 + concurrency // (PROBLEMS_PER_FILE * samples))

    async def file(number: int) -> None:
        nonlocal made, there
        part = rows[number * PROBLEMS_PER_FILE : (number + 1) * PROBLEMS_PER_FILE]
        async with asyncio.TaskGroup() as group:
            tasks = [[group.create_task(one(row, n)) for n in range(samples)] for row in part]
        done = [[task.result() for task in of_row] for of_row in tasks]
        lost = [t for of_row in done for t in of_row if t.cause.is_ours]
        if len(lost) == len(part) * samples and (len(lost) >= _ENOUGH_LOST or files == 1):
            raise CircuitOpen(f"all {len(lost)} trajectories of file {number} were lost; the first: {lost[0].error}")
        groups = [TrajectoryGroup(row, number, tuple(of_row)) for row, of_row in zip(part, done, strict=True)]
        write_trajectories_parquet(folder, groups, step=number)
        made += len(part) * samples
        there += 1
        progress(there, files)
        window.release()

    progress(there, files)
    refused: list[BaseException] = []
    try:
        async with asyncio.TaskGroup() as group:
            for number in missing:
                await window.acquire()
                group.create_task(file(number))
    except* AsterError as errors:  # a request that no trajectory could make: one message, not a tree
        refused += leaves(errors)
    if refused:
        raise refused[0]
    return made
