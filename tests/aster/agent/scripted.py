"""An engine and a sandbox that follow a script, and one trajectory between them."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import numpy as np

from aster.agent.chat import ChatRenderer
from aster.agent.rollout import Generation, run_episode
from aster.config import ToolConfig
from aster.types import Budget, Sampling, Task, Trajectory
from serve.schema import ExecuteResponse, Status

USER = {"role": "user", "content": "What is 2 + 2?"}


def call(code: str) -> str:
    return f"<tool_call>\n{json.dumps({'name': 'code_interpreter', 'arguments': {'code': code}})}\n</tool_call>"


@dataclass
class ScriptedEngine:
    """Says the given turns, one after another; cuts each at max_tokens as an engine does."""

    renderer: ChatRenderer
    turns: list[str | Exception]
    asked: list[dict] = field(default_factory=list)

    async def __call__(self, ids, *, max_tokens, sampling, stop_token_ids, seed, request_id) -> Generation:
        self.asked.append({"ids": ids.copy(), "max_tokens": max_tokens, "seed": seed, "request_id": request_id})
        turn = self.turns[len(self.asked) - 1]
        if isinstance(turn, Exception):
            raise turn
        tokens = [*self.renderer._tokenizer.encode_turn(turn), stop_token_ids[0]]
        cut = np.array(tokens[:max_tokens], np.int32)
        versions = np.full(len(cut), 7, np.int32)
        reason = "length" if len(tokens) > max_tokens else "stop"
        return Generation(cut, -0.1 * np.arange(1, len(cut) + 1, dtype=np.float32), versions, reason)


@dataclass
class ScriptedSandbox:
    """Answers each cell by rule; counts what is opened, run and closed."""

    answer: Callable[[str], ExecuteResponse | Exception | Awaitable[ExecuteResponse]]
    open_errors: list[Exception] = field(default_factory=list)
    session_id: str = "s-1"
    opened: list[str] = field(default_factory=list)
    cells: list[tuple[str, float, str]] = field(default_factory=list)
    closed: int = 0

    async def open(self, key: str) -> ScriptedSandbox:
        self.opened.append(key)
        if self.open_errors:
            raise self.open_errors.pop(0)
        return self

    async def execute(self, code: str, *, timeout_s: float, call_id: str) -> ExecuteResponse:
        self.cells.append((code, timeout_s, call_id))
        answer = self.answer(code)
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, ExecuteResponse) else await answer

    async def close(self) -> None:
        self.closed += 1


def ok(text: str = "4\n", **more) -> Callable[[str], ExecuteResponse]:
    return lambda code: ExecuteResponse(status=Status.OK, text=text, stdout=text, **more)


BUDGET = Budget(max_prompt_tokens=2000, max_response_tokens=2000, max_tool_calls=3, trajectory_timeout_s=120)


def a_task(budget: Budget = BUDGET, **more) -> Task:
    return Task(
        **{
            "uid": "run/train/0/row/0",
            "row_id": "row",
            "sample": 0,
            "messages": (USER,),
            "agent_name": "code_agent",
            "budget": budget,
            "sampling": Sampling(),
            "seed": 5,
            **more,
        }
    )


async def episode(
    renderer: ChatRenderer,
    turns: list[str | Exception],
    *,
    sandbox: ScriptedSandbox | None = None,
    tool: ToolConfig | None = None,
    task: Task | None = None,
    engine: ScriptedEngine | None = None,
) -> tuple[Trajectory, ScriptedEngine, ScriptedSandbox]:
    engine = engine or ScriptedEngine(renderer, turns)
    sandbox = sandbox or ScriptedSandbox(ok())
    out = await run_episode(
        task or a_task(), generate=engine, sandboxes=sandbox, renderer=renderer, tool=tool or ToolConfig(), engine="e0"
    )
    return out, engine, sandbox


def check_aligned(out: Trajectory) -> None:
    T = len(out.ids)
    assert out.mask.shape == out.behaviour_logprobs.shape == out.versions.shape == (T,)
    assert (out.versions[out.mask] == 7).all()
    assert (out.versions[~out.mask] == -1).all()
    assert (out.behaviour_logprobs[~out.mask] == 0).all()
    sampled = np.zeros(T, bool)
    for turn in out.turns:
        sampled[turn.start : turn.stop] = True
    assert (sampled == out.mask).all()
