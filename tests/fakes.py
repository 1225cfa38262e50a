"""Roles without Ray: a pool that answers by rule, learners that count. Ten lines each, real records throughout."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import numpy as np

from aster.types import (
    Budget,
    Cause,
    MicroBatch,
    OptimStats,
    PromptRow,
    PublishReport,
    RolloutWork,
    Sampling,
    StepStats,
    TokenScores,
    Trajectory,
    TrajectoryGroup,
    Turn,
    Verdicts,
)

REWARDS = (1.0, 0.0)


def row(index: int, source: str = "fake") -> PromptRow:
    return PromptRow(f"row-{index}", ({"role": "user", "content": f"problem {index}"},), str(index), source)


def work(of: PromptRow) -> RolloutWork:
    """Two samples of one row, as step 1 would ask for them."""
    return RolloutWork(row=of, group_size=2, budget=Budget(8, 8, 1), sampling=Sampling(), step=1, seed=0)


def trajectory(
    work: RolloutWork, sample: int, *, version: int, reward: float | None, cause: Cause = Cause.ANSWERED
) -> Trajectory:
    """Three prompt ids; two model tokens, one observation token, one model token."""
    done = Trajectory(
        uid=f"{work.kind}/{work.step}/{work.row.row_id}/{sample}",
        row_id=work.row.row_id,
        sample=sample,
        prompt_ids=np.array([1, 2, 3], np.int32),
        ids=np.array([4, 5, 6, 7], np.int32),
        mask=np.array([True, True, False, True]),
        behaviour_logprobs=np.array([-0.5, -0.25, 0.0, -1.0], np.float32),
        versions=np.array([version, version, -1, version], np.int32),
        turns=(Turn(0, 2, "stop", 0.0, 0.1), Turn(3, 4, "stop", 0.2, 0.3)),
        cause=cause,
        final_text="answer",
    )
    return done if reward is None else done.with_reward(reward, Verdicts(bool(reward), bool(reward), "answer"))


class FakePool:
    """Answers each submitted prompt at once; sample i of a group earns `reward(row, i)`, None = lost by us."""

    def __init__(
        self, events: list[str], reward: Callable[[PromptRow, int], float | None] = lambda _, i: REWARDS[i % 2]
    ):
        self.events = events
        self.reward = reward
        self.version = -1
        self.submitted: list[RolloutWork] = []
        self.queue: asyncio.Queue[tuple[RolloutWork, int]] = asyncio.Queue()

    def submit(self, work: RolloutWork) -> None:
        self.events.append(f"submit {work.kind} {work.row.row_id} at v{self.version}")
        self.submitted.append(work)
        self.queue.put_nowait((work, self.version))

    async def groups(self) -> AsyncIterator[TrajectoryGroup]:
        while True:
            work, version = await asyncio.wait_for(self.queue.get(), timeout=60)
            lost, rewards = Cause.SANDBOX_LOST, [self.reward(work.row, i) for i in range(work.group_size)]
            members = tuple(
                trajectory(work, i, version=version, reward=r, cause=lost if r is None else Cause.ANSWERED)
                for i, r in enumerate(rewards)
            )
            yield TrajectoryGroup(work.row, work.step, members, work.kind, place=work.place)

    async def publish(self, source: object, version: int) -> PublishReport:
        self.events.append(f"publish v{version}")
        self.version = version
        return PublishReport(version, bytes=10, seconds=0.0, engines=1, canary_max_diff=0.0)

    async def drain(self) -> list[Trajectory]:
        return []

    async def close(self) -> None: ...


class FakeLearners:
    """Accepts everything, records the denominators, and can be saved: its state is a count of updates."""

    def __init__(self, events: list[str], dp_size: int = 1) -> None:
        self.events = events
        self.dp_size = dp_size
        self.updates = 0
        self.denominators: list[tuple[int, int]] = []
        self.advantages: list[np.ndarray] = []

    async def log_probs(
        self, microbatch_per_rank: Sequence[MicroBatch], *, reference: bool = False
    ) -> list[TokenScores]:
        assert len(microbatch_per_rank) == self.dp_size
        self.events.append("reference" if reference else "log_probs")
        return [
            TokenScores(np.where(m.loss_mask, m.behaviour_logprobs, 0).astype(np.float32), np.ones(len(m.labels)))
            for m in microbatch_per_rank
        ]

    async def forward_backward(
        self, microbatch_per_rank: Sequence[MicroBatch], *, num_loss_tokens: int, num_groups: int
    ) -> StepStats:
        self.events.append("forward_backward")
        self.denominators.append((num_loss_tokens, num_groups))
        self.advantages += [m.advantages[m.loss_mask] for m in microbatch_per_rank]
        return StepStats(tokens=sum(int(m.loss_mask.sum()) for m in microbatch_per_rank))

    async def optim_step(self) -> OptimStats:
        self.events.append("optim_step")
        self.updates += 1
        return OptimStats(grad_norm=1.0, lr=1e-6, skipped=False)

    def weight_source(self) -> object:
        return self

    async def save(self, path: str) -> None:
        Path(path).mkdir(parents=True)
        (Path(path) / "updates").write_text(str(self.updates))

    async def saved(self) -> None: ...

    async def load(self, path: str) -> int:
        self.updates = int((Path(path) / "updates").read_text())
        return self.updates


class MemoryLog:
    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.events: list[tuple[int, str, str]] = []

    def log(self, step: int, values: dict[str, float]) -> None:
        self.lines.append((step, dict(values)))

    def event(self, step: int, kind: str, message: str) -> None:
        self.events.append((step, kind, message))


__all__ = ["FakeLearners", "FakePool", "MemoryLog", "Sampling", "row", "trajectory", "work"]
