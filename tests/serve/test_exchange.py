"""Calls to one cell share a stream: numbers match answers to callers, and no caller can harm another."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from waiting import until

from sandbox_image.proto import cell_pb2, cell_pb2_grpc
from serve.cells.exchange import Exchange, ExchangeFailed


class Scripted(cell_pb2_grpc.CellServicer):
    """Repeats the code: `held` when the test releases it, `never` not at all, else at once. `die` ends the stream,
    `fail` answers without a reply."""

    def __init__(self) -> None:
        self.streams = 0
        self.asked: list[str] = []
        self.release = asyncio.Event()

    async def Execute(self, calls: AsyncIterator[cell_pb2.ExecuteCall], context: grpc.aio.ServicerContext) -> None:
        self.streams += 1
        writing = asyncio.Lock()

        async def answer(call: cell_pb2.ExecuteCall) -> None:
            code = call.request.code
            if code == "fail":
                said = cell_pb2.ExecuteAnswer(number=call.number, failure="no such session")
            else:
                if code.startswith("never"):
                    await asyncio.Event().wait()
                if code.startswith("held"):
                    await self.release.wait()
                said = cell_pb2.ExecuteAnswer(number=call.number, reply=cell_pb2.ExecuteReply(text=code))
            async with writing:
                await context.write(said)

        async with asyncio.TaskGroup() as group:
            async for call in calls:
                self.asked.append(call.request.code)
                if call.request.code == "die":
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "the cell is ending")
                group.create_task(answer(call))


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[tuple[Scripted, Exchange]]:
    server, scripted = grpc.aio.server(), Scripted()
    cell_pb2_grpc.add_CellServicer_to_server(scripted, server)
    server.add_insecure_port(f"unix:{tmp_path}/s")
    await server.start()
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/s") as channel:
        exchange = Exchange(cell_pb2_grpc.CellStub(channel))
        yield scripted, exchange
        await exchange.close(grace_s=0)
    await server.stop(0)


async def ask(exchange: Exchange, code: str, *, timeout_s: float = 60.0) -> str:
    return (await exchange.execute(cell_pb2.ExecuteRequest(code=code), timeout_s=timeout_s)).text


async def test_each_caller_gets_its_own_answer_when_the_later_call_ends_first(
    served: tuple[Scripted, Exchange],
) -> None:
    scripted, exchange = served
    slow, quick = asyncio.create_task(ask(exchange, "held slow")), asyncio.create_task(ask(exchange, "quick"))
    assert await quick == "quick"
    assert not slow.done()
    scripted.release.set()
    assert await slow == "held slow"
    assert scripted.asked == ["held slow", "quick"]
    assert scripted.streams == 1


async def test_a_failure_is_the_one_caller_s_alone(served: tuple[Scripted, Exchange]) -> None:
    other = asyncio.create_task(ask(served[1], "held other"))
    with pytest.raises(ExchangeFailed, match="no such session"):
        await ask(served[1], "fail")
    served[0].release.set()
    assert await other == "held other"


async def test_callers_who_hang_up_or_run_out_of_time_disturb_nobody(served: tuple[Scripted, Exchange]) -> None:
    scripted, exchange = served
    other = asyncio.create_task(ask(exchange, "held other"))
    hangs_up = asyncio.create_task(ask(exchange, "held, but hangs up"))
    await until(lambda: len(scripted.asked) == 2)
    hangs_up.cancel()
    with pytest.raises(ExchangeFailed, match=r"no answer within 0\.1 s"):
        await ask(exchange, "held too long", timeout_s=0.1)
    scripted.release.set()
    assert await other == "held other"
    assert await ask(exchange, "after") == "after"
    assert scripted.streams == 1


async def test_a_stream_that_ends_fails_every_call_at_once_and_the_next_call_opens_another(
    served: tuple[Scripted, Exchange],
) -> None:
    scripted, exchange = served
    waiting = [asyncio.create_task(ask(exchange, "never")) for _ in range(3)]
    await until(lambda: len(scripted.asked) == 3)
    with pytest.raises(ExchangeFailed, match="unavailable: the cell is ending"):
        await ask(exchange, "die")
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert [repr(outcome) for outcome in outcomes] == [repr(ExchangeFailed("unavailable: the cell is ending"))] * 3
    assert await ask(exchange, "again") == "again"
    assert scripted.streams == 2


async def test_closing_waits_for_what_ends_in_time_and_fails_the_rest(served: tuple[Scripted, Exchange]) -> None:
    scripted, exchange = served
    quick = asyncio.create_task(ask(exchange, "held"))
    await until(lambda: scripted.asked == ["held"])
    closing = asyncio.create_task(exchange.close(grace_s=60))
    await asyncio.sleep(0.02)
    scripted.release.set()
    assert await quick == "held"
    await closing
    slow = asyncio.create_task(ask(exchange, "never"))
    await until(lambda: scripted.asked == ["held", "never"])
    await exchange.close(grace_s=0.1)
    with pytest.raises(ExchangeFailed, match="closed"):
        await slow


async def test_a_call_after_the_channel_was_closed_fails_at_once() -> None:
    channel = grpc.aio.insecure_channel("unix:/nowhere/at/all")
    exchange = Exchange(cell_pb2_grpc.CellStub(channel))
    await channel.close()
    with pytest.raises(ExchangeFailed, match="closed"):
        await ask(exchange, "0", timeout_s=5)
    never_began = asyncio.create_task(ask(exchange, "0", timeout_s=5))
    await asyncio.sleep(0)
    await exchange.close(grace_s=0)
    with pytest.raises(ExchangeFailed, match="closed"):
        await never_began
