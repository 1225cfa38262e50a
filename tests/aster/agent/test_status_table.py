"""What the model reads after a call: the table of statuses, and what is cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scripted import (
    BUDGET,
    ScriptedSandbox,
    a_task,
    call,
    episode,
    ok,
)

from aster.config import ToolConfig
from aster.types import Cause
from serve.schema import CellError, ExecuteResponse, State, Status

TIMEOUT = (
    "Execution timeout after 30 seconds. Consider optimizing your code for better performance or reducing "
    "computational complexity."
)
LOST = " The session state was lost: variables must be defined again."
FAILED = "Runtime error occurred during execution."


class TestStatusTable:
    @pytest.mark.parametrize(
        ("response", "text", "bucket", "state_lost"),
        [
            ({"status": "ok", "text": "4\n"}, "4\n", "success", False),
            ({"status": "ok", "text": ""}, "", "success", False),
            ({"status": "ok", "text": "4", "state": "replayed"}, "4", "success", False),
            (
                {"status": "error", "stderr": "ZeroDivisionError", "stdout": "before\n"},
                f"{FAILED}\n\nError details:\nZeroDivisionError\n\nOutput before error:\nbefore\n",
                "runtime_error",
                False,
            ),
            (
                {"status": "error", "error": CellError(name="E", value="v", traceback="Traceback\nE: v")},
                f"{FAILED}\n\nError details:\nTraceback\nE: v",
                "runtime_error",
                False,
            ),
            ({"status": "timeout"}, f"{TIMEOUT} The session state is kept.", "timeout", False),
            ({"status": "timeout", "state": "lost"}, TIMEOUT + LOST, "timeout", True),
            (
                {"status": "timeout", "stderr": "slow"},
                f"{TIMEOUT} The session state is kept.\n\nError output:\nslow",
                "timeout",
                False,
            ),
            (
                {"status": "oom", "state": "lost", "reason": "out of memory"},
                f"{FAILED}{LOST}\n\nError details:\nout of memory",
                "runtime_error",
                True,
            ),
            ({"status": "session_died", "state": "lost"}, FAILED + LOST, "runtime_error", True),
            ({"status": "protocol_error", "state": "lost"}, FAILED + LOST, "unknown_error", True),
            (
                {"status": "output_limit", "text": "head\ntail", "stdout_bytes": 70, "stderr_bytes": 7},
                "head\ntail\n[output truncated: 77 bytes]",
                "runtime_error",
                False,
            ),
        ],
    )
    async def test_what_the_model_reads(self, hybrid, response: dict, text: str, bucket: str, state_lost: bool) -> None:
        sandbox = ScriptedSandbox(lambda code: ExecuteResponse(**response))
        out, _, _ = await episode(hybrid, [call("1"), "done"], sandbox=sandbox)
        [made] = out.calls
        assert (made.observation, made.outcome, made.state_lost) == (text, bucket, state_lost)
        assert made.status == response["status"]
        assert out.ids[~out.mask].tolist() == hybrid.observation_delta(text).tolist()
        assert out.cause is Cause.ANSWERED

    @pytest.mark.parametrize("status", ["infra_error", "session_lost"])
    async def test_what_the_model_never_reads(self, hybrid, status: str) -> None:
        sandbox = ScriptedSandbox(lambda code: ExecuteResponse(status=status, reason="node went away"))
        out, engine, _ = await episode(hybrid, [call("1"), "done"], sandbox=sandbox)
        assert (out.cause, len(engine.asked), out.calls, sandbox.closed) == (Cause.SANDBOX_LOST, 1, (), 1)
        assert out.error == f"sandbox session s-1 lost: {status}: node went away"

    async def test_a_fresh_interpreter_that_was_not_announced_is_announced_once(self, hybrid) -> None:
        answers = iter(
            [
                ExecuteResponse(status=Status.OK, text="1", state=State.LOST),
                ExecuteResponse(status=Status.OK, text="2"),
                ExecuteResponse(status=Status.SESSION_DIED, state=State.LOST),
                ExecuteResponse(status=Status.OK, text="3", state=State.LOST),
            ]
        )
        sandbox = ScriptedSandbox(lambda code: next(answers))
        task = a_task(replace(BUDGET, max_tool_calls=9))
        out, _, _ = await episode(hybrid, [call("1")] * 4 + ["done"], sandbox=sandbox, task=task)
        assert [c.observation for c in out.calls] == [f"1\n{LOST.strip()}", "2", FAILED + LOST, "3"]

    @pytest.mark.parametrize("ended", [Status.OK, Status.ERROR])
    async def test_a_second_loss_behind_a_call_that_came_to_its_end_is_news_again(self, hybrid, ended: Status) -> None:
        answers = iter(
            [
                ExecuteResponse(status=ended, text="1", state=State.LOST),
                ExecuteResponse(status=Status.OK, text="2", state=State.LOST),
                ExecuteResponse(status=Status.SESSION_DIED, state=State.LOST),
                ExecuteResponse(status=Status.OK, text="3", state=State.LOST),
                ExecuteResponse(status=Status.OK, text="4", state=State.LOST),
            ]
        )
        sandbox = ScriptedSandbox(lambda code: next(answers))
        task = a_task(replace(BUDGET, max_tool_calls=9))
        out, _, _ = await episode(hybrid, [call("1")] * 5 + ["done"], sandbox=sandbox, task=task)
        assert [LOST.strip() in c.observation for c in out.calls] == [True, True, True, False, True]
        assert all(c.state_lost for c in out.calls)


class TestCutting:
    @pytest.mark.parametrize(
        ("side", "seen"),
        [
            ("left", "0123456789abcdef...(truncated)"),
            ("right", "(truncated)...456789abcdefghij"),
            ("middle", "01234567...(truncated)...cdefghij"),
        ],
    )
    async def test_characters(self, hybrid, side, seen: str) -> None:
        tool = ToolConfig(max_response_chars=16, truncate_side=side)
        sandbox = ScriptedSandbox(ok("0123456789abcdefghij"))
        out, _, _ = await episode(hybrid, [call("1"), "done"], sandbox=sandbox, tool=tool)
        assert out.calls[0].observation == seen

    @pytest.mark.parametrize("side", ["left", "middle", "right"])
    async def test_tokens(self, hybrid, side) -> None:
        tool = ToolConfig(max_response_tokens=40, truncate_side=side)
        text = "".join(f"é{i}中\n" for i in range(300))
        out, _, _ = await episode(hybrid, [call("1"), "done"], sandbox=ScriptedSandbox(ok(text)), tool=tool)
        seen = out.calls[0].observation
        assert out.cause is Cause.ANSWERED
        assert 30 <= len(hybrid.content_spans(seen)) <= 40
        head, notice, tail = seen.partition("...(truncated)...")
        assert notice
        assert text.startswith(head)
        assert text.endswith(tail)
        assert bool(head) == (side != "right")
        assert bool(tail) == (side != "left")

    async def test_with_the_token_option_an_overflow_is_cut_to_what_fits(self, hybrid) -> None:
        first = len(hybrid._tokenizer.encode_turn(call("1"))) + 1
        frame = len(hybrid.observation_delta(""))
        task = a_task(replace(BUDGET, max_response_tokens=first + frame + 30))
        tool = ToolConfig(max_response_tokens=400)
        sandbox = ScriptedSandbox(ok("9 8 7 " * 100))
        out, engine, _ = await episode(hybrid, [call("1"), "a"], sandbox=sandbox, tool=tool, task=task)
        assert "...(truncated)..." in out.calls[0].observation
        assert 1 <= engine.asked[1]["max_tokens"] <= 4
        assert len(out.ids) <= task.budget.max_response_tokens

    async def test_an_observation_that_fits_is_not_touched(self, hybrid) -> None:
        tool = ToolConfig(max_response_tokens=40, max_response_chars=100)
        out, _, _ = await episode(hybrid, [call("1"), "done"], tool=tool)
        assert out.calls[0].observation == "4\n"
