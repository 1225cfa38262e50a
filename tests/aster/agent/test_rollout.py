from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from importlib import metadata

import numpy as np
import pytest
from clock import Clock

from aster.agent import rollout
from aster.agent.chat import ChatRenderer
from aster.agent.rollout import AgentLoop, Generation, run_episode, turn_seed
from aster.config import ToolConfig
from aster.errors import BackPressure, ConfigError, DataError, EngineLost, SandboxLost
from aster.types import Budget, Cause, Sampling, Task, ToolOutcome, Trajectory
from serve.schema import CellError, ExecuteResponse, State, Status

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


class TestStream:
    async def test_a_call_is_run_and_its_observation_stands_between_two_sampled_turns(self, thinking) -> None:
        out, engine, sandbox = await episode(thinking, [f"x\n</think>\n\n{call('2+2')}", "so\n</think>\n\n\\boxed{4}"])
        assert (out.engine, out.sandbox) == ("e0", "s-1")
        check_aligned(out)
        assert out.cause is Cause.ANSWERED
        assert out.final_text == "so\n</think>\n\n\\boxed{4}"
        assert sandbox.cells == [("2+2", 30.0, "call-1")]
        assert (len(sandbox.opened), sandbox.closed) == (1, 1)
        delta = thinking.observation_delta("4\n")
        assert out.ids[~out.mask].tolist() == delta.tolist()
        second = engine.asked[1]["ids"]
        assert second.tolist() == [*out.prompt_ids, *out.ids[: len(second) - len(out.prompt_ids)]]
        conversation, mask = thinking.conversation(
            [
                USER,
                {"role": "assistant", "content": f"x\n</think>\n\n{call('2+2')}"},
                {"role": "tool", "content": "4\n"},
                {"role": "assistant", "content": "so\n</think>\n\n\\boxed{4}"},
            ]
        )
        assert [*out.prompt_ids, *out.ids] == conversation.tolist()
        assert out.mask.tolist() == mask[len(out.prompt_ids) :].tolist()

    async def test_a_trajectory_without_a_call_never_opens_a_session(self, hybrid) -> None:
        out, _, sandbox = await episode(hybrid, ["\\boxed{4}"])
        assert (out.cause, sandbox.opened, sandbox.closed) == (Cause.ANSWERED, [], 0)

    async def test_every_turn_has_its_own_seed_and_request(self, hybrid) -> None:
        _, engine, _ = await episode(hybrid, [call("1"), call("2"), "done"])
        assert [a["seed"] for a in engine.asked] == [turn_seed(5, 0), turn_seed(5, 1), turn_seed(5, 2)]
        assert len({a["seed"] for a in engine.asked}) == 3
        assert [a["request_id"] for a in engine.asked] == [f"run/train/0/row/0/0/{i}" for i in range(3)]
        assert all(0 <= a["seed"] < 1 << 63 for a in engine.asked)

    async def test_a_turn_that_ends_with_another_stop_token_is_final(self, hybrid) -> None:
        class EndOfText(ScriptedEngine):
            async def __call__(self, ids, **kw) -> Generation:
                out = await super().__call__(ids, **kw)
                out.ids[-1] = self.renderer.pad_id
                return out

        out, _, sandbox = await episode(hybrid, [], engine=EndOfText(hybrid, [call("1")]))
        assert (out.cause, sandbox.cells, out.final_text) == (Cause.ANSWERED, [], "")


class TestBudgets:
    async def test_the_response_budget_is_exact_to_the_token(self, hybrid) -> None:
        answer = "one two three \\boxed{4}"
        exact = len(hybrid._tokenizer.encode_turn(answer)) + 1
        for budget, cause in ((exact, Cause.ANSWERED), (exact - 1, Cause.MAX_TOKENS)):
            out, _, _ = await episode(hybrid, [answer], task=a_task(replace(BUDGET, max_response_tokens=budget)))
            assert (out.cause, len(out.ids)) == (cause, min(exact, budget))

    async def test_an_observation_leaves_room_for_one_token_or_ends_the_trajectory(self, hybrid) -> None:
        first = len(hybrid._tokenizer.encode_turn(call("1"))) + 1
        delta = len(hybrid.observation_delta("4\n"))
        task = a_task(replace(BUDGET, max_response_tokens=first + delta + 1))
        out, engine, _ = await episode(hybrid, [call("1"), "later"], task=task)
        assert (out.cause, engine.asked[1]["max_tokens"], len(out.ids)) == (Cause.MAX_TOKENS, 1, first + delta + 1)
        task = a_task(replace(BUDGET, max_response_tokens=first + delta))
        out, engine, sandbox = await episode(hybrid, [call("1"), "later"], task=task)
        check_aligned(out)
        assert (out.cause, len(out.ids), len(engine.asked)) == (Cause.OBSERVATION_OVERFLOW, first, 1)
        assert out.turns[-1].call is not None
        assert (out.turns[-1].call.observation, sandbox.closed) == ("4\n", 1)

    async def test_exactly_so_many_calls_and_then_one_final_generation(self, hybrid) -> None:
        out, engine, sandbox = await episode(hybrid, [call("1"), call("2"), call("3"), "the end"])
        assert (out.cause, len(sandbox.cells), len(engine.asked)) == (Cause.ANSWERED, 3, 4)
        out, engine, sandbox = await episode(hybrid, [call(str(i)) for i in range(9)])
        assert (out.cause, len(sandbox.cells), len(engine.asked)) == (Cause.MAX_TOOL_CALLS, 3, 4)
        assert len(out.calls) == 3
        assert out.turns[-1].call is None

    async def test_malformed_calls_count_too(self, hybrid) -> None:
        out, engine, sandbox = await episode(hybrid, ["<tool_call>{"] * 9)
        assert (out.cause, len(engine.asked), sandbox.opened) == (Cause.MAX_TOOL_CALLS, 4, [])

    async def test_a_turn_is_limited_by_max_turn_tokens(self, hybrid) -> None:
        task = a_task(replace(BUDGET, max_turn_tokens=4))
        out, _, _ = await episode(hybrid, ["one two three four five"], task=task)
        assert (out.cause, len(out.ids), out.turns[0].finish_reason) == (Cause.MAX_TOKENS, 4, "length")

    async def test_a_prompt_over_budget_is_an_error_that_names_the_row(self, hybrid) -> None:
        with pytest.raises(
            DataError, match=r"row 'row': the prompt has \d+ tokens, more than budget.max_prompt_tokens=5"
        ):
            await episode(hybrid, [], task=a_task(replace(BUDGET, max_prompt_tokens=5)))

    @pytest.mark.parametrize(
        ("more", "logprob", "said"), [(1, 0.0, "2001 ids"), (-2000, 0.0, ": 0 ids"), (0, np.nan, "finite: 0")]
    )
    async def test_a_malformed_answer_is_the_engine_s_failure(self, hybrid, more, logprob, said) -> None:
        async def broken(ids, *, max_tokens, **kw) -> Generation:
            n = max_tokens + more
            return Generation(np.zeros(n, np.int32), np.full(n, logprob, np.float32), np.zeros(n, np.int32), "stop")

        out, _, _ = await episode(hybrid, [], engine=broken)
        assert (out.cause, out.turns) == (Cause.ENGINE_LOST, ())
        assert "malformed answer" in out.error
        assert said in out.error


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


class TestNoTools:
    @pytest.mark.parametrize("how", ["task", "config"])
    async def test_the_prompt_is_without_tools_and_a_call_gets_an_error(self, hybrid, how: str) -> None:
        task = a_task(tools_enabled=how != "task")
        tool = ToolConfig(enabled=how != "config")
        out, _, sandbox = await episode(hybrid, [call("1"), "done"], task=task, tool=tool)
        assert out.prompt_ids.tolist() == hybrid.prompt_ids([USER], tools_enabled=False).tolist()
        assert out.calls[0].observation == "Error when executing tool: there are no tools in this conversation"
        assert (out.cause, sandbox.opened) == (Cause.ANSWERED, [])

    async def test_a_single_turn_agent_generates_once(self, hybrid) -> None:
        out, engine, sandbox = await episode(hybrid, [call("1"), "x"], task=a_task(agent_name="single_turn_agent"))
        assert (out.cause, len(engine.asked), sandbox.opened) == (Cause.ANSWERED, 1, [])
        assert "code_interpreter" not in hybrid.decode(out.prompt_ids)

    async def test_a_code_agent_without_a_sandbox_is_refused(self, hybrid) -> None:
        with pytest.raises(ConfigError, match="there is no sandbox"):
            await run_episode(
                a_task(), generate=ScriptedEngine(hybrid, []), sandboxes=None, renderer=hybrid, tool=ToolConfig()
            )


class TestRegistry:
    async def test_an_unknown_agent_is_refused_with_the_known_ones(self, hybrid) -> None:
        with pytest.raises(ConfigError, match=r"'coder' names no agent loop; there are: code_agent, single_turn_agent"):
            await episode(hybrid, [], task=a_task(agent_name="coder"))

    async def test_another_package_adds_a_loop_by_entry_point(self, hybrid, monkeypatch) -> None:
        async def twice(episode) -> Cause:
            await episode.generate()
            await episode.generate()
            return Cause.ANSWERED

        monkeypatch.setattr(rollout, "_twice", AgentLoop(twice), raising=False)
        point = metadata.EntryPoint("twice", "aster.agent.rollout:_twice", rollout.ENTRY_POINTS)
        monkeypatch.setattr(metadata, "entry_points", lambda group: metadata.EntryPoints([point]))
        out, engine, _ = await episode(hybrid, ["a", "b"], task=a_task(agent_name="twice"))
        assert (out.cause, len(engine.asked)) == (Cause.ANSWERED, 2)


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
