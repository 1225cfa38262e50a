"""A tree of trajectories: what its leaves share, what is their own, and that no session is shared or left open."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from sandboxes import start_pool
from scripted import BUDGET, ScriptedSandbox, a_task, call, check_aligned, ok

from aster.agent import rollout
from aster.agent.chat import ChatRenderer
from aster.agent.rollout import Generation, turn_seed
from aster.agent.sandbox import ServiceSandbox, open_sandbox
from aster.agent.session import ToolSession
from aster.agent.tree import lineage, run_tree
from aster.config import Recipe, ToolConfig
from aster.errors import ConfigError, EngineLost, SandboxLost
from aster.types import Cause, Task
from serve.schema import CreateSession

ROOM = replace(BUDGET, max_tool_calls=9, max_response_tokens=4000)


def a_tree(*, turns: tuple[int, ...] = (1, 2), factor: int = 2, **more) -> Task:
    tasks = [
        a_task(**{"budget": ROOM, "uid": f"run/{i}", "sample": i, "seed": 50 + i, **more})
        for i in range(factor ** len(turns))
    ]
    return replace(tasks[0], leaves=tuple(tasks[1:]), tree_turns=turns, tree_factor=factor)


@dataclass
class Author:
    """An engine that writes turn n of leaf i by rule (`say`), and remembers who asked for what."""

    renderer: ChatRenderer
    say: object
    asked: list[tuple[str, int]] = field(default_factory=list)
    seeds: dict[tuple[str, int], int] = field(default_factory=dict)

    async def __call__(self, ids, *, max_tokens, sampling, stop_token_ids, seed, request_id) -> Generation:
        uid, _, number = request_id.rsplit("/", 2)
        leaf, turn = int(uid.rpartition("/")[2]), int(number)
        self.asked.append((uid, turn))
        self.seeds[uid, turn] = seed
        await asyncio.sleep(0)
        text = self.say(leaf, turn)
        if isinstance(text, BaseException):
            raise text
        tokens = np.array([*self.renderer._tokenizer.encode_turn(text), stop_token_ids[0]], np.int32)
        logprobs = -0.01 * (1 + leaf) * np.ones(len(tokens), np.float32)
        return Generation(tokens, logprobs, np.full(len(tokens), 7, np.int32), "stop")


class Forking(ScriptedSandbox):
    """A session whose state is the list of its cells."""

    def __init__(self, answer, session_id: str = "s-1") -> None:
        super().__init__(answer, session_id=session_id)
        self.made: list[Forking] = [self]

    async def fork(self) -> Forking:
        twin = Forking(self.answer, session_id=f"s-{len(self.made) + 1}")
        twin.cells, twin.made = list(self.cells), self.made
        self.made.append(twin)
        return twin


async def grow(renderer: ChatRenderer, say, sandbox=None, task: Task | None = None):
    author = Author(renderer, say)
    sandbox = sandbox or Forking(ok())
    out = await run_tree(
        task or a_tree(), generate=author, sandboxes=sandbox, renderer=renderer, tool=ToolConfig(), engine="e0"
    )
    return out, author, sandbox


def three_calls(leaf: int, turn: int) -> str:
    return call(f"{turn}{'abcd'[leaf]}") if turn < 3 else f"\\boxed{{{leaf}}}"


async def test_leaves_share_what_was_before_their_split_and_nothing_after_it(hybrid) -> None:
    out, author, _ = await grow(hybrid, three_calls)
    assert [(t.uid, t.sample, t.parent, t.branch_turn) for t in out] == [
        ("run/0", 0, None, None),
        ("run/1", 1, "run/0", 2),
        ("run/2", 2, "run/0", 1),
        ("run/3", 3, "run/2", 2),
    ]
    for t in out:
        check_aligned(t)
        assert t.cause is Cause.ANSWERED
        assert len(t.turns) == 4
    assert [[c.code for c in t.calls] for t in out] == [
        ["0a", "1a", "2a"],
        ["0a", "1a", "2b"],
        ["0a", "1c", "2c"],
        ["0a", "1c", "2d"],
    ]
    for t, parent in ((out[1], out[0]), (out[2], out[0]), (out[3], out[2])):
        at = t.turns[t.branch_turn].start
        assert at == parent.turns[t.branch_turn].start
        for name in ("ids", "mask", "behaviour_logprobs", "versions"):
            assert getattr(t, name)[:at].tolist() == getattr(parent, name)[:at].tolist()
        assert t.ids[at:].tolist() != parent.ids[at:].tolist()
        assert t.prompt_ids.tolist() == parent.prompt_ids.tolist()
    assert len(author.asked) == len(set(author.asked)) == 1 + 2 + 4 + 4, "what is shared was sampled once"


async def test_each_leaf_goes_on_with_its_own_seed(hybrid) -> None:
    _, author, _ = await grow(hybrid, three_calls)
    for (uid, turn), seed in author.seeds.items():
        assert seed == turn_seed(50 + int(uid[-1]), turn)


async def test_each_leaf_has_its_own_copy_of_the_session_and_all_are_closed(hybrid) -> None:
    out, _, sandbox = await grow(hybrid, three_calls)
    cells = sorted([code for code, *_ in session.cells] for session in sandbox.made)
    assert cells == sorted([c.code for c in t.calls] for t in out)
    assert [session.closed for session in sandbox.made] == [1] * 4
    for session in sandbox.made:
        assert [call_id for *_, call_id in session.cells] == ["call-1", "call-2", "call-3"]


async def test_a_path_that_ends_before_it_splits_is_all_of_its_leaves(hybrid) -> None:
    out, author, sandbox = await grow(hybrid, lambda leaf, turn: call("1") if turn < (0 if leaf else 1) else "done")
    # leaf 0 and leaf 2 part before turn 1, in which both answer; turn 2 never comes
    assert [t.final_text for t in out] == ["done"] * 4
    assert author.asked == [("run/0", 0), ("run/0", 1), ("run/2", 1)]
    assert out[1].ids.tolist() == out[0].ids.tolist()
    assert (out[1].parent, out[1].branch_turn, len(out[1].turns)) == ("run/0", 2, 2)
    assert [t.behaviour_logprobs[-1] for t in out] == pytest.approx([-0.01, -0.01, -0.03, -0.03])
    assert len(sandbox.made) == 2


async def test_a_split_before_any_call_copies_no_session(hybrid) -> None:
    sandbox = ScriptedSandbox(ok())  # which cannot fork
    task = a_tree(turns=(1,), budget=ROOM)
    out, _, _ = await grow(hybrid, lambda leaf, turn: "<tool_call>{" if turn == 0 else call("1"), sandbox, task)
    assert [len(t.turns) for t in out] == [10, 10]
    assert len(sandbox.opened) == 2


async def test_a_copy_that_fails_costs_its_leaves_and_not_the_trunk(hybrid) -> None:
    class Once(Forking):
        async def fork(self) -> Forking:
            if len(self.made) == 1:
                self.made.append(self)
                raise SandboxLost("s-1", "it has a live thread")
            return await super().fork()

    out, _, _ = await grow(hybrid, three_calls, Once(ok()))
    assert [t.cause for t in out] == [Cause.ANSWERED, Cause.ANSWERED, Cause.SANDBOX_LOST, Cause.SANDBOX_LOST]
    assert "it has a live thread" in out[2].error
    assert [len(t.turns) for t in out] == [4, 4, 1, 1]


async def test_an_engine_that_is_lost_below_a_split_costs_that_leaf_alone(hybrid) -> None:
    def say(leaf: int, turn: int):
        return EngineLost("gone") if (leaf, turn) == (3, 2) else three_calls(leaf, turn)

    out, _, sandbox = await grow(hybrid, say)
    assert [t.cause for t in out] == [Cause.ANSWERED] * 3 + [Cause.ENGINE_LOST]
    assert all(session.closed for session in sandbox.made)


async def test_cancelling_gives_every_leaf_as_far_as_it_had_come(hybrid) -> None:
    reached = asyncio.Event()

    async def hang(code: str):
        if code.startswith("2"):
            reached.set()
            await asyncio.sleep(3600)
        return ok()(code)

    sandbox = Forking(hang)
    running = asyncio.create_task(grow(hybrid, three_calls, sandbox))
    await asyncio.wait_for(reached.wait(), 60)
    running.cancel()
    out, _, _ = await asyncio.wait_for(running, 60)
    assert [t.cause for t in out] == [Cause.CANCELLED] * 4
    assert [t.uid for t in out] == [f"run/{i}" for i in range(4)]
    assert all(len(t.turns) in (1, 2, 3) for t in out)
    assert all(session.closed for session in sandbox.made)


async def test_whenever_it_is_cancelled_no_session_stays_open_and_no_leaf_is_missing(hybrid) -> None:
    for steps in range(60):
        sandbox = Forking(ok())
        running = asyncio.create_task(grow(hybrid, three_calls, sandbox))
        for _ in range(steps):
            await asyncio.sleep(0)
        running.cancel()
        try:
            out, _, _ = await asyncio.wait_for(running, 60)
        except asyncio.CancelledError:
            assert steps == 0, "before the first step of all there is nobody to answer"
            continue
        assert [t.uid for t in out] == [f"run/{i}" for i in range(4)]
        assert {t.cause for t in out} <= {Cause.CANCELLED, Cause.ANSWERED}
        if sandbox.opened:
            assert all(session.closed for session in sandbox.made), steps


async def test_a_copy_of_a_session_knows_what_its_model_was_told_and_shares_no_memory() -> None:
    session = ToolSession(Forking(ok()), key="k", timeout_s=1, deadline=asyncio.get_running_loop().time() + 9)
    session.memory["asked"] = [1]
    session.loss_told = True
    twin = await session.fork(key="k2", deadline=asyncio.get_running_loop().time() + 9)
    twin.memory["asked"].append(2)
    assert (session.memory, twin.memory) == ({"asked": [1]}, {"asked": [1, 2]})
    assert twin.loss_told
    assert (session.session_id, twin.session_id) == ("", "")


async def test_a_bug_in_one_leaf_is_raised_and_all_sessions_are_closed(hybrid) -> None:
    def say(leaf: int, turn: int):
        return ZeroDivisionError("a bug") if (leaf, turn) == (2, 1) else three_calls(leaf, turn)

    sandbox = Forking(ok())
    with pytest.raises(ZeroDivisionError):
        await grow(hybrid, say, sandbox)
    assert all(session.closed for session in sandbox.made)


async def test_a_loop_that_keeps_state_of_its_own_is_refused(hybrid, monkeypatch) -> None:
    loop = replace(rollout.agent_loop("code_agent"), branches=False)
    monkeypatch.setitem(rollout.AGENT_LOOPS, "stateful", loop)
    with pytest.raises(ConfigError, match="does not say that it keeps its state in the episode"):
        await grow(hybrid, three_calls, task=a_tree(agent_name="stateful"))


@pytest.mark.parametrize("backend", ["bwrap", "process"])
async def test_real_sessions_part_with_all_their_variables(hybrid, backend: str) -> None:
    pool = await start_pool(backend)
    opened: list[ServiceSandbox] = []

    class Local:
        async def open(self, key: str) -> ServiceSandbox:
            box = await open_sandbox(pool, key, session=CreateSession(), max_output_bytes=4096, rebuild=False)
            opened.append(box)
            return box

    def say(leaf: int, turn: int) -> str:
        cells = ["x = [0]", f"x.append({leaf}); len(x)", f"x.append({10 * leaf}); print(x)"]
        return call(cells[turn]) if turn < 3 else "done"

    try:
        out, _, _ = await grow(hybrid, say, Local())
        assert [t.calls[2].observation for t in out] == ["[0, 0, 0]\n", "[0, 0, 10]\n", "[0, 2, 20]\n", "[0, 2, 30]\n"]
        assert len(opened) == 1
    finally:
        await pool.stop()


def test_lineage_of_three_splits() -> None:
    assert [lineage(i, turns=(1, 3, 5), factor=2) for i in range(8)] == [
        (None, None), (0, 5), (0, 3), (2, 5), (0, 1), (4, 5), (4, 3), (6, 5),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"tree_turns": [2, 1]}, r"tree_turns=\[2, 1\] must be ascending turn numbers from 1 on"),
        ({"tree_turns": [0]}, r"tree_turns=\[0\] must be ascending turn numbers from 1 on"),
        ({"tree_turns": [1, 2], "tree_factor": 3}, r"group_size=8 is not a multiple .* 3\^2 = 9"),
    ],
)
def test_trees_that_cannot_be_are_refused_with_the_arithmetic(overrides: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Recipe.model_validate({"stage": "rl", "rollout": overrides})
