"""A pool is killed with -9: what its sessions, cells and files become, with a successor and without one."""

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from pool_process import PoolProcess
from sandboxes import BACKENDS, ISOLATED, Session, cells, new_node, open_session, put, start_pool, there
from waiting import until

from serve import janitor, owner
from serve.cells import BackendUnavailable, CellSettings, choose_backend, socket_root
from serve.errors import SandboxUnavailable, SessionGone
from serve.pool import SandboxPool
from serve.schema import State, Status


@pytest.fixture
def sockets() -> Iterator[str]:
    directory = tempfile.mkdtemp(prefix="ad", dir="/tmp")  # short: a socket's path has 107 bytes
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@asynccontextmanager
async def crashed(backend: str, sockets: str, **settings: object) -> AsyncIterator[PoolProcess]:
    """A pool to be killed; `succeed` makes the next one on its node."""
    try:
        choose_backend(backend, CellSettings())  # type: ignore[arg-type]
    except BackendUnavailable as error:
        pytest.skip(str(error))
    process = PoolProcess(backend, node=new_node(), socket_root=sockets, **settings)
    await process.start()
    try:
        yield process
    finally:
        await process.kill()


async def succeed(process: PoolProcess, backend: str, sockets: str, **settings: object) -> SandboxPool:
    pool = await start_pool(backend, node=process.owner.rpartition("-")[0], socket_root=sockets, **settings)
    assert pool.owner == process.owner
    return pool


def processes_in(directory: str) -> list[int]:
    """Live processes whose command line names a place below `directory`."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and directory.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


def containers(label: str) -> list[str]:
    docker = pytest.importorskip("docker")
    return [c["Id"] for c in docker.from_env().api.containers(all=True, filters={"label": label})]


@pytest.mark.parametrize("backend", ISOLATED)
async def test_a_session_lives_on_when_its_pool_is_killed_between_two_calls(backend: str, sockets: str) -> None:
    async with crashed(backend, sockets) as process:
        session_id = await process.create(ttl_s=500, idle_ttl_s=100)
        await process.run(session_id, "import threading; x = 6; lock = threading.Lock()", call_id="a")
        before = await process.call("stats")
        await process.kill()
        pool = await succeed(process, backend, sockets)
        try:
            session = Session(pool, session_id)
            asked = time.time()
            answer = await session.run("lock.acquire(), x * 7")
            assert (answer.result, answer.state, answer.cell) == ("(True, 42)", State.KEPT, 2)
            again = await session.run("raise AssertionError('it ran twice')", call_id="a")
            assert (again.status, again.cell) == (Status.OK, 1)
            stats = await pool.stats()
            assert (stats["adopted"], stats["replayed"], stats["cells"]) == (1, 0, before["cells"])
            assert [record.cell for record in await pool.journal(session_id)] == [1, 2]
            assert asked + 99 < (await pool.get(session_id)).expires_at <= time.time() + 100  # idle_ttl_s, from its use
            fresh = await open_session(pool)
            assert (await fresh.run("'x' in globals()")).result == "False"
        finally:
            await pool.stop()
    assert list((Path(sockets) / f"aster-cells-{os.geteuid()}").glob("*-*")) == []


@pytest.mark.parametrize("backend", ISOLATED)
async def test_a_call_that_was_under_way_runs_once_and_its_answer_is_kept(backend: str, sockets: str) -> None:
    code = (
        "import os, time\nopen('begun', 'w').close()\n"
        "while os.path.exists('wait') and not os.path.exists('go'): time.sleep(.01)\nn = globals().get('n', 0) + 1\nn"
    )
    async with crashed(backend, sockets) as process:
        asked, silent = await process.create(), await process.create()
        for session_id in (asked, silent):
            await process.call("put", session_id, "wait")
            process.call("execute", session_id, {"code": code, "call_id": "slow", "timeout_s": 120})
        for session_id in (asked, silent):
            await process.there(session_id, "begun")
        await process.kill()
        pool = await succeed(process, backend, sockets)
        try:
            one = Session(pool, asked)
            again = asyncio.create_task(one.run(code, call_id="slow", timeout_s=1))
            await asyncio.sleep(1.2)  # its clock does not run while the old call does
            for session_id in (asked, silent):
                await put(Session(pool, session_id), "go")
            first = await again
            assert (first.result, first.cell, first.state) == ("1", 1, State.KEPT)
            assert (await one.run("n")).result == "1"
            assert [record.cell for record in await pool.journal(asked)] == [1, 2]
            # nobody asks for that answer: the journal has a hole, so that a loss of the cell is a loss of the session
            assert (await Session(pool, silent).run("n")).result == "1"
            for cell in cells(pool):
                await pool.fleet.backend.remove(cell)
            assert (await one.run("n")).result == "1"
            with pytest.raises(SessionGone, match="nobody got the answer of cell 1"):
                await Session(pool, silent).run("n")
        finally:
            await pool.stop()


@pytest.mark.parametrize("backend", BACKENDS)
async def test_a_session_whose_cell_died_with_the_pool_is_rebuilt(backend: str, sockets: str) -> None:
    async with crashed(backend, sockets) as process:
        session_id = await process.create()
        await process.run(session_id, "x = 6\nprint('six')", call_id="a")
        await process.kill()
        directory = socket_root(CellSettings(socket_root=sockets)) / process.owner
        with owner.try_lock(directory / "lock") as lock:  # type: ignore[union-attr]
            janitor.remove_cells(owner.Owner(directory, lock))
        pool = await succeed(process, backend, sockets)
        try:
            session = Session(pool, session_id)
            answer = await session.run("x * 7")
            assert (answer.result, answer.state) == ("42", State.REPLAYED)
            assert (await session.run("raise AssertionError", call_id="a")).text == "six\n"
        finally:
            await pool.stop()


async def test_only_sessions_with_a_lease_of_this_service_are_adopted(sockets: str) -> None:
    async with crashed("bwrap", sockets, sessions_per_cell=4) as process:
        kept, torn, unleased, expired = [await process.create(idle_ttl_s=1000) for _ in range(4)]
        await process.run(torn, "x = 1")
        await process.kill()
        journals = socket_root(CellSettings(socket_root=sockets)) / process.owner / "sessions"
        (journals / unleased).unlink()
        os.utime(journals / expired, (time.time() - 1001,) * 2)  # its last use
        with open(journals / torn, "a") as file:
            file.write('{"kind":"ran","rec')
        (journals / f"{process.owner}.{'0' * 32}.00000000").write_text("not sealed by us")
        pool = await succeed(process, "bwrap", sockets, sessions_per_cell=4)
        try:
            assert (await pool.stats())["adopted"] == 3
            assert (await Session(pool, kept).run("1")).status is Status.OK
            assert (await Session(pool, torn).run("x")).result == "1"
            assert len((journals / torn).read_text().splitlines()) == 3
            with pytest.raises(SessionGone):
                await Session(pool, unleased).run("1")
            (cell,) = [cell for cell in pool.fleet.cells if kept in cell.sessions]
            status = await cell.link.status()
            assert unleased not in {told.session_id for told in status.sessions}
            await pool._expire()
            with pytest.raises(SessionGone, match="without a call"):
                await Session(pool, expired).run("1")
        finally:
            await pool.stop()


async def test_a_successor_with_another_key_or_backend_adopts_nothing_and_leaves_nothing(sockets: str) -> None:
    for backend, key in (("bwrap", "other"), ("process", "test")):
        async with crashed("bwrap", sockets) as process:
            session_id = await process.create()
            await process.kill()
            pool = await succeed(process, backend, sockets, mint_key=key)
            try:
                stats = await pool.stats()
                assert stats["sessions"] == (1 if key == "test" else 0)  # by its journal: no cell of bwrap is left
                answered = Session(pool, session_id).run("1")
                if key == "test":
                    assert (await answered).state is State.REPLAYED
                else:
                    with pytest.raises(Exception, match="no session"):
                        await answered
            finally:
                await pool.stop()
            assert not [pid for pid in processes_in(sockets) if b"supervisor" in command(pid)]


def command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


async def test_cells_made_under_other_settings_keep_their_sessions_and_take_no_new_one(sockets: str) -> None:
    async with crashed("bwrap", sockets, sessions_per_cell=2) as process:
        session_id = await process.create()
        await process.run(session_id, "x = 1")
        await process.kill()
        pool = await succeed(process, "bwrap", sockets, sessions_per_cell=3)
        try:
            (old,) = [cell for cell in pool.fleet.cells if session_id in cell.sessions]
            assert "other settings" in old.broken
            fresh = await open_session(pool)
            assert fresh.id not in old.sessions
            assert (await Session(pool, session_id).run("x")).result == "1"
            await pool.close(session_id)
            assert old not in pool.fleet.cells
        finally:
            await pool.stop()


@pytest.mark.parametrize("backend", ISOLATED)
async def test_without_a_successor_the_janitor_removes_all_of_it_and_nothing_else(backend: str, sockets: str) -> None:
    neighbour = await start_pool(backend, socket_root=sockets, adoption_s=1)
    try:
        kept = await open_session(neighbour)
        async with crashed(backend, sockets, adoption_s=1) as process:
            session_id = await process.create()
            await process.run(session_id, "import subprocess; p = subprocess.Popen(['sleep', '1000'])")
            directory = socket_root(CellSettings(socket_root=sockets)) / process.owner
            assert processes_in(str(directory)) or containers(f"aster.owner={process.owner}")
            await process.kill()
            await until(lambda: not directory.exists())  # the janitor tries again 20 s after a failure
            assert processes_in(str(directory)) == []
            assert backend != "docker" or containers(f"aster.owner={process.owner}") == []
        assert (await kept.run("1 + 1")).state is State.KEPT
    finally:
        await neighbour.stop()
    await until(lambda: not processes_in(sockets))  # the janitor has nothing left to do


@pytest.mark.long
@pytest.mark.parametrize("backend", BACKENDS)
async def test_a_driver_that_is_killed_for_good_leaves_nothing_after_a_minute(backend: str, sockets: str) -> None:
    async with crashed(backend, sockets) as process:  # with the settings as they are shipped
        for _ in range(3):
            await process.run(await process.create(), "x = 1")
        await process.kill()
    root = socket_root(CellSettings(socket_root=sockets))
    await until(lambda: not processes_in(sockets) and not owner.names(root), seconds=60)
    assert backend != "docker" or containers(f"aster.owner={process.owner}") == []


@pytest.mark.parametrize("backend", ISOLATED)
async def test_a_pool_that_leaves_hands_its_sessions_over_and_takes_an_empty_fleet_along(
    backend: str, sockets: str
) -> None:
    node = new_node()
    first = await start_pool(backend, node=node, socket_root=sockets)
    session = await open_session(first)
    await session.run("import threading; lock = threading.Lock(); lock.acquire()")
    await first.leave()
    second = await start_pool(backend, node=node, socket_root=sockets)
    assert second.owner == first.owner
    answer = await Session(second, session.id).run("lock.locked()")
    assert (answer.result, answer.state) == ("True", State.KEPT)
    await second.close(session.id)
    await second.leave()
    assert not (socket_root(CellSettings(socket_root=sockets)) / second.owner).exists()


@pytest.mark.parametrize("backend", ISOLATED)
async def test_a_call_that_outlasts_its_pool_is_answered_by_the_next_one(
    backend: str, sockets: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.pool._END_S", 0.2)
    node = new_node()
    first = await start_pool(backend, node=node, socket_root=sockets)
    session = await open_session(first)
    code = "import os, time\nopen('begun', 'x').close()\nwhile not os.path.exists('go on'): time.sleep(.05)\n'done'"
    call = asyncio.create_task(session.run(code, call_id="long", timeout_s=60))
    await there(session, "begun")
    await first.leave()
    with pytest.raises(SandboxUnavailable):
        await call
    second = await start_pool(backend, node=node, socket_root=sockets)
    await second.write_file(session.id, "go on", b"")
    answer = await Session(second, session.id).run(code, call_id="long")
    assert (answer.result, answer.cell) == ("done", 1)
    await second.stop()
