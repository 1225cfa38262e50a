"""The pool's end of a cell's socket: gRPC calls with deadlines, and the records of `serve.schema`."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import grpc

from sandbox_image.proto import MESSAGE_BYTES, cell_pb2, cell_pb2_grpc
from serve.background import is_cancelled
from serve.cells import BackendUnavailable, Cell, CellBackend
from serve.cells.exchange import Exchange, ExchangeFailed
from serve.errors import CannotFork, FileRefused
from serve.schema import (
    CellError,
    ExecuteRequest,
    ExecuteResponse,
    FileInfo,
    Files,
    Limits,
    OutputChunk,
    State,
    Status,
)

_CONTROL_S = 15.0
_COPY_S = 1.0  # 14 ms each on a quiet machine, one after another
_KILL_GRACE_S = 20.0  # the supervisor answers at t+2 s; forking anew after a death, and a loaded machine, take longer
_POLL_S = 0.01
_LOOK_EVERY = 20
_FILE_STATUS = {
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.INVALID_ARGUMENT: 422,
    grpc.StatusCode.OUT_OF_RANGE: 413,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 507,
}

T = TypeVar("T")


class CellLost(RuntimeError):
    """The cell does not answer any more; its sessions are gone."""


class CellFull(RuntimeError):
    """No free slot."""


class CellLink:
    """Everything that is said to one supervisor. Belongs to the event loop that made it."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self._channel = grpc.aio.insecure_channel(
            f"unix:{cell.socket}",
            options=[
                ("grpc.max_receive_message_length", MESSAGE_BYTES),
                ("grpc.max_send_message_length", MESSAGE_BYTES),
                ("grpc.enable_retries", 0),  # an execute that may have run is never sent again
                ("grpc.use_local_subchannel_pool", 1),
            ],
        )
        self._stub = cell_pb2_grpc.CellStub(self._channel)
        self._exchange = Exchange(self._stub)

    async def open(self, session_id: str, limits: Limits) -> None:
        request = cell_pb2.OpenRequest(
            session_id=session_id,
            memory_bytes=limits.memory_bytes,
            processes=limits.processes,
            file_bytes=limits.file_bytes,
        )
        try:
            await self._ask(self._stub.Open, request)
        except grpc.aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise CellFull(error.details() or "no free slot") from None
            raise self._lost(error) from None

    async def execute(self, session_id: str, request: ExecuteRequest) -> ExecuteResponse:
        message = _message(session_id, request)
        try:
            answer = await self._exchange.execute(message, timeout_s=request.timeout_s + _KILL_GRACE_S)
        except ExchangeFailed as error:
            raise CellLost(f"cell {self.cell.cell_id}: {error}") from None
        return _response(answer)

    async def execute_stream(
        self, session_id: str, request: ExecuteRequest
    ) -> AsyncIterator[OutputChunk | ExecuteResponse]:
        """Output as it is printed; the response comes last."""
        call = None
        try:
            async with self._lost_when_closed():
                call = self._stub.ExecuteStream(
                    _message(session_id, request), timeout=request.timeout_s + _KILL_GRACE_S
                )
                async for event in call:
                    if event.HasField("reply"):
                        yield _response(event.reply)
                    else:
                        stream = "stderr" if event.output.is_stderr else "stdout"
                        yield OutputChunk(stream=stream, text=event.output.text)
        except grpc.aio.AioRpcError as error:
            raise self._lost(error) from None
        finally:
            if call is not None:
                call.cancel()

    async def interrupt(self, session_id: str) -> bool:
        """Whether a cell was running."""
        request = cell_pb2.SessionRequest(session_id=session_id)
        try:
            return bool((await self._ask(self._stub.Interrupt, request)).was_running)
        except grpc.aio.AioRpcError as error:
            raise self._lost(error) from None

    async def reset(self, session_id: str) -> None:
        try:
            await self._ask(self._stub.Reset, cell_pb2.SessionRequest(session_id=session_id))
        except grpc.aio.AioRpcError as error:
            raise self._lost(error) from None

    async def fork(self, session_id: str, new_ids: Sequence[str]) -> None:
        """Raises `CannotFork`, `CellFull`, `CellLost`; then no copy was made."""
        try:
            request = cell_pb2.ForkRequest(session_id=session_id, new_ids=list(new_ids))
            await self._ask(self._stub.Fork, request, timeout_s=_CONTROL_S + _COPY_S * len(new_ids))
        except grpc.aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.FAILED_PRECONDITION:
                raise CannotFork(session_id, error.details() or "it has live threads or children") from None
            if error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise CellFull(error.details() or "no room for a copy") from None
            raise self._lost(error) from None

    async def write_file(self, session_id: str, path: str, content: bytes) -> None:
        """Raises `FileRefused`, `CellLost`."""
        request = cell_pb2.WriteFileRequest(session_id=session_id, path=path, content=content)
        try:
            await self._ask(self._stub.WriteFile, request)
        except grpc.aio.AioRpcError as error:
            raise self._refused(error) from None

    async def read_file(self, session_id: str, path: str, *, max_bytes: int) -> bytes:
        """Raises `FileRefused`, `CellLost`."""
        request = cell_pb2.ReadFileRequest(session_id=session_id, path=path, max_bytes=max_bytes)
        try:
            return bytes((await self._ask(self._stub.ReadFile, request)).content)
        except grpc.aio.AioRpcError as error:
            raise self._refused(error) from None

    async def list_files(self, session_id: str) -> Files:
        try:
            answer = await self._ask(self._stub.ListFiles, cell_pb2.SessionRequest(session_id=session_id))
        except grpc.aio.AioRpcError as error:
            raise self._refused(error) from None
        found = [FileInfo(path=f.path, size=f.size, modified=f.modified) for f in answer.files]
        return Files(files=found, truncated=answer.truncated)

    async def close_session(self, session_id: str) -> bool:
        try:
            answer = await self._ask(self._stub.Close, cell_pb2.CloseRequest(session_id=session_id))
        except grpc.aio.AioRpcError as error:
            raise self._lost(error) from None
        return bool(answer.existed)

    async def status(self) -> cell_pb2.StatusReply:
        try:
            return await self._ask(self._stub.Status, cell_pb2.StatusRequest())
        except grpc.aio.AioRpcError as error:
            raise self._lost(error) from None

    async def _ask(self, method: Callable[..., Awaitable[T]], request: object, *, timeout_s: float = _CONTROL_S) -> T:
        async with self._lost_when_closed():
            return await method(request, timeout=timeout_s)

    @asynccontextmanager
    async def _lost_when_closed(self) -> AsyncIterator[None]:
        """`CellLost` for a call on a channel that is closed already, or is closed under it: the pool has just given the
        cell up, and the owner of this session has not heard of it yet."""
        try:
            yield
        except grpc.aio.UsageError as error:
            raise CellLost(f"cell {self.cell.cell_id}: {error}") from None
        except asyncio.CancelledError:
            if is_cancelled():
                raise
            raise CellLost(f"cell {self.cell.cell_id}: its channel was closed") from None

    def _refused(self, error: grpc.aio.AioRpcError) -> FileRefused | CellLost:
        code = _FILE_STATUS.get(error.code())
        return FileRefused(code, error.details() or error.code().name.lower()) if code else self._lost(error)

    def _lost(self, error: grpc.aio.AioRpcError) -> CellLost:
        return CellLost(f"cell {self.cell.cell_id}: {error.code().name.lower()}: {error.details()}")

    async def disconnect(self, *, grace_s: float | None = None) -> None:
        """Calls under way get so long to end by themselves; then cells fail and the others are cancelled."""
        await self._exchange.close(grace_s=grace_s or 0.0)
        await self._channel.close(grace=grace_s)


async def start_cell(backend: CellBackend, *, timeout_s: float) -> CellLink:
    """Start a cell and wait until it answers. Raises `BackendUnavailable`, and then nothing of it is left."""
    cell = await backend.start()
    try:
        deadline = asyncio.get_running_loop().time() + timeout_s
        polls = 0
        while not cell.socket.exists():
            polls += 1
            if polls % _LOOK_EVERY == 0 and (why := await backend.ending(cell)):
                raise BackendUnavailable(f"{backend.name}: cell {cell.cell_id} did not start: {why}")
            if asyncio.get_running_loop().time() > deadline:
                raise BackendUnavailable(f"{backend.name}: cell {cell.cell_id} was not ready within {timeout_s:g} s")
            await asyncio.sleep(_POLL_S)
        link = CellLink(cell)
        try:
            await link.status()
        except CellLost as error:
            await link.disconnect()
            raise BackendUnavailable(f"{backend.name}: {error}") from None
    except BaseException:
        await asyncio.shield(backend.remove(cell))
        raise
    return link


def _message(session_id: str, request: ExecuteRequest) -> cell_pb2.ExecuteRequest:
    return cell_pb2.ExecuteRequest(
        session_id=session_id,
        # a lone surrogate has no UTF-8; in a string literal its escape means the same
        code=request.code.encode("utf-8", "backslashreplace").decode(),
        timeout_s=request.timeout_s,
        call_id=request.call_id,
        max_output_bytes=request.max_output_bytes,
        figures=request.figures,
    )


def _response(answer: cell_pb2.ExecuteReply) -> ExecuteResponse:
    body: dict[str, Any] = {}
    if answer.HasField("error"):
        body["error"] = CellError(name=answer.error.name, value=answer.error.value, traceback=answer.error.traceback)
    if answer.HasField("result"):
        body["result"] = answer.result
    return ExecuteResponse(
        status=Status(answer.status),
        state=State(answer.state),
        stdout=answer.stdout,
        stderr=answer.stderr,
        text=answer.text,
        duration_s=answer.duration_s,
        queue_s=answer.queue_s,
        truncated=answer.truncated,
        stdout_bytes=answer.stdout_bytes,
        stderr_bytes=answer.stderr_bytes,
        cell=answer.cell,
        reason=answer.reason,
        figures=[base64.b64encode(figure).decode() for figure in answer.figures],
        **body,
    )
