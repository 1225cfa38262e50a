"""What only Docker cells have: a cgroup and its memory, labels, and containers that outlive their owner."""

import asyncio
import time
from pathlib import Path

import pytest
from sandboxes import cells, kill_supervisor, open_session, start_pool
from waiting import until

from serve.errors import SessionGone
from serve.pool import SandboxPool
from serve.schema import State, Status

docker = pytest.importorskip("docker")
pytestmark = pytest.mark.docker


def containers(pool: SandboxPool) -> list[str]:
    found = docker.from_env().api.containers(all=True, filters={"label": f"aster.owner={pool.owner}"})
    return [container["Id"] for container in found]


async def test_want_of_memory_in_the_cell_kills_the_session_and_spares_the_supervisor() -> None:
    pool = await start_pool("docker", sessions_per_cell=1, memory_bytes=128 << 20)
    try:
        session = await open_session(pool)
        # the children stay below their own limit each; together with the session they are above the cell's
        code = (
            "import os, time\nfor _ in range(6):\n    if os.fork() == 0:\n"
            "        a = bytearray(b'x') * (90 << 20); time.sleep(30); os._exit(0)\n"
            "time.sleep(1)\nb = bytearray(b'x') * (110 << 20)\ntime.sleep(1)\nlen(b)"
        )
        answer = await session.run(code, timeout_s=60)  # reclaiming memory takes a busy machine long
        assert answer.status in {Status.OOM, Status.OK}, answer  # the kernel takes the session or one of its children
        assert (await session.run("1 + 1")).result == "2"
        assert (await pool.stats())["lost"] == 0
    finally:
        await pool.stop()
    assert containers(pool) == []


async def test_a_call_whose_cell_died_of_memory_is_not_run_again_and_idle_neighbours_are_rebuilt() -> None:
    pool = await start_pool("docker", sessions_per_cell=2, memory_bytes=128 << 20)
    try:
        began = int(time.time())
        hungry, idle = await open_session(pool), await open_session(pool)
        await idle.run("x = 42")
        code = (
            "import os, time\nfor _ in range(6):\n    if os.fork() == 0:\n"
            "        a = bytearray(b'x') * (100 << 20); time.sleep(100); os._exit(0)\n"
            "time.sleep(100)"
        )
        call = asyncio.create_task(hungry.run(code, timeout_s=100))
        (cell,) = {session.cell for session in pool._sessions.values() if session.cell is not None}

        async def told() -> bool:
            """By the kernel, and then by the daemon, which hears of it a little later and says so of the ended cell."""
            oom = {"container": [cell.link.cell.handle], "event": ["oom"]}
            events = docker.from_env().api.events(since=began, until=int(time.time()) + 1, filters=oom, decode=True)
            return bool((await cell.link.status()).oom_kills) and bool(await asyncio.to_thread(list, events))

        await until(told)
        kill_supervisor(pool, cell.link.cell)  # what the kernel does when it finds nothing better
        with pytest.raises(SessionGone, match="ran out of memory"):
            await call
        answer = await idle.run("x")
        assert (answer.result, answer.state) == ("42", State.REPLAYED)
    finally:
        await pool.stop()


async def test_an_ended_container_whose_owner_has_no_files_any_more_is_swept_and_a_running_one_is_not() -> None:
    mine, emptied = await start_pool("docker", sessions_per_cell=1), await start_pool("docker", sessions_per_cell=1)
    try:
        await open_session(emptied)  # its only cell is taken: another one starts
        await until(lambda: len(cells(emptied)) == 2)
        ended, running = cells(emptied)
        directory = ended.directory.parent
        moved = directory.rename(directory.with_name(f"{directory.name}-moved"))
        docker.from_env().api.kill(ended.handle)
        await mine.fleet.backend.sweep()
        assert containers(emptied) == [running.handle]
        moved.rename(directory)
    finally:
        await emptied.stop()
        await mine.stop()
    assert containers(emptied) == containers(mine) == []
    assert not Path(directory).exists()


async def test_a_supervisor_that_hears_nothing_ends_by_itself() -> None:
    pool = await start_pool("docker", sessions_per_cell=1, idle_ttl_s=4)
    try:
        await pool._background.stop()  # no heartbeat: it would keep the cell alive, or remove it before we look
        (cell,) = cells(pool)
        await until(lambda: pool.fleet.backend.ending(cell))
        ending = await pool.fleet.backend.ending(cell)
        assert ending is not None
        assert "ended with 0" in ending.reason
    finally:
        await pool.stop()


async def test_a_pool_that_stops_while_a_cell_is_starting_leaves_no_container() -> None:
    for pause_s in (0.0, 0.05, 0.3):
        pool = await start_pool("docker", sessions_per_cell=1)
        await open_session(pool)  # the only slot is taken: the next cell starts in the background
        await asyncio.sleep(pause_s)
        await pool.stop()
        assert containers(pool) == []
    await asyncio.sleep(1)
    assert containers(pool) == []
