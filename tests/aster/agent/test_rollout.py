"""One trajectory: its stream of tokens, its budgets, and which loop runs it."""

from __future__ import annotations

from dataclasses import replace
from importlib import metadata

import numpy as np
import pytest
from scripted import (
    BUDGET,
    USER,
    ScriptedEngine,
    a_task,
    call,
    check_aligned,
    episode,
)

from aster.agent import rollout
from aster.agent.rollout import AgentLoop, Generation, run_episode, turn_seed
from aster.config import ToolConfig
from aster.errors import ConfigError, DataError
from aster.types import Cause


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
