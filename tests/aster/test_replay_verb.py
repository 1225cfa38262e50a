"""`aster replay`: recorded cells in a real session, against what they printed then."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from aster.agent.observations import TRUNCATED
from aster.cli import main
from aster.config import ToolConfig
from aster.data.trajectories import write_trajectories_parquet
from aster.errors import DataError
from aster.replay import Replayed, find, replay, report
from aster.types import ToolCall, ToolOutcome, Trajectory, TrajectoryGroup, Turn
from serve.schema import ExecuteResponse
from tests.fakes import row, trajectory, work
from tests.sandboxes import Session, open_session, start_pool


def call(code: str, observation: str, status: str = "ok", outcome: ToolOutcome = ToolOutcome.SUCCESS) -> ToolCall:
    return ToolCall(code, status, outcome, observation, 0.1)


def having(*calls: ToolCall, sample: int = 0) -> Trajectory:
    turns = tuple(Turn(i, i + 1, "stop", 0.0, 0.1, c) for i, c in enumerate(calls))
    return replace(trajectory(work(row(1)), sample, version=0, reward=1.0), turns=turns)


class Factory:
    """`roles.SandboxFactory` on a pool of this process; counts the sessions that are open."""

    def __init__(self, pool) -> None:
        self.pool, self.open_sessions = pool, 0

    async def open(self, key: str):
        self.open_sessions += 1
        return Opened(self, await open_session(self.pool))


class Opened:
    def __init__(self, factory: Factory, session: Session) -> None:
        self.factory, self.session, self.session_id = factory, session, session.id

    async def execute(self, code: str, *, timeout_s: float, call_id: str) -> ExecuteResponse:
        return await self.session.run(code, timeout_s=timeout_s, call_id=call_id)

    async def close(self) -> None:
        self.factory.open_sessions -= 1
        await self.session.close()


def replayed(*calls: ToolCall, tool: ToolConfig | None = None) -> list[Replayed]:
    async def scenario() -> list[Replayed]:
        pool = await start_pool("process", sessions_per_cell=2)
        try:
            factory = Factory(pool)
            cells = await replay(having(*calls), factory, tool or ToolConfig())
            assert factory.open_sessions == 0
            return cells
        finally:
            await pool.stop()

    return asyncio.run(asyncio.wait_for(scenario(), 120))


def test_cells_run_in_order_in_one_session_and_differences_are_shown():
    cells = replayed(
        call("x = 20", ""),
        call("", "Error when executing tool: no code", "format_error", ToolOutcome.FORMAT_ERROR),
        call("x + 1", "21\n"),
        call("x + 2", "99\n"),
        call("1/0", "", "ok"),
    )
    assert [c.same for c in cells] == [True, True, True, False, False]
    assert cells[1].observation is None, "what was refused then is not run now"
    assert cells[3].diff()[-3:] == ["-99", "+22", " "]
    assert cells[4].status == "error"
    assert "ZeroDivisionError" in (cells[4].observation or "")
    console = Console(record=True, width=200)
    assert report(having(), cells, console) == 1
    assert "4 calls replayed, 2 differ, 1 skipped" in console.export_text()
    assert report(having(), cells[:3], console) == 0


def test_a_cut_observation_is_compared_outside_the_gap():
    text = "".join(str(i % 10) for i in range(100))
    long = "print(''.join(str(i % 10) for i in range(100)))"
    by_tokens = call(long, f"01234{TRUNCATED}789\n")
    other = call(long, f"01234{TRUNCATED}788\n")
    assert [c.same for c in replayed(by_tokens, other)] == [True, False]
    half = ToolConfig(max_response_chars=16)
    (cell,) = replayed(call(long, text[:8] + TRUNCATED + text[-7:] + "\n"), tool=half)
    assert cell.same, cell.diff()


def write(run: Path, *trajectories: Trajectory, step: int = 1) -> None:
    group = TrajectoryGroup(row(1), step, trajectories)
    write_trajectories_parquet(run / "trajectories", [group], step=step)


def test_a_trajectory_is_found_by_its_uid_or_the_end_of_one(tmp_path):
    write(tmp_path, having(sample=0), having(sample=1))
    write(tmp_path, replace(having(sample=1), uid="other/row-1/1"), step=2)
    uid = having(sample=0).uid
    assert find(tmp_path, uid, step=None).uid == uid
    assert find(tmp_path, "row-1/0").sample == 0
    assert find(tmp_path, "row-1/1", step=2).uid == "other/row-1/1"
    with pytest.raises(DataError, match="2 trajectories end with 'row-1/1'"):
        find(tmp_path, "row-1/1")
    with pytest.raises(DataError, match="no trajectory"):
        find(tmp_path, "row-9/0")
    with pytest.raises(DataError, match=r"holds no STEP\.parquet"):
        find(tmp_path / "elsewhere", uid)


def test_a_dry_run_prints_the_cells(tmp_path, capsys):
    write(tmp_path, having(call("x = 20", ""), call("x + 1", "21")))
    assert main(["replay", str(tmp_path), "row-1/0", "--dry-run", "sandbox.backend=bwrap"]) == 0
    assert capsys.readouterr().out == "# ---- call 1: ok\nx = 20\n# ---- call 2: ok\nx + 1\n"
