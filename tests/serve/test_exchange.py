"""Calls to one cell share a stream: numbers match answers to callers, and no caller can harm another."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from sandbox_image.proto import cell_pb2, cell_pb2_grpc
from serve.cells.exchange import Exchange, ExchangeFailed


class Scripted(cell_pb2_grpc.CellServicer):
    """Waits as long as the code says and repeats it; `die` ends the stream, `fail` answers without a reply."""

    def __init__(self) -> None:
        self.streams = 0

    async def Execute(self, calls: AsyncIterator[cell_pb2.ExecuteCall], context: grpc.aio.ServicerContext) -> None:
        self.streams += 1
        writing = asyncio.Lock()

        async def answer(call: cell_pb2.ExecuteCall) -> None:
            code = call.request.code
            if code == "fail":
                said = cell_pb2.ExecuteAnswer(number=call.number, failure="no such session")
            else:
                await asyncio.sleep(float(code.split()[0]))
                said = cell_pb2.ExecuteAnswer(number=call.number, reply=cell_pb2.ExecuteReply(text=code))
            async with writing:
                await context.write(said)

        async with asyncio.TaskGroup() as group:
            async for call in calls:
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


async def ask(exchange: Exchange, code: str, *, timeout_s: float = 10.0) -> str:
    return (await exchange.execute(cell_pb2.ExecuteRequest(code=code), timeout_s=timeout_s)).text


async def test_each_caller_gets_its_own_answer_when_the_later_call_ends_first(
    served: tuple[Scripted, Exchange],
) -> None:
    scripted, exchange = served
    slow, quick = asyncio.create_task(ask(exchange, "0.3 slow")), asyncio.create_task(ask(exchange, "0 quick"))
    done, _ = await asyncio.wait({slow, quick}, return_when=asyncio.FIRST_COMPLETED)
    assert done == {quick}
    assert (await quick, await slow) == ("0 quick", "0.3 slow")
    assert scripted.streams == 1


async def test_a_failure_is_the_one_caller_s_alone(served: tuple[Scripted, Exchange]) -> None:
    other = asyncio.create_task(ask(served[1], "0.2 other"))
    with pytest.raises(ExchangeFailed, match="no such session"):
        await ask(served[1], "fail")
    assert await other == "0.2 other"


async def test_callers_who_hang_up_or_run_out_of_time_disturb_nobody(served: tuple[Scripted, Exchange]) -> None:
    scripted, exchange = served
    other = asyncio.create_task(ask(exchange, "0.4 other"))
    hangs_up = asyncio.create_task(ask(exchange, "5 hangs up"))
    await asyncio.sleep(0.05)
    hangs_up.cancel()
    with pytest.raises(ExchangeFailed, match=r"no answer within 0\.1 s"):
        await ask(exchange, "5 late", timeout_s=0.1)
    assert await other == "0.4 other"
    assert await ask(exchange, "0 after") == "0 after"
    assert scripted.streams == 1


async def test_a_stream_that_ends_fails_every_call_at_once_and_the_next_call_opens_another(
    served: tuple[Scripted, Exchange],
) -> None:
    scripted, exchange = served
    waiting = [asyncio.create_task(ask(exchange, "9 waits")) for _ in range(3)]
    await asyncio.sleep(0.05)
    began = time.monotonic()
    with pytest.raises(ExchangeFailed, match="unavailable: the cell is ending"):
        await ask(exchange, "die")
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert time.monotonic() - began < 5
    assert [type(outcome) for outcome in outcomes] == [ExchangeFailed] * 3
    assert await ask(exchange, "0 again") == "0 again"
    assert scripted.streams == 2


async def test_closing_waits_for_what_ends_in_time_and_fails_the_rest(served: tuple[Scripted, Exchange]) -> None:
    exchange = served[1]
    quick, slow = asyncio.create_task(ask(exchange, "0.1 quick")), asyncio.create_task(ask(exchange, "9 slow"))
    await asyncio.sleep(0.02)
    await exchange.close(grace_s=0.5)
    assert await quick == "0.1 quick"
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
