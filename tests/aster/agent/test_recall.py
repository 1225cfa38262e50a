"""A killed trajectory goes on from its finished turns: same prefix, nothing sampled twice, its session made again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scripted import BUDGET, ScriptedEngine, ScriptedSandbox, a_task, call, ok
from waiting import until

from aster.agent.rollout import run_episode, turn_seed
from aster.config import ToolConfig
from aster.data.journal import JournalPlace, TurnJournal, read_journal
from aster.types import Cause, Task, Trajectory
from serve.schema import ExecuteResponse, State, Status

TURNS = [call("x = 1"), call("x + 1"), call("x + 2"), "so \\boxed{4}"]


async def run(
    renderer,
    turns: list[str | Exception],
    folder: Path,
    *,
    sandbox: ScriptedSandbox | None = None,
    task: Task | None = None,
    tool: ToolConfig | None = None,
    config: str = "c",
) -> tuple[Trajectory, ScriptedEngine, ScriptedSandbox]:
    engine, sandbox = ScriptedEngine(renderer, turns), sandbox or ScriptedSandbox(echo)
    journal = TurnJournal(JournalPlace(folder, config), engine="e0")
    out = await run_episode(
        task or a_task(),
        generate=engine,
        sandboxes=sandbox,
        renderer=renderer,
        tool=tool or ToolConfig(),
        journal=journal,
    )
    journal.close()
    return out, engine, sandbox


def echo(code: str) -> ExecuteResponse:
    return ExecuteResponse(status=Status.OK, text=f"<{code}>", stdout=f"<{code}>")


def left_in(folder: Path, task: Task | None = None, **more) -> Task:
    """The task again, with what the journal holds of it."""
    task = task or a_task()
    return replace(task, past=read_journal(folder, **{"config_hash": "c", "oldest": 7, "newest": 7} | more)[task.uid])


def same_tokens(one: Trajectory, other: Trajectory) -> None:
    for name in ("prompt_ids", "ids", "mask", "behaviour_logprobs", "versions"):
        a, b = getattr(one, name), getattr(other, name)
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(a, b, err_msg=name)
    assert (one.cause, one.final_text) == (other.cause, other.final_text)
    assert [(t.start, t.stop, t.finish_reason) for t in one.turns] == [
        (t.start, t.stop, t.finish_reason) for t in other.turns
    ]
    assert [(c.code, c.status, c.observation, c.outcome) for c in one.calls] == [
        (c.code, c.status, c.observation, c.outcome) for c in other.calls
    ]


class Silent(ScriptedEngine):
    """Says the given turns, and hangs when it is asked for another."""

    hangs = False

    async def __call__(self, ids, **kw):
        if len(self.asked) == len(self.turns):
            self.hangs = True
            await asyncio.sleep(3600)
        return await super().__call__(ids, **kw)


async def cut_off(
    engine: ScriptedEngine,
    folder: Path,
    *,
    when: Callable[[], bool],
    sandbox: ScriptedSandbox | None = None,
    task: Task | None = None,
    name: str = "e0",
) -> None:
    episode = asyncio.create_task(
        run_episode(
            task or a_task(),
            generate=engine,
            sandboxes=sandbox or ScriptedSandbox(echo),
            renderer=engine.renderer,
            tool=ToolConfig(),
            journal=TurnJournal(JournalPlace(folder, "c"), engine=name),
        )
    )
    await until(when, seconds=60)
    episode.cancel()
    assert (await episode).cause is Cause.CANCELLED


async def killed_in_turn(renderer, number: int, folder: Path, **more) -> None:
    """Run until the engine answers turn `number` no more, and then cut it off."""
    engine = Silent(renderer, TURNS[:number])
    await cut_off(engine, folder, when=lambda: engine.hangs, **more)


@pytest.mark.parametrize("number", [1, 2, 3])
async def test_finished_turns_are_not_generated_again_and_the_next_one_has_its_seed(hybrid, tmp_path, number) -> None:
    whole, _, _ = await run(hybrid, TURNS, tmp_path / "whole")
    await killed_in_turn(hybrid, number, tmp_path / "parts")
    out, engine, sandbox = await run(hybrid, TURNS[number:], tmp_path / "parts", task=left_in(tmp_path / "parts"))
    same_tokens(out, whole)
    assert out.recalled_turns == number
    assert [a["seed"] for a in engine.asked] == [turn_seed(5, n) for n in range(number, 4)]
    first = engine.asked[0]["ids"].tolist()
    assert first == [*whole.prompt_ids, *whole.ids[: len(first) - len(whole.prompt_ids)]]
    cells = [] if number == 3 else ["x = 1", "x + 1", "x + 2"]  # nothing is run again for a session nobody asks for
    assert [(code, call_id) for code, _, call_id in sandbox.cells] == [
        (code, f"call-{i}") for i, code in enumerate(cells, 1)
    ]
    assert sandbox.closed == len(sandbox.opened)


async def test_a_trajectory_that_had_ended_ends_again_without_an_engine(hybrid, tmp_path) -> None:
    whole, _, _ = await run(hybrid, TURNS, tmp_path)
    out, engine, sandbox = await run(hybrid, [], tmp_path, task=left_in(tmp_path))
    same_tokens(out, whole)
    assert (engine.asked, sandbox.opened, out.recalled_turns) == ([], [], 4)


async def test_killed_twice_it_still_goes_on(hybrid, tmp_path) -> None:
    whole, _, _ = await run(hybrid, TURNS, tmp_path / "whole")
    await killed_in_turn(hybrid, 1, tmp_path)
    second = Silent(hybrid, TURNS[1:2])
    await cut_off(second, tmp_path, when=lambda: second.hangs, task=left_in(tmp_path), name="e1")
    out, engine, _ = await run(hybrid, TURNS[2:], tmp_path, task=left_in(tmp_path))
    same_tokens(out, whole)
    assert (out.recalled_turns, len(engine.asked)) == (2, 2)


async def test_a_cell_that_answers_otherwise_lets_the_trajectory_begin_afresh_and_counts(hybrid, tmp_path) -> None:
    await killed_in_turn(hybrid, 2, tmp_path)
    out, engine, sandbox = await run(
        hybrid, [TURNS[2], *TURNS], tmp_path, task=left_in(tmp_path), sandbox=ScriptedSandbox(ok("other"))
    )
    assert (out.cause, out.recalled_turns, out.began_afresh) == (Cause.ANSWERED, 0, True)
    assert [a["seed"] for a in engine.asked] == [turn_seed(5, n) for n in (2, 0, 1, 2, 3)]
    assert [code for code, _, _ in sandbox.cells] == ["x = 1", "x = 1", "x + 1", "x + 2"]
    assert sandbox.closed == len(sandbox.opened) == 2
    again, engine, _ = await run(hybrid, [], tmp_path, task=left_in(tmp_path))
    same_tokens(again, out)


@pytest.mark.parametrize(("status", "state"), [(Status.TIMEOUT, State.KEPT), (Status.OOM, State.LOST)])
async def test_a_cell_that_was_stopped_cannot_be_repeated(hybrid, tmp_path, status, state) -> None:
    def stopped(code: str) -> ExecuteResponse:
        return ExecuteResponse(status=status, state=state)

    await killed_in_turn(hybrid, 2, tmp_path, sandbox=ScriptedSandbox(stopped))
    out, _, sandbox = await run(hybrid, [TURNS[2], *TURNS], tmp_path, task=left_in(tmp_path))
    assert (out.began_afresh, [code for code, _, _ in sandbox.cells]) == (True, ["x = 1", "x + 1", "x + 2"])


async def test_refused_calls_and_a_cut_observation_come_back_as_they_were(hybrid, tmp_path) -> None:
    turns = ["<tool_call>\nnonsense\n</tool_call>", call("x"), call("y"), "end"]
    tool = ToolConfig(max_response_chars=20)
    long = ScriptedSandbox(ok("a long answer that is cut in its middle"))
    whole, _, _ = await run(hybrid, turns, tmp_path / "whole", tool=tool, sandbox=long)
    task = left_in(tmp_path / "whole")
    assert task.past is not None
    task = replace(task, past=replace(task.past, turns=task.past.turns[:2]))
    out, _, sandbox = await run(hybrid, turns[2:], tmp_path, tool=tool, task=task, sandbox=ScriptedSandbox(long.answer))
    same_tokens(out, whole)
    assert [code for code, _, _ in sandbox.cells] == ["x", "y"]
    assert out.calls[0].outcome == "format_error"


async def test_the_call_budget_counts_recalled_calls(hybrid, tmp_path) -> None:
    turns = [call("1"), call("2"), call("3"), call("4")]
    whole, _, _ = await run(hybrid, turns, tmp_path)
    task = left_in(tmp_path)
    assert task.past is not None
    out, _, sandbox = await run(
        hybrid, turns[2:], tmp_path, task=replace(task, past=replace(task.past, turns=task.past.turns[:2]))
    )
    assert (out.cause, len(sandbox.cells)) == (Cause.MAX_TOOL_CALLS, 3)
    same_tokens(out, whole)


async def test_with_another_prompt_the_past_is_not_its_past(hybrid, tmp_path) -> None:
    await killed_in_turn(hybrid, 2, tmp_path)
    task = replace(left_in(tmp_path), messages=({"role": "user", "content": "another question"},))
    out, engine, _ = await run(hybrid, ["done"], tmp_path, task=task)
    assert (out.recalled_turns, len(engine.asked), out.final_text) == (0, 1, "done")


async def test_half_a_turn_is_no_turn(hybrid, tmp_path) -> None:
    """Killed in the call of the second turn: it was sampled, its observation never came."""

    async def never(code: str) -> ExecuteResponse:
        if code == "x = 1":
            return echo(code)
        await asyncio.sleep(3600)
        raise AssertionError

    sandbox = ScriptedSandbox(never)
    await cut_off(ScriptedEngine(hybrid, TURNS), tmp_path, when=lambda: len(sandbox.cells) == 2, sandbox=sandbox)
    assert len(left_in(tmp_path).past.turns) == 1


async def test_an_observation_without_room_ends_it_again(hybrid, tmp_path) -> None:
    room = len(hybrid._tokenizer.encode_turn(call("1"))) + 1 + len(hybrid.observation_delta("<1>"))
    task = a_task(replace(BUDGET, max_response_tokens=room))
    whole, _, _ = await run(hybrid, [call("1")], tmp_path, task=task)
    out, engine, _ = await run(hybrid, [], tmp_path, task=left_in(tmp_path, task))
    assert (whole.cause, engine.asked) == (Cause.OBSERVATION_OVERFLOW, [])
    same_tokens(out, whole)


async def test_a_response_that_fills_its_budget_comes_back_cut(hybrid, tmp_path) -> None:
    task = a_task(replace(BUDGET, max_response_tokens=3))
    whole, _, _ = await run(hybrid, ["one two three four five"], tmp_path, task=task)
    out, engine, _ = await run(hybrid, [], tmp_path, task=left_in(tmp_path, task))
    assert (whole.cause, engine.asked) == (Cause.MAX_TOKENS, [])
    same_tokens(out, whole)
