"""Conversations that the cold start shows: the tool habit and the head habit.

The cold start shows two habits on the same kind of problem: *dense* (every step in the stateful tool) and *head* (the
same computation written out in the thought, correct as well). The student can perform only the first; which one to
prefer is left to RL. Every tool output comes from executing the cell in a sandbox session; a conversation counts only
when all its cells succeeded and the last one printed the answer.

Assistant messages are raw turns: what a sampler emits after the generation prompt, without the end-of-turn token.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence

from aster.data.prompts import user_message
from aster.data.tasks import Problem
from aster.errors import BackPressure, DataError
from aster.roles import ExecResult, Sandbox, SandboxFactory
from serve.schema import Status

Message = dict[str, str]
Messages = list[Message]


def tool_turn(thought: str, code: str) -> str:
    """A turn that ends in a call, in canonical form.

    >>> tool_turn("add", "print(1+1)").splitlines()[3:5]
    ['<tool_call>', '{"name": "code_interpreter", "arguments": {"code": "print(1+1)"}}']
    """
    call = json.dumps({"name": "code_interpreter", "arguments": {"code": code}}, ensure_ascii=False)
    return f"{thought}\n</think>\n\n<tool_call>\n{call}\n</tool_call>"


def final_turn(thought: str, answer: str) -> str:
    return f"{thought}\n</think>\n\n\\boxed{{{answer}}}"


def head_conversation(problem: Problem) -> Messages:
    """The head habit: all the work in the thought, no call."""
    return [
        {"role": "user", "content": user_message(problem.text)},
        {"role": "assistant", "content": final_turn(problem.head_work, problem.answer)},
    ]


async def dense_conversation(
    problem: Problem, sandbox: Sandbox, *, observe: Callable[[ExecResult], str], timeout_s: float
) -> Messages:
    """The dense habit: the plan, cell by cell, with what the session really printed.

    `observe` turns a result into the observation that a rollout would show. `DataError` when a cell fails or the last
    one does not print the answer: then the task itself is wrong.
    """
    messages = [{"role": "user", "content": user_message(problem.text)}]
    observation = ""
    for index, (thought, code) in enumerate(problem.plan):
        messages.append({"role": "assistant", "content": tool_turn(_restate(observation) + thought, code)})
        result = await sandbox.execute(code, timeout_s=timeout_s, call_id=f"{problem.row_id}/{index}")
        if result.status is not Status.OK:
            raise DataError(f"{problem.row_id}: cell {code!r} ended {result.status}: {result.text or result.reason}")
        observation = observe(result)
        messages.append({"role": "tool", "content": observation})
    if observation.strip() != problem.answer:
        raise DataError(f"{problem.row_id}: the plan printed {observation!r}, the answer is {problem.answer}")
    messages.append({"role": "assistant", "content": final_turn(f"{_restate(observation)}done", problem.answer)})
    return messages


def _restate(observation: str) -> str:
    """The last output, said again: the thought then depends on what the tool returned."""
    seen = observation.strip()
    return f"{seen}, " if seen else ""


async def dense_conversations(
    problems: Sequence[Problem],
    factory: SandboxFactory,
    *,
    observe: Callable[[ExecResult], str],
    concurrency: int = 16,
    timeout_s: float = 30.0,
    deadline_s: float = 600.0,
) -> list[Messages]:
    """One session per problem, `concurrency` at a time, in the order of `problems`.

    A full sandbox (`BackPressure`) is waited for; `TimeoutError` after `deadline_s` for the whole list.
    """
    room = asyncio.Semaphore(concurrency)

    async def one(problem: Problem) -> Messages:
        async with room:
            sandbox = await _open(factory, problem.row_id)
            try:
                return await dense_conversation(problem, sandbox, observe=observe, timeout_s=timeout_s)
            finally:
                await sandbox.close()

    async with asyncio.timeout(deadline_s):
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(problem)) for problem in problems]
        return [task.result() for task in tasks]


async def _open(factory: SandboxFactory, key: str) -> Sandbox:
    while True:  # ends by the caller's deadline
        try:
            return await factory.open(f"prepare/{key}")
        except BackPressure as full:
            await asyncio.sleep(full.retry_after_s)


def describe(conversations: Sequence[Messages]) -> dict[str, int]:
    """Counts for a report: conversations, those with calls, and calls in all."""
    calls = [sum(m["role"] == "tool" for m in messages) for messages in conversations]
    return {"conversations": len(calls), "with_tool": sum(c > 0 for c in calls), "calls": sum(calls)}
