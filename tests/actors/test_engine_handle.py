"""The pool's handle of an engine whose calls end in other ways than with an answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest

pytest.importorskip("ray")

from ray.exceptions import ObjectLostError

from actors.rollout import RayEngine
from aster.config import Recipe
from aster.types import Budget, Cause, Sampling, Task

TASK = Task("r/train/1/row/0", "row", 0, (), "code_agent", Budget(8, 8, 1), Sampling(), seed=1)


@dataclass
class Method:
    """`actor.method`, whose `remote` gives something to await."""

    remote: Callable[..., Awaitable[Any]]


@dataclass
class Actor:
    run: Method
    run_tree: Method
    alive: Method


def engine(*, alive: bool) -> RayEngine:
    """Its answers went down with the node that held them; it may live all the same."""

    async def gone(*_: object) -> Any:
        raise ObjectLostError("00" * 28, None, "")

    async def lives() -> bool:
        return alive

    actor = Actor(Method(gone), Method(gone), Method(lives))
    return RayEngine(actor, name="e0", recipe=Recipe.load("cpu_rl_stage1"), weight_backend="gloo")


async def test_an_answer_that_is_lost_costs_its_trajectory_and_not_the_engine() -> None:
    handle = engine(alive=True)
    trajectory = await handle.run(TASK)
    assert trajectory.cause is Cause.ENGINE_LOST
    assert "e0: run: " in trajectory.error
    assert [t.cause for t in await handle.run_tree(TASK)] == [Cause.ENGINE_LOST]
    assert not handle.lost


@pytest.mark.parametrize("method", ["run", "run_tree"])
async def test_an_engine_that_did_not_answer_is_asked_whether_it_lives(method: str) -> None:
    """Otherwise one that hangs would soon be the emptiest, and be given the next ones."""
    handle = engine(alive=False)
    await getattr(handle, method)(TASK)
    assert handle.lost == "the engine core is dead"
