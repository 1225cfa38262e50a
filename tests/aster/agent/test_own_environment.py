"""Somebody else's environment, installed as a package: another tool, another loop, another reward, and no sandbox."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from clock import Clock
from scripted import BUDGET, ScriptedEngine, ScriptedSandbox, a_task, call, episode, ok

from aster.agent import rollout
from aster.agent.chat import ChatRenderer
from aster.agent.rewards import RewardPool
from aster.agent.rollout import agent_loop, run_episode
from aster.config import ToolConfig
from aster.data.templates import TOOLS_TEMPLATE
from aster.errors import EngineLost, RewardFailed
from aster.types import Cause, ToolOutcome, Trajectory

SOURCE = Path(__file__).parents[2] / "examples" / "units"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that holds the example as an installer would leave it: module and entry points out of its wheel."""
    folder = tmp_path_factory.mktemp("units")
    shutil.copytree(SOURCE, folder / "source")
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    subprocess.run([sys.executable, "-c", build], cwd=folder / "source", check=True, capture_output=True, timeout=120)
    (wheel,) = (folder / "source").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


@pytest.fixture
def units(site: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=":")
    rollout._installed.cache_clear()
    return site


def convert(value: object, unit: str, to: str) -> str:
    arguments = {"value": value, "unit": unit, "to": to}
    return f"<tool_call>\n{json.dumps({'name': 'convert', 'arguments': arguments})}\n</tool_call>"


async def in_units(renderer, turns: list[str]) -> tuple[Trajectory, ScriptedEngine]:
    engine = ScriptedEngine(renderer, turns)
    task = a_task(agent_name="units_agent")
    out = await run_episode(task, generate=engine, sandboxes=None, renderer=renderer, tool=ToolConfig())
    return out, engine


async def test_its_tool_is_in_the_prompt_and_answers_without_a_sandbox(units, hybrid) -> None:
    out, engine = await in_units(hybrid, [convert(2, "mile", "kilometre"), "It is \\boxed{3.21869}."])
    prompt = hybrid.decode(out.prompt_ids)
    assert "Converts a length." in prompt
    assert "code_interpreter" not in prompt
    [made] = out.calls
    assert (made.observation, made.outcome, made.tool) == ("3.21869", ToolOutcome.SUCCESS, "convert")
    assert json.loads(made.code) == {"value": 2, "unit": "mile", "to": "kilometre"}
    assert out.ids[~out.mask].tolist() == hybrid.observation_delta("3.21869").tolist()
    assert (out.cause, len(engine.asked)) == (Cause.ANSWERED, 2)


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        (convert("2", "mile", "foot"), "argument 'value' must be a number, got a string"),
        (convert(2, "yard", "foot"), "argument 'unit' must be one of 'metre', 'kilometre', 'mile', 'foot', 'inch'"),
        (call("1"), "unknown tool 'code_interpreter'; the tools are: convert"),
    ],
)
async def test_its_schema_is_checked_and_its_loop_decides_what_a_wrong_call_means(units, hybrid, turn, reason) -> None:
    out, _ = await in_units(hybrid, [turn, "never sampled"])
    assert out.calls[0].observation.startswith(f"Error when executing tool: {reason}")
    assert (out.calls[0].outcome, out.cause, len(out.turns)) == (ToolOutcome.FORMAT_ERROR, Cause.MALFORMED_END, 1)


async def test_what_its_tool_remembers_belongs_to_one_trajectory(units, hybrid) -> None:
    asked = convert(1, "foot", "inch")
    out, _ = await in_units(hybrid, [asked, asked])
    assert [c.observation for c in out.calls] == ["12", "Error when executing tool: this has been answered before"]
    again, _ = await in_units(hybrid, [asked, "done"])
    assert again.calls[0].observation == "12"


async def test_loops_with_different_tools_share_a_renderer_and_do_not_disturb_each_other(units, hybrid) -> None:
    before = hybrid.prompt_ids(a_task().messages).tolist()
    await in_units(hybrid, [convert(1, "foot", "inch"), "done"])
    out, _, sandbox = await episode(hybrid, [call("2+2"), "done"])
    assert out.prompt_ids.tolist() == before
    assert len(sandbox.cells) == 1
    assert agent_loop("units_agent").tools != agent_loop("code_agent").tools


async def test_its_reward_is_computed_in_a_worker_of_the_pool(units) -> None:
    pool = RewardPool(math_verify=False, timeout_s=60)
    try:
        reward = agent_loop("units_agent").reward
        close, verdicts = await pool.score_by(reward, "about 3.22", "3.21869")
        assert (close, verdicts.strict, verdicts.math_verify) == (1.0, None, None)
        assert (await pool.score_by(reward, "about 4", "3.21869"))[0] == 0.0
        with pytest.raises(RewardFailed, match="could not convert string to float"):
            await pool.score_by(reward, "4", "a mile")
        with pytest.raises(RewardFailed, match="no reward 'nicest' in the entry point group"):
            await pool.score_by("nicest", "4", "4")
        assert pool.failures == 2
    finally:
        pool.close()


async def test_a_tool_that_is_too_slow_is_never_the_models_fault(hybrid, monkeypatch) -> None:
    clock = Clock(monkeypatch)

    class Slow:
        needs_sandbox = False
        schema = agent_loop("code_agent").tools[0].schema

        async def run(self, arguments, session):
            clock.move(1000)
            await asyncio.sleep(1000)

    loop = replace(agent_loop("code_agent"), tools=(Slow(),))
    monkeypatch.setitem(rollout.AGENT_LOOPS, "slow", loop)
    task = a_task(replace(BUDGET, trajectory_timeout_s=600), agent_name="slow")
    out, _, sandbox = await episode(hybrid, [call("1")], task=task, sandbox=ScriptedSandbox(ok()))
    assert (out.cause, out.reward, sandbox.opened) == (Cause.SANDBOX_LOST, None, [])
    assert "code_interpreter had not answered" in out.error


class TestForcedFirstCall:
    """`tool.force_first_call`: the opening of a call is given, the call itself is sampled."""

    TOOL = ToolConfig(force_first_call=True)

    def test_the_opening_is_what_the_template_writes_before_a_call(self, hybrid, thinking) -> None:
        assert hybrid.decode(hybrid.call_opening()) == "<tool_call>\n"

    async def test_the_opening_is_in_the_turn_and_in_the_budget_but_not_sampled(self, hybrid) -> None:
        opening = hybrid.call_opening()
        rest = call("2+2").removeprefix("<tool_call>\n")
        out, engine, sandbox = await episode(hybrid, [rest, "\\boxed{4}"], tool=self.TOOL)
        assert engine.asked[0]["ids"].tolist() == [*out.prompt_ids, *opening]
        assert engine.asked[0]["max_tokens"] == 2000 - len(opening)
        assert [cell[0] for cell in sandbox.cells] == ["2+2"]
        n = len(opening)
        assert out.turns[0].start == 0
        assert out.ids[:n].tolist() == opening.tolist()
        assert not out.mask[:n].any()
        assert (out.behaviour_logprobs[:n] == 0).all()
        assert (out.versions[:n] == -1).all()
        assert out.mask[n : out.turns[0].stop].all()
        assert engine.asked[1]["ids"].tolist() == [*out.prompt_ids, *out.ids[: out.turns[1].start]], "once only"
        conversation, mask = hybrid.conversation(
            [
                *a_task().messages,
                {"role": "assistant", "content": call("2+2")},
                {"role": "tool", "content": "4\n"},
                {"role": "assistant", "content": "\\boxed{4}"},
            ]
        )
        assert [*out.prompt_ids, *out.ids] == conversation.tolist(), "the stream is still the template's rendering"
        assert (mask[len(out.prompt_ids) :] & ~out.mask).sum() == n, "and the mask lacks the opening alone"

    async def test_the_budget_is_exact_with_it(self, hybrid) -> None:
        n = len(hybrid.call_opening())
        out, engine, _ = await episode(
            hybrid, ["x " * 50], tool=self.TOOL, task=a_task(replace(BUDGET, max_response_tokens=n + 3))
        )
        assert (out.cause, len(out.ids), engine.asked[0]["max_tokens"]) == (Cause.MAX_TOKENS, n + 3, 3)
        with pytest.raises(ValueError, match=f"begins a response with {n} tokens, and the budget has {n}"):
            await episode(hybrid, [], tool=self.TOOL, task=a_task(replace(BUDGET, max_response_tokens=n)))

    async def test_where_there_are_no_tools_nothing_is_forced(self, hybrid) -> None:
        for more in ({"tools_enabled": False}, {"agent_name": "single_turn_agent"}):
            out, engine, _ = await episode(hybrid, ["4"], tool=self.TOOL, task=a_task(**more))
            assert engine.asked[0]["ids"].tolist() == out.prompt_ids.tolist()
            assert out.mask.all()

    async def test_a_lost_first_turn_leaves_no_opening_behind(self, hybrid) -> None:
        out, _, _ = await episode(hybrid, [EngineLost("gone")], tool=self.TOOL)
        assert (out.cause, len(out.ids), out.turns) == (Cause.ENGINE_LOST, 0, ())

    def test_with_real_templates(self, qwen3_dir, tmp_path) -> None:
        qwen3 = ChatRenderer.from_model_dir(qwen3_dir)
        assert qwen3.call_opening().tolist() == [151657, 198]
        shutil.copytree(qwen3_dir, tmp_path, dirs_exist_ok=True)
        (tmp_path / "chat_template.jinja").write_text(TOOLS_TEMPLATE)
        thinks = ChatRenderer.from_model_dir(tmp_path)
        assert thinks.generation_prompt.endswith("<think>\n")
        assert thinks.decode(thinks.call_opening()) == "\n</think>\n\n<tool_call>\n"
        stream = np.concatenate([thinks.prompt_ids(a_task().messages), thinks.call_opening()])
        rendered = thinks.conversation(
            [*a_task().messages, {"role": "assistant", "content": f"\n</think>\n\n{call('1')}"}]
        )
        assert rendered[0][: len(stream)].tolist() == stream.tolist()
