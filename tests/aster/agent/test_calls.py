"""Calls that are malformed, foreign or several in one turn."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scripted import (
    BUDGET,
    ScriptedSandbox,
    a_task,
    call,
    check_aligned,
    episode,
)

from aster.config import ToolConfig
from aster.types import Cause, ToolOutcome
from serve.schema import ExecuteResponse, Status


class TestFormatErrors:
    @pytest.mark.parametrize(
        ("turn", "reason"),
        [
            ("<tool_call>{</tool_call>", "the call is not valid JSON: "),
            ("<tool_call>\n{}", "<tool_call> is not closed by </tool_call>"),
            ("<tool_call>[1]</tool_call>", "the call must be a JSON object with name and arguments, got a list"),
            ('<tool_call>{"name": "code_interpreter"}</tool_call>', "the call has no 'arguments'"),
            (
                '<tool_call>{"name": "bash", "arguments": {}}</tool_call>',
                "unknown tool 'bash'; the tools are: code_interpreter",
            ),
            (
                '<tool_call>{"name": "code_interpreter", "arguments": "1"}</tool_call>',
                "arguments must be a JSON object with code, got a string",
            ),
            ('<tool_call>{"name": "code_interpreter", "arguments": {}}</tool_call>', "missing argument 'code'"),
            (
                '<tool_call>{"name": "code_interpreter", "arguments": {"code": "1", "timeout": 999}}</tool_call>',
                "unknown argument 'timeout'; code_interpreter takes only: code",
            ),
            (
                '<tool_call>{"name": "code_interpreter", "arguments": {"code": 1}}</tool_call>',
                "argument 'code' must be a string, got a number",
            ),
            (
                '<tool_call>{"name": "code_interpreter", "arguments": {"code": "\\ud800"}}</tool_call>',
                "argument 'code' is not valid Unicode",
            ),
            (f"<tool_call>{'[' * 500}", "<tool_call> is not closed by </tool_call>"),
            ('<tool_call>{"name": 1e5, "arguments": {}}</tool_call>', "unknown tool 100000.0"),
        ],
    )
    async def test_the_model_hears_why_and_goes_on(self, hybrid, turn: str, reason: str) -> None:
        out, engine, sandbox = await episode(hybrid, [turn, "done"])
        [made] = out.calls
        assert made.observation.startswith(f"Error when executing tool: {reason}")
        assert (made.outcome, made.status, sandbox.opened) == (ToolOutcome.FORMAT_ERROR, "format_error", [])
        assert (out.cause, len(engine.asked)) == (Cause.ANSWERED, 2)

    @pytest.mark.parametrize("inner", ["[" * 100_000, '{"name": ' + "1" * 5000 + ', "arguments": {}}'])
    def test_json_that_breaks_the_parser_is_malformed(self, inner: str) -> None:
        from aster.agent.grammar import HermesGrammar

        parsed = HermesGrammar().parse(f"<tool_call>{inner}</tool_call>")
        assert not parsed.calls
        assert parsed.malformed[0].startswith("the call is not readable JSON: ")

    async def test_option_end_stops_there_with_its_own_cause(self, hybrid) -> None:
        out, engine, _ = await episode(hybrid, ["<tool_call>{</tool_call>", "x"], tool=ToolConfig(on_malformed="end"))
        check_aligned(out)
        assert (out.cause, len(engine.asked), out.mask.all()) == (Cause.MALFORMED_END, 1, True)
        assert out.turns[0].call is not None
        assert out.turns[0].call.outcome is ToolOutcome.FORMAT_ERROR

    async def test_a_readable_call_after_an_unreadable_one_runs(self, hybrid) -> None:
        out, _, sandbox = await episode(hybrid, [f"<tool_call>{{</tool_call>{call('7')}", "done"])
        assert [cell[0] for cell in sandbox.cells] == ["7"]
        assert out.calls[0].extra_calls_dropped == 1

    async def test_calls_inside_a_thought_count(self, thinking) -> None:
        _, _, sandbox = await episode(thinking, [f"let me {call('1')}\n</think>\n\nhm", "x\n</think>\n\ndone"])
        assert len(sandbox.cells) == 1


class TestSeveralCalls:
    async def test_extra_calls_are_not_run_counted_and_told(self, hybrid) -> None:
        out, _, sandbox = await episode(hybrid, [call("1") + call("2") + call("3"), "done"])
        assert [cell[0] for cell in sandbox.cells] == ["1"]
        assert out.calls[0].extra_calls_dropped == 2
        told = "Error when executing tool: only the first call of a turn can run; 2 more in this turn not executed"
        assert out.ids[~out.mask].tolist() == hybrid.observation_delta("4\n", told).tolist()
        assert out.calls[0].observation == "4\n"

    async def test_with_the_option_they_run_in_order_up_to_the_limit(self, hybrid) -> None:
        sandbox = ScriptedSandbox(lambda code: ExecuteResponse(status=Status.OK, text=code))
        tool = ToolConfig(max_calls_per_turn=8)
        out, _, _ = await episode(
            hybrid, [call("1") + call("2"), call("3") + call("4"), "done"], sandbox=sandbox, tool=tool
        )
        assert [(c[0], c[2]) for c in sandbox.cells] == [("1", "call-1"), ("2", "call-2"), ("3", "call-3")]
        assert [c.observation for c in out.calls] == ["1", "2", "3"]
        assert [c.extra_calls_dropped for c in out.calls] == [0, 0, 1]
        assert out.turns[0].further_calls == (out.calls[1],)
        first = hybrid.observation_delta("1", "2")
        observed = out.ids[out.turns[0].stop : out.turns[1].start]
        assert observed.tolist() == first.tolist()

    async def test_with_the_option_an_unreadable_one_among_them_is_told_its_own_reason(self, hybrid) -> None:
        tool = ToolConfig(max_calls_per_turn=8)
        out, _, sandbox = await episode(
            hybrid, ["<tool_call>[]</tool_call>" + call("1") + "<tool_call>", "x"], tool=tool
        )
        assert [cell[0] for cell in sandbox.cells] == ["1"]
        wrong = "Error when executing tool: "
        assert [c.observation for c in out.calls] == [
            "4\n",
            f"{wrong}the call must be a JSON object with name and arguments, got a list",
            f"{wrong}<tool_call> is not closed by </tool_call>",
        ]
        assert [c.extra_calls_dropped for c in out.calls] == [0, 0, 0]
        assert out.ids[~out.mask].tolist() == hybrid.observation_delta(*(c.observation for c in out.calls)).tolist()
        task = a_task(replace(BUDGET, max_tool_calls=2))
        out, _, _ = await episode(
            hybrid, ["<tool_call>[]</tool_call>" + call("1") + "<tool_call>", "x"], tool=tool, task=task
        )
        assert [c.extra_calls_dropped for c in out.calls] == [0, 1]
