"""No failure of ours is a wrong answer of the model's."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from clock import Clock
from scripted import (
    BUDGET,
    ScriptedEngine,
    ScriptedSandbox,
    a_task,
    call,
    check_aligned,
    episode,
    ok,
)

from aster.agent.rollout import Generation
from aster.errors import BackPressure, EngineLost, SandboxLost
from aster.types import Cause
from serve.schema import ExecuteResponse, Status


class TestOurFailures:
    async def test_a_lost_engine_keeps_what_was_finished(self, hybrid) -> None:
        out, _, sandbox = await episode(hybrid, [call("1"), EngineLost("engine-0 died")])
        check_aligned(out)
        assert (out.cause, out.error, len(out.turns), sandbox.closed) == (Cause.ENGINE_LOST, "engine-0 died", 1, 1)

    async def test_a_lost_sandbox_is_not_asked_again(self, hybrid) -> None:
        sandbox = ScriptedSandbox(lambda code: SandboxLost("s-1", "replica died"))
        out, _, _ = await episode(hybrid, [call("1")], sandbox=sandbox)
        assert (out.cause, len(sandbox.cells), sandbox.closed) == (Cause.SANDBOX_LOST, 1, 1)

    async def test_back_pressure_is_waited_out_under_the_same_call_id(self, hybrid) -> None:
        answers = iter([BackPressure(0.01, "queue full"), ExecuteResponse(status=Status.OK, text="4")])
        sandbox = ScriptedSandbox(lambda code: next(answers), open_errors=[BackPressure(0.01, "512 sessions")] * 2)
        out, _, _ = await episode(hybrid, [call("1"), "done"], sandbox=sandbox)
        assert (out.cause, len(sandbox.opened)) == (Cause.ANSWERED, 3)
        assert [cell[2] for cell in sandbox.cells] == ["call-1", "call-1"]
        assert out.calls[0].queue_s >= 3 * 0.75 * 0.05
        assert out.timing.queue_s == out.calls[0].queue_s

    async def test_back_pressure_until_the_deadline_is_a_lost_sandbox(self, hybrid) -> None:
        sandbox = ScriptedSandbox(ok(), open_errors=[BackPressure(6000.0, "512 sessions")])
        task = a_task(replace(BUDGET, trajectory_timeout_s=600))
        out, _, _ = await episode(hybrid, [call("1")], sandbox=sandbox, task=task)
        assert out.cause is Cause.SANDBOX_LOST
        assert "the sandbox was full (512 sessions) and the trajectory's time was over" in out.error

    async def test_the_deadline_of_a_trajectory_blames_whom_it_waited_for(self, hybrid, monkeypatch) -> None:
        clock = Clock(monkeypatch)

        async def too_long(*_: object, **__: object) -> ExecuteResponse:
            clock.move(1000)
            await asyncio.sleep(1000)
            raise AssertionError

        task = a_task(replace(BUDGET, trajectory_timeout_s=600))
        out, _, _ = await episode(hybrid, [], engine=too_long, task=task)
        assert (out.cause, "still generating" in out.error) == (Cause.ENGINE_LOST, True)
        sandbox = ScriptedSandbox(too_long)
        out, _, _ = await episode(hybrid, [call("1")], sandbox=sandbox, task=task)
        assert (out.cause, sandbox.closed) == (Cause.SANDBOX_LOST, 1)
        assert "code_interpreter had not answered" in out.error

    async def test_a_time_out_of_their_own_is_told_apart_from_the_deadline(self, hybrid) -> None:
        out, _, _ = await episode(hybrid, [TimeoutError("socket")])
        assert (out.cause, out.error) == (Cause.ENGINE_LOST, "timed out: TimeoutError('socket')")
        sandbox = ScriptedSandbox(lambda code: TimeoutError("socket"))
        out, _, _ = await episode(hybrid, [call("1")], sandbox=sandbox)
        assert (out.cause, out.error) == (
            Cause.SANDBOX_LOST,
            "sandbox session s-1 lost: timed out: TimeoutError('socket')",
        )

    async def test_cancelling_gives_the_partial_trajectory_and_closes_the_session(self, hybrid) -> None:
        started = asyncio.Event()

        async def hang(code: str) -> ExecuteResponse:
            started.set()
            await asyncio.sleep(3600)
            raise AssertionError

        sandbox = ScriptedSandbox(hang)
        running = asyncio.create_task(episode(hybrid, ["x" + call("1")], sandbox=sandbox))
        await asyncio.wait_for(started.wait(), 60)
        running.cancel()
        out, _, _ = await asyncio.wait_for(running, 60)
        check_aligned(out)
        assert (out.cause, len(out.turns), sandbox.closed, out.reward) == (Cause.CANCELLED, 1, 1, None)

    async def test_a_session_that_opens_after_a_cancellation_is_closed_again(self, hybrid) -> None:
        asked, opens, closed = asyncio.Event(), asyncio.Event(), asyncio.Event()

        class Slow(ScriptedSandbox):
            async def open(self, key: str) -> ScriptedSandbox:
                asked.set()
                await opens.wait()
                return self

            async def close(self) -> None:
                closed.set()

        running = asyncio.create_task(episode(hybrid, [call("1")], sandbox=Slow(ok())))
        await asyncio.wait_for(asked.wait(), 60)
        running.cancel()
        assert (await asyncio.wait_for(running, 60))[0].cause is Cause.CANCELLED
        opens.set()
        await asyncio.wait_for(closed.wait(), 60)

    async def test_an_aborted_request_ends_at_the_last_whole_turn(self, hybrid) -> None:
        class Aborting(ScriptedEngine):
            async def __call__(self, ids, **kw) -> Generation:
                out = await super().__call__(ids, **kw)
                return replace(out, finish_reason="abort") if len(self.asked) == 2 else out

        out, _, _ = await episode(hybrid, [], engine=Aborting(hybrid, [call("1"), "half a turn"]))
        check_aligned(out)
        assert (out.cause, len(out.turns), bool(out.mask[-1])) == (Cause.CANCELLED, 1, False)

    async def test_a_bug_is_raised_and_the_session_closed_all_the_same(self, hybrid) -> None:
        sandbox = ScriptedSandbox(ok())
        with pytest.raises(ZeroDivisionError):
            await episode(hybrid, [call("1"), ZeroDivisionError("a bug")], sandbox=sandbox)
        assert sandbox.closed == 1

    async def test_a_session_that_will_not_close_does_not_matter(self, hybrid, caplog) -> None:
        class Stubborn(ScriptedSandbox):
            async def close(self) -> None:
                raise OSError("gone")

        out, _, _ = await episode(hybrid, [call("1"), "done"], sandbox=Stubborn(ok()))
        assert out.cause is Cause.ANSWERED
        assert "was not closed" in caplog.text
