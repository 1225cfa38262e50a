"""The cold start: every cell really executed, everything correct, and refusal where a cell fails or prints wrongly."""

import asyncio
import contextlib
import io
import json
import random

import pytest

from aster.data.coldstart import (
    dense_conversations,
    describe,
    final_turn,
    head_conversation,
    tool_turn,
)
from aster.data.prompts import user_message
from aster.data.tasks import FAMILIES, Problem, draw_problems
from aster.errors import BackPressure, DataError, SandboxError, SandboxLost
from serve.schema import ExecuteResponse, Status


class InProcess:
    """A stateful session without isolation; counts how many are open at once."""

    def __init__(self, factory, key):
        self.factory, self.session_id, self.names = factory, key, {}

    async def execute(self, code, *, timeout_s, call_id):
        await asyncio.sleep(0)
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                exec(code, self.names)
        except Exception as error:  # the tested code's own failure is data, as in the real session
            return ExecuteResponse(status=Status.ERROR, text=str(error))
        return ExecuteResponse(status=Status.OK, text=printed.getvalue())

    async def close(self):
        self.factory.open_now -= 1


class Factory:
    def __init__(self, full_times=0):
        self.open_now = self.most = self.opened = 0
        self.full_times = full_times

    async def open(self, key):
        if self.full_times:
            self.full_times -= 1
            raise BackPressure(0.0, "test")
        self.opened += 1
        self.open_now += 1
        self.most = max(self.most, self.open_now)
        return InProcess(self, key)


def observe(result):
    return result.text


def broken(*cells, answer="4"):
    return Problem("broken", "A problem.", answer, tuple(("try", c) for c in cells), "")


async def test_a_dense_conversation_carries_its_state_and_ends_in_the_answer():
    problem = FAMILIES["affine"](random.Random(2))
    (messages,) = await dense_conversations([problem], Factory(), observe=observe)
    assert messages[0] == {"role": "user", "content": user_message(problem.text)}
    assert [m["role"] for m in messages] == ["user", *["assistant", "tool"] * 3, "assistant"]
    assert [m["content"] for m in messages if m["role"] == "tool"] == ["28\n", "6\n", "10\n"]
    assert messages[-1]["content"].endswith("\\boxed{10}")


async def test_a_thought_restates_what_the_cell_before_it_printed_never_what_its_own_will():
    problem = FAMILIES["affine"](random.Random(2))
    (messages,) = await dense_conversations([problem], Factory(), observe=observe)
    thoughts = [m["content"].partition("\n</think>")[0] for m in messages if m["role"] == "assistant"]
    plan = [thought for thought, _ in problem.plan]
    assert thoughts == [plan[0], f"28, {plan[1]}", f"6, {plan[2]}", "10, done"]


async def test_conversations_come_back_in_order_and_no_more_sessions_are_open_than_allowed():
    problems = draw_problems(40, seed=0, heldout=False)
    factory = Factory()
    got = await dense_conversations(problems, factory, observe=observe, concurrency=5)
    assert [m[0]["content"] for m in got] == [user_message(p.text) for p in problems]
    assert factory.opened == 40
    assert factory.most <= 5
    assert factory.open_now == 0


async def test_a_full_sandbox_is_waited_for():
    factory = Factory(full_times=3)
    assert len(await dense_conversations(draw_problems(2, seed=0, heldout=False), factory, observe=observe)) == 2


async def test_a_sandbox_that_stays_full_ends_at_the_deadline():
    with pytest.raises(SandboxError, match=r"not done after 0\.05 s: the sandbox is full or too slow"):
        await dense_conversations(
            draw_problems(1, seed=0, heldout=False), Factory(full_times=10**9), observe=observe, deadline_s=0.05
        )


@pytest.mark.parametrize(
    ("problem", "word"),
    [(broken("1/0", "print(4)"), "division by zero"), (broken("x=1", "y=2", "print(5)"), "the answer is 4")],
)
async def test_a_failing_cell_or_a_wrong_last_output_is_refused_and_the_session_closed(problem, word):
    factory = Factory()
    with pytest.raises(DataError, match=word):
        await dense_conversations([problem, *draw_problems(3, seed=0, heldout=False)], factory, observe=observe)
    assert factory.open_now == 0


class Loses(Factory):
    """Its first sessions lose their second cell, so many of them, by a status or by an exception."""

    def __init__(self, times, *, raises):
        super().__init__()
        self.times, self.raises = times, raises

    async def open(self, key):
        session = await super().open(key)
        if self.opened > self.times:
            return session
        execute = session.execute

        async def lost(code, *, timeout_s, call_id):
            if not call_id.endswith("/1"):
                return await execute(code, timeout_s=timeout_s, call_id=call_id)
            if self.raises:
                raise SandboxLost(key, "its node died")
            return ExecuteResponse(status=Status.INFRA_ERROR, reason="its node died")

        session.execute = lost
        return session


@pytest.mark.parametrize("raises", [True, False])
async def test_a_lost_session_has_one_more_try_and_is_never_the_tasks_fault(raises):
    problems = [FAMILIES["affine"](random.Random(2))]
    factory = Loses(1, raises=raises)
    assert await dense_conversations(problems, factory, observe=observe) == await dense_conversations(
        problems, Factory(), observe=observe
    )
    assert (factory.opened, factory.open_now) == (2, 0)
    with pytest.raises(SandboxLost, match="its node died"):
        await dense_conversations(problems, Loses(2, raises=raises), observe=observe)


def test_a_tool_turn_is_canonical_json_between_the_marks():
    turn = tool_turn("add", 'print("é")')
    body = turn.partition("<tool_call>\n")[2].partition("\n</tool_call>")[0]
    assert json.loads(body) == {"name": "code_interpreter", "arguments": {"code": 'print("é")'}}
    assert turn.startswith("add\n</think>\n\n<tool_call>")
    assert final_turn("done", "7") == "done\n</think>\n\n\\boxed{7}"


def test_head_work_makes_no_call():
    conversation = head_conversation(FAMILIES["digits"](random.Random(0)))
    assert [m["role"] for m in conversation] == ["user", "assistant"]
    assert "<tool_call>" not in conversation[1]["content"]


def test_describe_counts_calls():
    call = {"role": "tool", "content": ""}
    assert describe([[call, call], []]) == {"conversations": 2, "with_tool": 1, "calls": 2}
