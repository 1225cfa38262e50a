"""What a pool says to a cell while another word is still under way, as when it takes over from one that was killed."""

import asyncio

import pytest
from sandboxes import BACKENDS, start_pool
from waiting import until

from serve.cells.link import CellLink, CellLost
from serve.schema import ExecuteRequest, Limits, Status

pytestmark = pytest.mark.asyncio


@pytest.mark.parametrize("backend", BACKENDS)
async def test_a_session_that_is_closed_while_it_is_opened_frees_its_slot_once(backend: str) -> None:
    pool = await start_pool(backend, sessions_per_cell=4)
    try:
        link = pool.fleet.cells[0].link
        for round_ in range(12):
            opening = asyncio.ensure_future(link.open(f"torn-{round_}", Limits()))
            await asyncio.sleep(0.001 * round_)
            await link.close_session(f"torn-{round_}")
            await asyncio.wait({opening})
            if opening.exception() is None:  # it was faster
                await link.close_session(f"torn-{round_}")

        async def filled() -> bool:
            """A slot that is on its way to become a warm one counts as neither."""
            return (await link.status()).warm == pool.settings.warm_sessions

        await until(filled)
        assert (await link.status()).free == 4
        sessions = [f"whole-{i}" for i in range(4)]
        for session in sessions:
            await link.open(session, Limits())
        for session in sessions:
            answer = await link.execute(session, ExecuteRequest(code=f"open('mine', 'x').write('{session}')"))
            assert answer.status is Status.OK, answer.text
        for session in sessions:
            answer = await link.execute(session, ExecuteRequest(code="open('mine').read()"))
            assert answer.result == session
    finally:
        await pool.stop()


@pytest.mark.parametrize("backend", BACKENDS)
async def test_a_call_on_a_closed_channel_is_a_lost_cell_also_when_it_was_under_way(backend: str) -> None:
    pool = await start_pool(backend, sessions_per_cell=4)
    try:
        link = CellLink(pool.fleet.cells[0].link.cell)
        await link.open("a", Limits())
        cell = ExecuteRequest(code="import time; time.sleep(100)", timeout_s=100)
        turn = asyncio.ensure_future(pool.fleet.cells[0].link.execute("a", cell))

        async def taken() -> bool:
            return any(told.cells for told in (await pool.fleet.cells[0].link.status()).sessions)

        await until(taken)  # the fork waits for the end of that cell: no answer can be faster than what follows
        slow = asyncio.ensure_future(link.fork("a", ["b"]))
        await asyncio.sleep(0)
        await link.disconnect()
        with pytest.raises(CellLost, match="closed"):
            await slow
        for call in (link.status(), link.open("c", Limits()), link.close_session("a"), link.interrupt("a")):
            with pytest.raises(CellLost, match=r"[Cc]losed"):
                await call
        with pytest.raises(CellLost, match=r"[Cc]losed"):
            await anext(link.execute_stream("a", ExecuteRequest(code="1", stream=True)))
        turn.cancel()
    finally:
        await pool.stop()
