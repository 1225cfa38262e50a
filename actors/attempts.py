"""A prompt's way through the pool: its group, the tasks of its samples, and each attempt at one of them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from aster.types import Past, RolloutWork, Task, Trajectory, TrajectoryGroup, trajectory_uid

_STEPS = 64  # no two trajectories of so many steps have the same name; fewer are ever in flight at once


@dataclass
class Group:
    """A prompt whose samples are on their way."""

    work: RolloutWork
    began: int | None = None  # version of the weights when its first trajectory started
    done: dict[int, Trajectory] = field(default_factory=dict)  # sample -> final attempt
    lost: list[Trajectory] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        return len(self.done) == self.work.group_size

    def finished(self) -> TrajectoryGroup:
        members = tuple(self.done[sample] for sample in range(self.work.group_size))
        work = self.work
        return TrajectoryGroup(work.row, work.step, members, work.kind, tuple(self.lost), work.place)


@dataclass(frozen=True)
class Attempt:
    """`task` is one trajectory's, or the first leaf of a tree."""

    group: Group
    task: Task
    avoid: str = ""  # the engine that lost the previous attempt

    @property
    def tasks(self) -> tuple[Task, ...]:
        return (self.task, *self.task.leaves)

    def again(self, *, avoid: str, past: Past | None) -> Attempt:
        """The next attempt, with the same seed; a tree runs again as a whole."""
        leaves = tuple(replace(leaf, attempt=self.task.attempt + 1) for leaf in self.task.leaves)
        task = replace(self.task, attempt=self.task.attempt + 1, leaves=leaves, past=past)
        return Attempt(self.group, task, avoid)


class Draw:
    """The tasks of each prompt. Names and seeds come from the data's place in the run, so a restart samples the
    same."""

    def __init__(self, run_name: str) -> None:
        self._run_name = run_name
        self._seen: dict[int, Counter[str]] = {}  # step -> places; the step that was last asked in comes last

    def attempts(self, group: Group) -> Iterator[Attempt]:
        """The first attempt at each sample, or at each tree of them."""
        work, tasks = group.work, self._tasks(group.work)
        if not work.tree_turns:
            yield from (Attempt(group, task) for task in tasks)
            return
        size = work.tree_factor ** len(work.tree_turns)
        for i in range(0, len(tasks), size):
            leaves = tuple(tasks[i + 1 : i + size])
            tree = replace(tasks[i], leaves=leaves, tree_turns=work.tree_turns, tree_factor=work.tree_factor)
            yield Attempt(group, tree)

    def _tasks(self, work: RolloutWork) -> list[Task]:
        place = f"{work.kind}/{work.step}/{work.row.row_id}"
        seen = self._seen[work.step] = self._seen.pop(work.step, Counter())
        if len(self._seen) > _STEPS:
            del self._seen[next(iter(self._seen))]
        seen[place] += 1
        if seen[place] > 1:  # the same row twice in a step, at the seam of two epochs: request ids must differ
            place = f"{place}~{seen[place]}"
        return [
            Task(
                uid=trajectory_uid(self._run_name, place, sample),
                row_id=work.row.row_id,
                sample=sample,
                messages=work.row.messages,
                agent_name=work.row.agent_name,
                budget=work.budget,
                sampling=work.sampling,
                seed=sample_seed(work.seed, f"{place}/{sample}"),
                tools_enabled=work.tools_enabled,
                past=work.past.get(sample),
            )
            for sample in range(work.group_size)
        ]


def sample_seed(seed: int, place: str) -> int:
    """63 bits from the run's seed and the trajectory's place `kind/step/row_id/sample`; the same for a retry."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{place}".encode(), digest_size=8).digest(), "big") >> 1
