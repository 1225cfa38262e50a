"""A cell is lost under its sessions: they are rebuilt from their journals, or say why not. Never a silent fresh one."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from sandboxes import BACKENDS, Session, cells, kill_supervisor, open_session, put, start_pool, there
from waiting import until

from serve.errors import SessionGone
from serve.fleet import FleetCell
from serve.pool import SandboxPool
from serve.schema import ExecuteRequest, ForkSession, State, Status

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=BACKENDS)
async def pool(request: pytest.FixtureRequest) -> AsyncIterator[SandboxPool]:
    pool = await start_pool(request.param, sessions_per_cell=2, warm_cells=2)
    yield pool
    await pool.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def session(pool: SandboxPool) -> AsyncIterator[Session]:
    session = await open_session(pool)
    yield session
    await session.close()


def kill_cell_of(session: Session) -> None:
    cell = session.pool._sessions[session.id].cell
    assert cell is not None
    kill_supervisor(session.pool, cell.link.cell)


async def test_a_session_is_rebuilt_at_its_next_call_and_says_so_once(pool: SandboxPool, session: Session) -> None:
    first = await session.run("import itertools; c = itertools.count(5); print(next(c))", call_id="a")
    await session.run("1/0")
    before = await pool.stats()
    kill_cell_of(session)
    answer = await session.run("next(c)")
    assert (answer.result, answer.state, answer.cell) == ("6", State.REPLAYED, 3)
    after = await session.run("next(c)")
    assert (after.result, after.state) == ("7", State.KEPT)
    again = await session.run("raise AssertionError('it ran twice')", call_id="a")
    assert (again.text, again.cell) == (first.text, 1)
    assert (await session.run("next(c)")).result == "8"
    stats = await pool.stats()
    assert (stats["replayed"], stats["lost"]) == (before["replayed"] + 1, before["lost"])
    assert [record.status for record in await pool.journal(session.id)] == ["ok", "error", "ok", "ok", "ok"]


async def test_a_repeated_call_that_finds_its_cell_lost_gets_the_first_answer(session: Session) -> None:
    await session.run("n = 0")
    await session.run("n += 1\nn", call_id="b")
    kill_cell_of(session)
    answer = await session.run("n += 1\nn", call_id="b")
    assert (answer.result, answer.state) == ("1", State.REPLAYED)
    assert (await session.run("n")).result == "1"


async def test_a_call_under_way_runs_once_more_in_the_rebuilt_session(session: Session) -> None:
    await session.run("x = 41")
    await put(session, "wait")
    code = "import os, time\nopen('begun', 'w').close()\nwhile os.path.exists('wait'): time.sleep(.01)\nx += 1\nx"
    call = asyncio.create_task(session.run(code, call_id="c"))
    await there(session, "begun")
    kill_cell_of(session)
    answer = await call
    assert (answer.result, answer.state, answer.status) == ("42", State.REPLAYED, Status.OK)
    assert (await session.run("x")).result == "42"


async def test_all_sessions_of_a_cell_come_back_also_the_idle_one(pool: SandboxPool) -> None:
    sessions = [await open_session(pool) for _ in range(4)]
    for number, session in enumerate(sessions):
        await session.run(f"x = {number}")
    for cell in cells(pool):
        kill_supervisor(pool, cell)
    answers = await asyncio.gather(*(session.run("x") for session in sessions))
    assert [(answer.result, answer.state) for answer in answers] == [(str(i), State.REPLAYED) for i in range(4)]
    for session in sessions:
        await session.close()


async def test_a_cell_that_ended_between_calls_is_noticed_by_the_heartbeat(pool: SandboxPool, session: Session) -> None:
    await session.run("x = 1")
    kill_cell_of(session)

    async def noticed() -> bool:
        await pool._heartbeat()
        return pool._sessions[session.id].cell is None

    await until(noticed)
    assert (await session.run("x")).state is State.REPLAYED


@pytest.mark.parametrize(
    ("cell", "why"),
    [
        ("import time; print(time.time_ns())", "cell 1 printed something else than before"),
        ("import time; time.sleep(9)", "cell 1 ended with timeout"),
        ("import os; os._exit(3)", "cell 1 ended with session_died"),
        ("import time; time.sleep(1.1)", "its cells ran for .* s, the limit is 1 s"),
    ],
)
async def test_what_cannot_be_had_again_is_a_lost_session_with_the_reason(
    pool: SandboxPool, session: Session, cell: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "the limit" in why:
        monkeypatch.setattr(pool._rescue, "_limit_s", 1.0)
    await session.run(cell, timeout_s=1 if "sleep(9)" in cell else 20)
    before = (await pool.stats())["lost"]
    kill_cell_of(session)
    with pytest.raises(SessionGone, match=why):
        await session.run("1")
    with pytest.raises(SessionGone, match=why):
        await session.run("1")
    assert (await pool.stats())["lost"] == before + 1


async def test_a_second_loss_during_the_rebuilding_is_the_end(pool: SandboxPool, session: Session) -> None:
    await put(session, "go")  # it will not be there when the cell runs again, which then does not end by itself
    await session.run("import os, time\nwhile not os.path.exists('go'): time.sleep(.01)\nx = 1")
    old = pool._sessions[session.id].cell
    kill_cell_of(session)
    call = asyncio.create_task(session.run("x"))
    new: list[FleetCell] = []

    async def replaying() -> bool:
        """Not while the session is only being opened there: a cell lost in that moment is replaced by another."""
        new[:] = [cell for cell in pool.fleet.cells if session.id in cell.sessions and cell is not old]
        told = [one for cell in new for one in (await cell.link.status()).sessions]
        return any(one.session_id == session.id and one.cells for one in told)

    await until(replaying)
    kill_supervisor(pool, new[0].link.cell)
    with pytest.raises(SessionGone, match="lost twice"):
        await call


async def test_a_session_that_died_in_a_living_cell_is_not_rebuilt(session: Session) -> None:
    await session.run("x = 1")
    died = await session.run("import os; os._exit(1)")
    assert (died.status, died.state) == (Status.SESSION_DIED, State.LOST)
    fresh = await session.run("'x' in globals()")
    assert (fresh.result, fresh.state) == ("False", State.LOST)


async def test_a_journal_without_room_is_no_journal(pool: SandboxPool, session: Session, monkeypatch) -> None:
    monkeypatch.setattr("serve.journal._MAX_BYTES", 400)
    assert (await session.run("x = 1")).status is Status.OK
    assert (await session.run("y = 2" + " " * 400)).status is Status.OK
    assert (await session.run("x + y")).result == "3"
    kill_cell_of(session)
    with pytest.raises(SessionGone, match="its journal could not be written"):
        await session.run("1")


async def test_a_reset_session_is_rebuilt_from_what_came_after(session: Session) -> None:
    await session.run("import time; print(time.time_ns()); x = 1")
    stubborn = asyncio.create_task(session.run("open('begun', 'w').close(); time.sleep(20)"))
    await there(session, "begun")
    await session.pool.reset(session.id)
    assert (await stubborn).state is State.LOST
    kill_cell_of(session)
    await session.pool.reset(session.id)  # nothing needs to be rebuilt for this
    assert (await session.run("x = globals().get('x', 40) + 2; x")).result == "42"
    kill_cell_of(session)
    answer = await session.run("x")
    assert (answer.result, answer.state, answer.cell) == ("42", State.REPLAYED, 2)


async def test_what_came_from_outside_cannot_be_rebuilt(session: Session) -> None:
    await session.pool.write_file(session.id, "data", b"1")
    assert (await session.run("open('data').read()")).result == "1"
    kill_cell_of(session)
    with pytest.raises(SessionGone, match="a file was written from outside"):
        await session.pool.read_file(session.id, "data")


async def test_an_interrupted_cell_is_not_run_again(session: Session) -> None:
    code = "import time; n = 0; open('begun', 'w').close()\nwhile True: time.sleep(.01); n += 1"
    call = asyncio.create_task(session.run(code))
    await there(session, "begun")
    assert (await session.pool.interrupt(session.id)).was_running
    assert (await call).state is State.KEPT
    kill_cell_of(session)
    with pytest.raises(SessionGone, match="interrupted from outside"):
        await session.run("n > 0")


async def test_a_stream_whose_cell_is_lost_begins_again(session: Session) -> None:
    await session.run("x = 1")
    await put(session, "wait")
    code = "import os, time\nfor i in range(3):\n    print(i)\n    while os.path.exists('wait'): time.sleep(.01)\nx"
    request = ExecuteRequest(code=code)
    events = []
    async for event in session.pool.execute_stream(session.id, request):
        events.append(event)
        if len(events) == 1:
            kill_cell_of(session)
    assert events[0].text == "0\n"
    assert "".join(event.text for event in events[1:-1]).endswith("0\n1\n2\n1\n")
    assert (events[-1].text, events[-1].state) == ("0\n1\n2\n1\n", State.REPLAYED)


async def test_copies_inherit_the_journal_up_to_the_fork(pool: SandboxPool, session: Session) -> None:
    await session.run("x = 1")
    forked = await pool.fork(session.id, ForkSession(count=2))
    copies = [Session(pool, made.session_id) for made in forked.sessions]
    await session.run("x += 10")
    await copies[0].run("x += 100")
    assert [record.code for record in await pool.journal(copies[0].id)] == ["x = 1", "x += 100"]
    assert [record.code for record in await pool.journal(copies[1].id)] == ["x = 1"]
    kill_cell_of(session)
    answers = [await one.run("x") for one in (session, *copies)]
    assert [(a.result, a.state) for a in answers] == [(x, State.REPLAYED) for x in ("11", "101", "1")]
    for copy in copies:
        await copy.close()


async def test_a_family_shares_one_slot_until_its_last_member_closes(pool: SandboxPool, session: Session) -> None:
    forked = await pool.fork(session.id, ForkSession(count=2))
    cell = pool._sessions[session.id].cell
    assert cell is not None
    taken = cell.slots_taken
    assert (await pool.stats())["sessions"] >= 3
    first, second = (made.session_id for made in forked.sessions)
    await session.close()
    await pool.close(first)
    assert cell.slots_taken == taken
    assert (await Session(pool, second).run("1 + 1")).result == "2"
    await pool.close(second)
    assert cell.slots_taken == taken - 1
