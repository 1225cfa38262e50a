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
import logging
from collections.abc import Callable, Sequence

from aster.data.prompts import user_message
from aster.data.tasks import Problem
from aster.errors import AsterError, BackPressure, DataError, SandboxError, SandboxLost, leaves
from aster.roles import ExecResult, Sandbox, SandboxFactory
from serve.schema import Status

log = logging.getLogger(__name__)

Message = dict[str, str]
Messages = list[Message]

_OURS = frozenset({Status.INFRA_ERROR, Status.SESSION_LOST})


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
    one does not print the answer: then the task itself is wrong. `SandboxLost` when the sandbox failed.
    """
    messages = [{"role": "user", "content": user_message(problem.text)}]
    observation = ""
    for index, (thought, code) in enumerate(problem.plan):
        messages.append({"role": "assistant", "content": tool_turn(_restate(observation) + thought, code)})
        result = await sandbox.execute(code, timeout_s=timeout_s, call_id=f"{problem.row_id}/{index}")
        ended = f"cell {code!r} ended {result.status}: {result.text or result.reason}"
        if result.status in _OURS:
            raise SandboxLost(sandbox.session_id, ended)
        if result.status is not Status.OK:
            raise DataError(f"{problem.row_id}: {ended}")
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

    A full sandbox (`BackPressure`) is waited for, and a lost session has one more try: every cell is run again. Raises
    the first `DataError` or `SandboxError`, the latter also where a conversation takes longer than `deadline_s`.
    """
    room = asyncio.Semaphore(concurrency)

    async def tried(problem: Problem) -> Messages:
        sandbox = await _open(factory, problem.row_id)
        try:
            return await dense_conversation(problem, sandbox, observe=observe, timeout_s=timeout_s)
        finally:
            await sandbox.close()

    async def one(problem: Problem) -> Messages:
        async with room:
            try:
                async with asyncio.timeout(deadline_s):
                    try:
                        return await tried(problem)
                    except SandboxLost as lost:
                        log.warning("%s is run again: %s", problem.row_id, lost)
                        return await tried(problem)
            except TimeoutError:
                raise SandboxError(
                    f"{problem.row_id}: its cells were not done after {deadline_s:g} s: the sandbox is full or too slow"
                ) from None

    failed: list[BaseException] = []
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(problem)) for problem in problems]
    except* AsterError as errors:  # one message, not a tree
        failed += leaves(errors)
    if failed:
        raise failed[0]
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
