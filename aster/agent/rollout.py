"""One trajectory from its task to its record: which agent loop runs, and what becomes of what goes wrong.

A loop is a short coroutine over an `Episode`, with its tools. Another package adds one through the entry point group
`aster.agent_loops`; a data row chooses by `agent_name`. A loop may name its reward; computing it is `rewards.py`'s.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from importlib import metadata

from aster.agent.chat import ChatRenderer
from aster.agent.episode import Aborted, Episode, Generate, Generation, turn_seed
from aster.agent.grammar import ToolGrammar
from aster.agent.recall import Journal, KeptEpisode, PastDiffers
from aster.agent.tools import PythonTool, Tool
from aster.config import ToolConfig
from aster.errors import ConfigError, EngineLost, SandboxError
from aster.roles import SandboxFactory
from aster.types import Cause, Task, ToolOutcome, Trajectory

__all__ = ["AgentLoop", "Generate", "Generation", "agent_loop", "run_episode", "turn_seed"]

log = logging.getLogger(__name__)

ENTRY_POINTS = "aster.agent_loops"


@dataclass(frozen=True)
class AgentLoop:
    """How a trajectory goes on, turn by turn, until a cause, and with which tools; their schemas go into its prompt."""

    run: Callable[[Episode], Awaitable[Cause]]
    tools: tuple[Tool, ...] = (PythonTool(),)
    grammar: ToolGrammar | None = None
    """How calls are written; None = as our renderer reads them (Hermes)."""
    reward: str = ""
    """A name of the entry point group `aster.rewards`; "" = what the recipe says (algo.reward)."""
    branches: bool = False
    """`run` keeps all its state in the episode: started on one that has turns already, it goes on behind them. Needed
    for `rollout.tree_turns`."""


async def code_agent(episode: Episode) -> Cause:
    """Think, call, read, think again. Exactly `max_tool_calls` calls, then one final generation."""
    while True:
        turn = await episode.generate()
        if turn.finish_reason == "length":
            return Cause.MAX_TOKENS
        parsed = episode.parse(turn)
        if not parsed.attempted:
            return Cause.ANSWERED
        if episode.calls_left <= 0:
            return Cause.MAX_TOOL_CALLS
        calls = await episode.answer(parsed)
        if episode.tool.on_malformed == "end" and any(call.outcome is ToolOutcome.FORMAT_ERROR for call in calls):
            return Cause.MALFORMED_END
        if not episode.observe(calls):
            return Cause.OBSERVATION_OVERFLOW


async def single_turn_agent(episode: Episode) -> Cause:
    """One generation is the whole trajectory, whatever it contains."""
    turn = await episode.generate()
    return Cause.MAX_TOKENS if turn.finish_reason == "length" else Cause.ANSWERED


AGENT_LOOPS = {
    "code_agent": AgentLoop(code_agent, branches=True),
    "single_turn_agent": AgentLoop(single_turn_agent, tools=(), branches=True),
}


def agent_loop(name: str) -> AgentLoop:
    """A loop of ours or of an installed package. Raises ConfigError with the names that exist."""
    return AGENT_LOOPS[name] if name in AGENT_LOOPS else _installed(name)


@functools.cache
def _installed(name: str) -> AgentLoop:
    others = metadata.entry_points(group=ENTRY_POINTS)
    if name not in others.names:
        known = ", ".join(sorted({*AGENT_LOOPS, *others.names}))
        raise ConfigError(f"agent_name {name!r} names no agent loop; there are: {known} (more: group {ENTRY_POINTS!r})")
    loop = others[name].load()
    if not isinstance(loop, AgentLoop):
        raise ConfigError(f"entry point {name!r} of {ENTRY_POINTS!r} must be an AgentLoop, got {type(loop).__name__}")
    return loop


async def run_episode(
    task: Task,
    *,
    generate: Generate,
    sandboxes: SandboxFactory | None,
    renderer: ChatRenderer,
    tool: ToolConfig,
    engine: str = "",
    journal: Journal | None = None,
) -> Trajectory:
    """Run one trajectory, from `task.past` on where there is one. The session opens at the first call and is closed
    whatever happens. Finished turns go to `journal`.

    A failure of ours is no exception but a trajectory with that cause and what was finished before it; so is
    cancelling this coroutine (CANCELLED). Raises DataError or ConfigError for a task that can never run, and whatever a
    loop or a tool raises that names no failure of ours: a bug.
    """
    prepare = functools.partial(
        prepared,
        generate=generate,
        sandboxes=sandboxes,
        renderer=renderer,
        tool=tool,
        engine=engine,
        journal=journal,
        deadline=asyncio.get_running_loop().time() + task.budget.trajectory_timeout_s,  # of both, if it begins afresh
    )
    try:
        return await ended(*prepare(task))
    except PastDiffers as error:
        log.warning("%s starts afresh: %s", task.uid, error)
        return replace(await ended(*prepare(replace(task, past=None))), began_afresh=True)


def prepared(
    task: Task,
    *,
    generate: Generate,
    sandboxes: SandboxFactory | None,
    renderer: ChatRenderer,
    tool: ToolConfig,
    engine: str,
    journal: Journal | None = None,
    deadline: float | None = None,
) -> tuple[AgentLoop, KeptEpisode]:
    """The task's loop, and an episode with its prompt and its tools; `deadline`: see `Episode`."""
    loop = agent_loop(task.agent_name)
    tools = loop.tools if task.tools_enabled and tool.enabled else ()
    if sandboxes is None and any(t.needs_sandbox for t in tools):
        raise ConfigError(
            f"agent {task.agent_name!r} runs code, but there is no sandbox: set tool.enabled=false or add one"
        )
    return loop, KeptEpisode(
        task,
        generate=generate,
        sandboxes=sandboxes,
        renderer=renderer.for_tools([t.schema for t in tools], grammar=loop.grammar) if tools else renderer,
        tool=tool,
        engine=engine,
        tools=tools,
        journal=journal,
        deadline=deadline,
    )


async def ended(loop: AgentLoop, episode: KeptEpisode) -> Trajectory:
    """Run the loop to its cause, and close the session whatever happens."""
    error = ""
    try:
        cause = await loop.run(episode)
        episode.finish_turn()
    except EngineLost as lost:
        cause, error = Cause.ENGINE_LOST, str(lost)
    except SandboxError as lost:
        cause, error = Cause.SANDBOX_LOST, str(lost)
    except Aborted:
        cause, error = Cause.CANCELLED, "the engine aborted the request"
    except asyncio.CancelledError:
        cause, error = Cause.CANCELLED, "cancelled"
        take_back_cancellation()
    finally:
        await episode.close()
    return episode.trajectory(cause, error)


def take_back_cancellation() -> None:
    """The cancellation is answered by returning the partial trajectory, so the task is no longer being cancelled."""
    task = asyncio.current_task()
    if task is not None:
        task.uncancel()
