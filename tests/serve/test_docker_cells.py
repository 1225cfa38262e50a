"""What only Docker cells have: a cgroup, labels, and containers that outlive a dead owner until they are swept."""

import asyncio
import os
import subprocess
import sys

import pytest
from sandboxes import open_session, start_pool

from serve.errors import SessionGone
from serve.schema import Status

docker = pytest.importorskip("docker")
pytestmark = pytest.mark.docker


def containers(owner_pid: int) -> list[object]:
    with_label = docker.from_env().containers.list(all=True, filters={"label": f"aster.pid={owner_pid}"})
    return list(with_label)


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
        answer = await session.run(code)
        assert answer.status in {Status.OOM, Status.OK}, answer  # the kernel takes the session or one of its children
        assert (await session.run("1 + 1")).result == "2"
        assert (await pool.stats())["lost"] == 0
    finally:
        await pool.stop()
    assert containers(os.getpid()) == []


async def test_a_cell_that_is_killed_takes_its_sessions_with_a_reason_and_is_replaced() -> None:
    pool = await start_pool("docker", sessions_per_cell=2)
    try:
        lost = [await open_session(pool), await open_session(pool)]
        for container in containers(os.getpid()):
            container.kill()  # type: ignore[attr-defined]
        for session in lost:
            with pytest.raises(SessionGone, match="container"):
                await session.run("1")
        fresh = await open_session(pool)
        assert (await fresh.run("1 + 1")).result == "2"
        assert (await pool.stats())["lost"] == 2
    finally:
        await pool.stop()


async def test_containers_of_a_dead_owner_are_swept_and_those_of_a_live_one_are_not() -> None:
    mine = await start_pool("docker", sessions_per_cell=1)
    script = (
        "import asyncio, os, sys; sys.path.insert(0, 'tests')\n"
        "async def main():\n"
        "    from sandboxes import start_pool\n"
        "    await start_pool('docker', sessions_per_cell=1)\n"
        "    print('ready', flush=True); os._exit(1)\n"
        "asyncio.run(main())"
    )
    try:
        dead = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        out, _ = await asyncio.to_thread(dead.communicate, timeout=60)
        assert b"ready" in out
        assert len(containers(dead.pid)) == 1
        assert await mine.backend.sweep() >= 1
        assert containers(dead.pid) == []
        assert len(containers(os.getpid())) >= 1
        assert (await (await open_session(mine)).run("1")).status is Status.OK
    finally:
        await mine.stop()


async def test_a_supervisor_that_hears_nothing_ends_by_itself() -> None:
    pool = await start_pool("docker", sessions_per_cell=1, idle_ttl_s=0.5)
    try:
        cell = pool._cells[0].link.cell
        async with asyncio.timeout(20):
            while not await pool.backend.ending(cell):  # noqa: ASYNC110 - a container has no event to wait for
                await asyncio.sleep(0.2)
        assert "ended with 0" in await pool.backend.ending(cell)
    finally:
        await pool.stop()


async def test_a_pool_that_stops_while_a_cell_is_starting_leaves_no_container() -> None:
    for pause_s in (0.0, 0.05, 0.3):
        pool = await start_pool("docker", sessions_per_cell=1)
        await open_session(pool)  # the only slot is taken: the next cell starts in the background
        await asyncio.sleep(pause_s)
        await pool.stop()
        assert containers(os.getpid()) == []
    await asyncio.sleep(1)
    assert containers(os.getpid()) == []
