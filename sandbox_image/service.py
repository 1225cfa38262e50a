"""The gRPC face of a cell: translates messages, decides nothing. Imported after the zygote runs (it starts threads)."""

from __future__ import annotations

import asyncio
import os
import platform
import time
import traceback
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import grpc

from sandbox_image import files, limits
from sandbox_image.cell import Cell
from sandbox_image.file_helper import FileTrouble
from sandbox_image.outcome import Outcome, oom_kills
from sandbox_image.output import Tap
from sandbox_image.place import Limits
from sandbox_image.processes import Forker, ForkerDied
from sandbox_image.proto import MESSAGE_BYTES, cell_pb2, cell_pb2_grpc
from sandbox_image.slot import CannotFork, NoRoom

Context: TypeAlias = grpc.aio.ServicerContext
_TROUBLE = {
    "not_found": grpc.StatusCode.NOT_FOUND,
    "invalid": grpc.StatusCode.INVALID_ARGUMENT,
    "too_large": grpc.StatusCode.OUT_OF_RANGE,
    "no_room": grpc.StatusCode.RESOURCE_EXHAUSTED,
}
_UNKNOWN = "no such session in this cell"
T = TypeVar("T")


class CellService(cell_pb2_grpc.CellServicer):
    def __init__(self, cell: Cell, zygote: Forker) -> None:
        self._cell, self._zygote = cell, zygote
        self.heard = time.monotonic()

    async def _know(self, session_id: str, context: Context) -> None:
        self.heard = time.monotonic()
        if session_id not in self._cell.sessions:
            await context.abort(grpc.StatusCode.NOT_FOUND, _UNKNOWN)

    async def Open(self, request: cell_pb2.OpenRequest, context: Context) -> cell_pb2.OpenReply:
        self.heard = time.monotonic()
        wanted = Limits(request.memory_bytes, request.processes, request.file_bytes)
        try:
            await self._cell.open(request.session_id, wanted)
        except KeyError:
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, "this session id is in use")
        except (ForkerDied, OSError, RuntimeError) as error:  # NoRoom is a RuntimeError
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        return cell_pb2.OpenReply()

    async def Execute(self, calls: AsyncIterator[cell_pb2.ExecuteCall], context: Context) -> None:
        """Until the pool hangs up or is gone; cells that run then run on."""
        writing = asyncio.Lock()  # a stream takes one message at a time
        answers: set[asyncio.Task[None]] = set()
        try:
            async for call in calls:
                answer = asyncio.create_task(self._answer(call, context, writing))
                answers.add(answer)
                answer.add_done_callback(answers.discard)
        finally:
            for answer in answers:
                answer.cancel()

    async def _answer(self, call: cell_pb2.ExecuteCall, context: Context, writing: asyncio.Lock) -> None:
        answer = cell_pb2.ExecuteAnswer(number=call.number)
        try:
            if call.request.session_id in self._cell.sessions:
                answer.reply.CopyFrom(await self._execute(call.request, tap=None))
            else:
                answer.failure = _UNKNOWN
        except Exception as error:  # policy: the caller must not wait for an answer that cannot come
            if not isinstance(error, (ForkerDied, OSError)):
                traceback.print_exc()  # a fault of ours: the cell's log has it
            answer.failure = _valid(f"{type(error).__name__}: {error}")
        async with writing:
            await context.write(answer)

    async def ExecuteStream(
        self, request: cell_pb2.ExecuteRequest, context: Context
    ) -> AsyncIterator[cell_pb2.ExecuteEvent]:
        await self._know(request.session_id, context)
        tap = Tap(request.max_output_bytes)
        answer = asyncio.create_task(self._execute(request, tap=tap))
        try:
            async for is_stderr, text in tap:
                yield cell_pb2.ExecuteEvent(output=cell_pb2.OutputChunk(is_stderr=is_stderr, text=text))
            yield cell_pb2.ExecuteEvent(reply=await answer)
        except (ForkerDied, OSError) as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        finally:  # a caller that has hung up: the cell itself runs on
            tap.close()
            answer.cancel()

    async def _execute(self, request: cell_pb2.ExecuteRequest, *, tap: Tap | None) -> cell_pb2.ExecuteReply:
        """Of a session that is here. Raises `ForkerDied`, OSError: its interpreter died and cannot be made anew."""
        self.heard = time.monotonic()
        try:
            outcome, queue_s = await self._cell.execute(
                request.session_id,
                request.code,
                timeout_s=request.timeout_s,
                call_id=request.call_id,
                keep=request.max_output_bytes,
                with_figures=request.figures,
                tap=tap,
            )
        finally:
            self.heard = time.monotonic()
        return reply(outcome, queue_s)

    async def Interrupt(self, request: cell_pb2.SessionRequest, context: Context) -> cell_pb2.InterruptReply:
        await self._know(request.session_id, context)
        return cell_pb2.InterruptReply(was_running=self._cell.interrupt(request.session_id))

    async def Reset(self, request: cell_pb2.SessionRequest, context: Context) -> cell_pb2.ResetReply:
        await self._know(request.session_id, context)
        try:
            await self._cell.reset(request.session_id)
        except KeyError:
            await context.abort(grpc.StatusCode.NOT_FOUND, "the session was closed")
        except (ForkerDied, OSError, RuntimeError) as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"no fresh interpreter: {error}")
        return cell_pb2.ResetReply()

    async def Fork(self, request: cell_pb2.ForkRequest, context: Context) -> cell_pb2.ForkReply:
        await self._know(request.session_id, context)
        try:
            await self._cell.fork(request.session_id, list(request.new_ids))
        except KeyError as error:
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, str(error.args[0]))
        except CannotFork as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, _valid(str(error)))
        except (NoRoom, ForkerDied, OSError) as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, _valid(str(error)))
        return cell_pb2.ForkReply()

    async def WriteFile(self, request: cell_pb2.WriteFileRequest, context: Context) -> cell_pb2.WriteFileReply:
        await self._know(request.session_id, context)
        await _of_files(self._cell.write_file(request.session_id, request.path, request.content), context)
        return cell_pb2.WriteFileReply()

    async def ReadFile(self, request: cell_pb2.ReadFileRequest, context: Context) -> cell_pb2.ReadFileReply:
        await self._know(request.session_id, context)
        most = min(request.max_bytes or files.MAX_BYTES, files.MAX_BYTES)
        work = self._cell.read_file(request.session_id, request.path, max_bytes=most)
        return cell_pb2.ReadFileReply(content=await _of_files(work, context))

    async def ListFiles(self, request: cell_pb2.SessionRequest, context: Context) -> cell_pb2.ListFilesReply:
        await self._know(request.session_id, context)
        found, truncated = await _of_files(self._cell.list_files(request.session_id), context)
        listed = [cell_pb2.FileInfo(path=_valid(path), size=size, modified=when) for path, size, when in found]
        return cell_pb2.ListFilesReply(files=listed, truncated=truncated)

    async def Close(self, request: cell_pb2.CloseRequest, context: Context) -> cell_pb2.CloseReply:
        self.heard = time.monotonic()
        return cell_pb2.CloseReply(existed=await self._cell.close(request.session_id))

    async def Status(self, request: cell_pb2.StatusRequest, context: Context) -> cell_pb2.StatusReply:
        self.heard = time.monotonic()
        cell = self._cell
        return cell_pb2.StatusReply(
            slots=cell.slots,
            free=cell.free,
            warm=cell.warm,
            served=cell.served,
            oom_kills=oom_kills(),
            broken=cell.why_broken,
            packages=self._zygote.packages,
            python=platform.python_version(),
            sessions=[
                cell_pb2.SessionStatus(
                    session_id=key, cells=s.cells, running=s.lock.locked(), pid=s.process.pid, family=s.family.name
                )
                for key, s in cell.sessions.items()
            ],
        )


async def _of_files(work: Coroutine[Any, Any, T], context: Context) -> T:
    try:
        return await work
    except FileTrouble as trouble:
        await context.abort(_TROUBLE[trouble.kind], _valid(trouble.text))
    except (ForkerDied, OSError) as error:
        await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
    raise AssertionError("abort raises")


def _hand_over(socket: Path) -> None:
    """The pool may run as another user than the container's root; the directory is its own, so the socket must be."""
    owner = socket.parent.stat()
    if owner.st_uid != os.geteuid():
        os.chown(socket, owner.st_uid, owner.st_gid)


def reply(outcome: Outcome, queue_s: float) -> cell_pb2.ExecuteReply:
    body: dict[str, Any] = {}
    if outcome.error is not None:
        body["error"] = cell_pb2.CellError(**{k: _valid(v) for k, v in outcome.error.items()})
    if outcome.result is not None:
        body["result"] = _valid(outcome.result)
    return cell_pb2.ExecuteReply(
        status=outcome.status,
        state=outcome.state,
        stdout=outcome.stdout.text(),
        stderr=outcome.stderr.text(),
        text=outcome.text.text(),
        duration_s=outcome.duration_s,
        queue_s=queue_s,
        truncated=outcome.stdout.truncated or outcome.stderr.truncated or outcome.text.truncated,
        stdout_bytes=outcome.stdout.total,
        stderr_bytes=outcome.stderr.total,
        cell=outcome.cell,
        reason=outcome.reason,
        figures=outcome.figures,
        **body,
    )


def _valid(text: str) -> str:
    """A session's JSON may smuggle surrogates, which protobuf refuses."""
    return text.encode("utf-8", "backslashreplace").decode()


async def serve(cell: Cell, zygote: Forker, *, socket: Path, idle_ttl_s: float, stop: asyncio.Event) -> None:
    """Until `stop` is set or nobody has spoken for `idle_ttl_s`. The socket gets its name when all is ready."""
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", MESSAGE_BYTES),
            ("grpc.max_send_message_length", MESSAGE_BYTES),
            ("grpc.so_reuseport", 0),
        ]
    )
    service = CellService(cell, zygote)
    cell_pb2_grpc.add_CellServicer_to_server(service, server)
    making = socket.with_name(f"{socket.name}.new")
    server.add_insecure_port(f"unix:{making}")
    await server.start()
    _hand_over(making)
    os.replace(making, socket)
    limits.drop_capability(limits.CAP_DAC_OVERRIDE)
    while not stop.is_set():
        silence = time.monotonic() - service.heard
        if silence >= idle_ttl_s and not cell.busy:
            break
        try:
            await asyncio.wait_for(stop.wait(), max(0.05, min(idle_ttl_s - silence, 60.0)))
        except TimeoutError:
            continue
    await server.stop(grace=0.2)
