"""One tree of trajectories: a trunk that splits, tokens and session, before some of its turns.

    turn 0                turn 1 (splits)        turn 2 (splits), ...
    ────── leaf 0 ─────┬── leaf 0 ───────────┬── leaf 0
                       │                     └── leaf 1, branch_turn 2, parent: leaf 0
                       └── leaf 2 ───────────┬── leaf 2, branch_turn 1, parent: leaf 0
                                             └── leaf 3, branch_turn 2, parent: leaf 2

What comes home are ordinary trajectories, each with its whole stream and mask: the tokens of a trunk stand in all its
leaves. A path that ends before it splits is all of its leaves, equal but for their names. So each leaf by itself is
distributed as a trajectory that was sampled alone, every mean over leaves estimates what it always did, and a token
that k leaves share is trained k times with the weight 1 / G, as it should be; only its advantage must be one of what
is below it and not of one leaf (`algo.advantages.tree_advantages`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace

from aster.agent.chat import ChatRenderer
from aster.agent.episode import Generate
from aster.agent.recall import KeptEpisode
from aster.agent.rollout import AgentLoop, ended, prepared, take_back_cancellation
from aster.config import ToolConfig
from aster.errors import ConfigError, SandboxError
from aster.roles import SandboxFactory
from aster.types import Cause, Task, Trajectory

log = logging.getLogger(__name__)


async def run_tree(
    task: Task,
    *,
    generate: Generate,
    sandboxes: SandboxFactory | None,
    renderer: ChatRenderer,
    tool: ToolConfig,
    engine: str = "",
) -> tuple[Trajectory, ...]:
    """The trajectories of `task` and its `leaves`, in this order; errors as `rollout.run_episode`.

    A failure of ours costs the leaves below it. Cancelling gives every leaf as far as its path had come.
    """
    tasks = (task, *task.leaves)
    if len(tasks) != task.tree_factor ** len(task.tree_turns):
        raise ConfigError(f"{task.uid}: {len(tasks)} leaves for {task.tree_factor}^{len(task.tree_turns)}")
    loop, trunk = prepared(task, generate=generate, sandboxes=sandboxes, renderer=renderer, tool=tool, engine=engine)
    if not loop.branches:
        raise ConfigError(
            f"rollout.tree_turns={list(task.tree_turns)}: the loop {task.agent_name!r} does not say that it keeps its "
            "state in the episode (AgentLoop.branches)"
        )
    tree = _Tree(loop, tasks)
    tree.grow(trunk, tasks, depth=0)
    await tree.finished()
    return tuple(tree.leaf(index) for index in range(len(tasks)))


class _Tree:
    def __init__(self, loop: AgentLoop, tasks: Sequence[Task]) -> None:
        self._loop = loop
        self._tasks = tasks
        self._turns, self._factor = tasks[0].tree_turns, tasks[0].tree_factor
        self._found: dict[str, Trajectory] = {}  # uid of a leaf -> where its path ended
        self._paths: dict[asyncio.Task[None], tuple[KeptEpisode, Sequence[Task]]] = {}

    def grow(self, episode: KeptEpisode, leaves: Sequence[Task], *, depth: int) -> None:
        path = asyncio.create_task(self._path(episode, leaves, depth), name=leaves[0].uid)
        self._paths[path] = (episode, leaves)

    async def finished(self) -> None:
        """Until no path is growing any more. A bug in one of them is raised when the others have stopped."""
        bug: BaseException | None = None
        while self._paths:
            try:
                done, _ = await asyncio.wait(self._paths, return_when=asyncio.FIRST_COMPLETED)
            except asyncio.CancelledError:  # each path answers it with what it has
                self._stop()
                take_back_cancellation()
                continue
            for path in done:
                episode, leaves = self._paths.pop(path)
                if path.cancelled():  # before its first step
                    await episode.close()
                    self._found |= {t.uid: episode.trajectory(Cause.CANCELLED, "cancelled") for t in leaves}
                elif (error := path.exception()) is not None:
                    bug = bug or error
                    self._stop()
        if bug is not None:
            raise bug

    def leaf(self, index: int) -> Trajectory:
        task, (parent, turn) = self._tasks[index], lineage(index, turns=self._turns, factor=self._factor)
        return replace(
            self._found[task.uid],
            uid=task.uid,
            sample=task.sample,
            parent=None if parent is None else self._tasks[parent].uid,
            branch_turn=turn,
        )

    def _stop(self) -> None:
        for path in self._paths:
            path.cancel()

    async def _path(self, episode: KeptEpisode, leaves: Sequence[Task], depth: int) -> None:
        """From one split to the end of a trajectory, which is that of all leaves that never left it."""
        staying = list(leaves)

        async def split(number: int) -> None:
            nonlocal depth
            if depth == len(self._turns) or number != self._turns[depth]:
                return
            depth += 1
            share = len(staying) // self._factor
            while len(staying) > share:  # who has not left yet ends where a cancelled path ends
                part = staying[-share:]
                try:
                    twin = await episode.fork(part[0])
                except SandboxError as lost:
                    log.warning("%s could not leave %s: %s", part[0].uid, staying[0].uid, lost)
                    here = episode.trajectory(Cause.SANDBOX_LOST, str(lost))
                    self._found |= {task.uid: here for task in part}
                else:
                    self.grow(twin, part, depth=depth)
                del staying[-share:]

        episode.before_turn = split
        trajectory = await ended(self._loop, episode)
        self._found |= {task.uid: trajectory for task in staying}


def lineage(index: int, *, turns: Sequence[int], factor: int) -> tuple[int | None, int | None]:
    """(the leaf that leaf `index` of a tree is a copy of, the turn from which on it is not); None for leaf 0.

    >>> [lineage(i, turns=(1, 2), factor=2) for i in range(4)]
    [(None, None), (0, 2), (0, 1), (2, 2)]
    """
    for level, turn in enumerate(reversed(turns)):
        stride = factor**level
        digit = index // stride % factor
        if digit:
            return index - digit * stride, turn
    return None, None
