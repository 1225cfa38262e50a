"""`aster replay RUN ID`: run a trajectory's cells again in a fresh session, and show where the outputs differ.

    aster replay runs/rl_stage1_18k rl_stage1_18k/train/12/row-7/3
    aster replay runs/rl_stage1_18k row-7/3 --step 12

ID is a trajectory's uid, or the end of one. Calls that were refused before they reached a session are skipped, as they
were then. Sessions come from where the run's config.yaml says, or key=value. Exit status 1 when an output differs;
clocks, random numbers and addresses in an output make it differ.
"""

from __future__ import annotations

import argparse
import asyncio
import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from aster import launch
from aster.agent.grammar import CODE_INTERPRETER
from aster.agent.observations import TRUNCATED, observe, tells_of_fresh, truncate_chars
from aster.command import run_verb
from aster.config import Recipe, ToolConfig
from aster.data.trajectories import read_trajectories
from aster.errors import ConfigError, DataError
from aster.roles import SandboxFactory
from aster.types import ToolCall, ToolOutcome, Trajectory

PYTHON = CODE_INTERPRETER["function"]["name"]
_ANSWER_S = 120.0  # beyond a cell's own time limit: a full service, a cell that is started


@dataclass(frozen=True)
class Replayed:
    """One call, as it was and as it is. None = refused then, or another tool's, and not run."""

    call: ToolCall
    status: str | None
    observation: str | None

    @property
    def same(self) -> bool:
        if self.observation is None:
            return True
        return self.status == self.call.status and _fits(self.observation, self.call.observation)

    def diff(self) -> list[str]:
        lines = (self.call.observation.split("\n"), (self.observation or "").split("\n"))
        return list(
            difflib.unified_diff(*lines, f"recorded ({self.call.status})", f"replayed ({self.status})", lineterm="")
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="aster replay", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run directory, with trajectories/ and config.yaml")
    parser.add_argument("id", help="uid of a trajectory, or the end of one")
    parser.add_argument("--step", type=int, help="look in this step only")
    parser.add_argument("--dry-run", action="store_true", help="print the cells and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example sandbox.backend=bwrap")
    args = parser.parse_intermixed_args(argv)
    trajectory = find(args.run, args.id, step=args.step)
    if args.dry_run:
        for number, call in enumerate(trajectory.calls, 1):
            print(f"# ---- call {number}: {call.status}\n{call.code}")
        return 0
    config = args.run / "config.yaml"
    if not config.is_file():
        raise DataError(f"{config} does not exist: {args.run} is not a run directory")
    recipe = Recipe.load(str(config), args.overrides)
    with launch.cluster(recipe), launch.sandboxes(recipe) as sandboxes:
        if sandboxes is None:
            raise ConfigError("the run was made with tool.enabled=false: there is nothing to replay")
        cells = asyncio.run(replay(trajectory, sandboxes, recipe.tool))
    return report(trajectory, cells, Console())


def find(run: Path, uid: str, *, step: int | None = None) -> Trajectory:
    """The one trajectory of `run` whose uid is `uid`, else ends with it. `DataError` for none and for several."""
    folder = run / "trajectories"
    files = sorted(folder.glob("*.parquet")) if step is None else [folder / f"{step}.parquet"]
    if not files:
        raise DataError(f"{folder} holds no STEP.parquet: is {run} the directory of a run?")
    found = [t for file in files for t in read_trajectories(file) if t.uid == uid or t.uid.endswith(f"/{uid}")]
    exact = [t for t in found if t.uid == uid]
    if len(exact or found) != 1:
        names = ", ".join(t.uid for t in found[:5])
        what = (
            f"{len(found)} trajectories end with {uid!r} ({names}): give the whole uid"
            if found
            else (f"no trajectory of {folder} is called {uid!r}: rollout_data/STEP.jsonl names them under `uid`")
        )
        raise DataError(what)
    return (exact or found)[0]


async def replay(trajectory: Trajectory, sandboxes: SandboxFactory, tool: ToolConfig) -> list[Replayed]:
    """Every call of the trajectory, in order, in one fresh session that is closed whatever happens.

    Raises `SandboxLost`, `BackPressure`, and TimeoutError when the service does not answer.
    """
    async with asyncio.timeout(_ANSWER_S):
        session = await sandboxes.open(f"replay of {trajectory.uid}")
    out: list[Replayed] = []
    loss_told = False
    try:
        for number, call in enumerate(trajectory.calls):
            if call.outcome is ToolOutcome.FORMAT_ERROR or call.tool != PYTHON:
                out.append(Replayed(call, None, None))
                continue
            async with asyncio.timeout(tool.timeout_s + _ANSWER_S):
                answer = await session.execute(call.code, timeout_s=tool.timeout_s, call_id=f"replay-{number}")
            text, _ = observe(answer, timeout_s=tool.timeout_s, session_id=session.session_id, loss_told=loss_told)
            loss_told = tells_of_fresh(answer)
            if tool.max_response_chars is not None:
                text = truncate_chars(text, tool.max_response_chars, tool.truncate_side)
            out.append(Replayed(call, str(answer.status), text))
    finally:
        await session.close()
    return out


def _fits(now: str, then: str) -> bool:
    """Equal; or equal outside the gap, where the recorded observation was cut to a number of tokens."""
    if now == then:
        return True
    head, cut, tail = then.partition(TRUNCATED)
    return bool(cut) and len(now) >= len(head) + len(tail) and now.startswith(head) and now.endswith(tail)


def report(trajectory: Trajectory, cells: Sequence[Replayed], console: Console) -> int:
    """Prints one line per call, and the difference where there is one. The exit status."""
    console.print(f"{trajectory.uid}: {len(cells)} calls, ended: {trajectory.cause}", markup=False)
    for number, cell in enumerate(cells, 1):
        if cell.observation is None:
            console.print(f"call {number}: refused then, or no cell; not run")
        elif cell.same:
            console.print(f"call {number}: {cell.status}, same output ({len(cell.observation)} characters)")
        else:
            console.print(f"call {number}: differs", style="bold red")
            for line in cell.diff():
                console.print(line, markup=False, highlight=False)
    ran = [c for c in cells if c.observation is not None]
    differing = sum(not c.same for c in ran)
    console.print(f"{len(ran)} calls replayed, {differing} differ, {len(cells) - len(ran)} skipped")
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(run_verb("replay"))
