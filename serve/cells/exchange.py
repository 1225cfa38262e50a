"""The calls of one pool to one cell, all over one stream: each gets a number, and the answer with that number.

call --number--> outbox --writer--> stream --> supervisor
call <--future-- waiting <--reader-- stream <-- answers, in whatever order the cells end
"""

from __future__ import annotations

import asyncio
import itertools

import grpc

from sandbox_image.proto import cell_pb2, cell_pb2_grpc


class ExchangeFailed(RuntimeError):
    """No reply: the cell is gone, or says why it has none."""


class Exchange:
    """Opens its stream with the first call. When the stream ends, every call under way fails, and the next call opens
    another. Belongs to one event loop."""

    def __init__(self, stub: cell_pb2_grpc.CellStub) -> None:
        self._stub = stub
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[cell_pb2.ExecuteReply]] = {}
        self._outbox: asyncio.Queue[cell_pb2.ExecuteCall] = asyncio.Queue()
        self._stream: asyncio.Task[None] | None = None

    async def execute(self, request: cell_pb2.ExecuteRequest, *, timeout_s: float) -> cell_pb2.ExecuteReply:
        """Raises `ExchangeFailed`. A caller who stops waiting stops nothing."""
        if self._stream is None:
            self._stream = asyncio.create_task(self._run())
        number = next(self._numbers)
        reply = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._outbox.put_nowait(cell_pb2.ExecuteCall(number=number, request=request))
        try:
            async with asyncio.timeout(timeout_s):
                return await reply
        except TimeoutError:
            raise ExchangeFailed(f"no answer within {timeout_s:g} s") from None
        finally:
            self._waiting.pop(number, None)

    async def _run(self) -> None:
        why = "its stream was closed"
        try:
            stream = self._stub.Execute()
            writer = asyncio.create_task(self._write(stream, self._outbox))
            try:
                while (answer := await stream.read()) is not grpc.aio.EOF:
                    self._deliver(answer)
            finally:
                writer.cancel()
                stream.cancel()
        except grpc.aio.AioRpcError as error:
            why = f"{error.code().name.lower()}: {error.details()}"
        except grpc.aio.UsageError as error:  # the channel is closed
            why = str(error)
        finally:
            self._forget(why)

    def _forget(self, why: str) -> None:
        """Every call under way fails; the next one opens a stream of its own."""
        self._stream, self._outbox = None, asyncio.Queue()
        waiting, self._waiting = self._waiting, {}
        for reply in waiting.values():
            if not reply.done():
                reply.set_exception(ExchangeFailed(why))

    @staticmethod
    async def _write(
        stream: grpc.aio.StreamStreamCall[cell_pb2.ExecuteCall, cell_pb2.ExecuteAnswer],
        outbox: asyncio.Queue[cell_pb2.ExecuteCall],
    ) -> None:
        """Alone with the stream: a caller who was cancelled in the middle of a message would take all others along."""
        try:
            while True:
                await stream.write(await outbox.get())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):  # it has ended: the reader knows why
            pass

    def _deliver(self, answer: cell_pb2.ExecuteAnswer) -> None:
        reply = self._waiting.get(answer.number)
        if reply is None or reply.done():  # nobody waits for it any more
            return
        if answer.WhichOneof("what") == "reply":
            reply.set_result(answer.reply)
        else:
            reply.set_exception(ExchangeFailed(answer.failure or "an answer without a reply"))

    async def close(self, *, grace_s: float) -> None:
        """Calls under way get so long to end, and fail then."""
        if self._waiting and grace_s > 0:
            await asyncio.wait(list(self._waiting.values()), timeout=grace_s)
        if (stream := self._stream) is not None:
            stream.cancel()
            await asyncio.wait({stream})
            self._forget("its stream was closed")  # one that was cancelled before it began has told nobody
