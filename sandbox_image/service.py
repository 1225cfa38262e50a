"""The gRPC face of a cell: translates messages, decides nothing. Imported after the zygote runs (it starts threads)."""

from __future__ import annotations

import asyncio
import os
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc

from sandbox_image import limits
from sandbox_image.processes import Zygote, ZygoteDied
from sandbox_image.proto import cell_pb2, cell_pb2_grpc
from sandbox_image.slot import Limits, Outcome, oom_kills

if TYPE_CHECKING:  # a running supervisor is __main__: importing it by name would make a second copy
    from sandbox_image.supervisor import Cell

Context: TypeAlias = grpc.aio.ServicerContext


class CellService(cell_pb2_grpc.CellServicer):
    def __init__(self, cell: Cell, zygote: Zygote) -> None:
        self._cell, self._zygote = cell, zygote
        self.heard = time.monotonic()
        self.running = 0

    async def Open(self, request: cell_pb2.OpenRequest, context: Context) -> cell_pb2.OpenReply:
        self.heard = time.monotonic()
        wanted = Limits(request.memory_bytes, request.processes, request.file_bytes)
        try:
            await self._cell.open(request.session_id, wanted)
        except KeyError:
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, "this session id is in use")
        except (ZygoteDied, OSError, RuntimeError) as error:  # NoSlot is a RuntimeError
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        return cell_pb2.OpenReply()

    async def Execute(self, request: cell_pb2.ExecuteRequest, context: Context) -> cell_pb2.ExecuteReply:
        self.heard = time.monotonic()
        if request.session_id not in self._cell.sessions:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such session in this cell")
        self.running += 1
        try:
            outcome, queue_s = await self._cell.execute(
                request.session_id,
                request.code,
                timeout_s=request.timeout_s,
                call_id=request.call_id,
                keep=request.max_output_bytes,
            )
        except (ZygoteDied, OSError) as error:  # the interpreter died before and cannot be made anew
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"no fresh interpreter: {error}")
        finally:
            self.running -= 1
            self.heard = time.monotonic()
        return reply(outcome, queue_s)

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
                cell_pb2.SessionStatus(session_id=key, cells=s.cells, running=s.lock.locked(), pid=s.process.pid)
                for key, s in cell.sessions.items()
            ],
        )


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
        **body,
    )


def _valid(text: str) -> str:
    """A session's JSON may smuggle surrogates, which protobuf refuses."""
    return text.encode("utf-8", "backslashreplace").decode()


async def serve(
    cell: Cell, zygote: Zygote, *, socket: Path, idle_ttl_s: float, stop: asyncio.Event, message_bytes: int
) -> None:
    """Until `stop` is set or nobody has spoken for `idle_ttl_s`. The socket gets its name when all is ready."""
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", message_bytes),
            ("grpc.max_send_message_length", message_bytes),
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
        if silence >= idle_ttl_s and not service.running:
            break
        try:
            await asyncio.wait_for(stop.wait(), max(0.05, min(idle_ttl_s - silence, 60.0)))
        except TimeoutError:
            continue
    await server.stop(grace=0.2)
