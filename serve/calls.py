"""SandboxPool by its Serve handle: the same methods, each under a deadline, with Serve's failures as `serve.errors`.

Used by the HTTP ingress and by rollout actors. A session's calls carry its id to the router, which reads its owner.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import ray.exceptions
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from serve.errors import PoolFull, SandboxUnavailable, SessionLost
from serve.router import ask
from serve.schema import (
    CellRecord,
    CreateSession,
    ExecuteRequest,
    ExecuteResponse,
    Files,
    Forked,
    ForkSession,
    Interrupted,
    Session,
)
from serve.sessions import Event

_CONTROL_S = 60.0  # what needs no turn at the node
_STATS_S = 10.0
_BUSY_S = 2.0
_SUCCESSOR_S, _PAUSE_S = 30.0, 0.25  # Serve starts a killed replica again within seconds
_HANDLES = 4096


class PoolCalls:
    """`serve.sessions.SandboxService` over a deployment handle.

    `queue_s`: how long a call may wait for a session or for its turn at the node, beyond its own time limit.
    """

    def __init__(self, pool: DeploymentHandle, *, queue_s: float = 180.0) -> None:
        self._pool = pool.options(_by_reference=False)  # gRPC between replicas: no object store, a third of the time
        self._queue_s = queue_s
        self._handles: OrderedDict[tuple[str, str], DeploymentHandle] = OrderedDict()

    async def create(self, request: CreateSession) -> Session:
        """A pool that dies over it is no reason to give up: nothing has run, and its successor ends what was made."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with failures("", self._queue_s):
            while True:
                try:
                    session: Session = await ask(self._handle("create", ""), request)
                except ray.exceptions.RayActorError:
                    if loop.time() - began > _SUCCESSOR_S:
                        raise
                    await asyncio.sleep(_PAUSE_S)
                else:
                    return session

    async def get(self, session_id: str) -> Session:
        session: Session = await self._call("get", session_id)
        return session

    async def execute(self, session_id: str, request: ExecuteRequest) -> ExecuteResponse:
        answer: ExecuteResponse = await self._call(
            "execute",
            session_id,
            request,
            deadline_s=request.timeout_s + self._queue_s,
            repeatable=bool(request.call_id),
        )
        return answer

    async def execute_stream(self, session_id: str, request: ExecuteRequest) -> AsyncGenerator[Event, None]:
        """Output as it is printed; the response comes last."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + request.timeout_s + self._queue_s
        handle = self._pool.options(method_name="execute_stream", session_id=session_id, stream=True)
        events = cast(DeploymentResponseGenerator[Event], handle.remote(session_id, request))
        try:
            while True:
                async with failures(session_id, deadline - loop.time()):
                    try:
                        event = await anext(events)
                    except StopAsyncIteration:
                        return
                yield event
        finally:
            events.cancel()

    async def interrupt(self, session_id: str) -> Interrupted:
        answer: Interrupted = await self._call("interrupt", session_id, repeatable=False)
        return answer

    async def reset(self, session_id: str) -> Session:
        session: Session = await self._call("reset", session_id)
        return session

    async def fork(self, session_id: str, request: ForkSession) -> Forked:
        """Waits for the session's turn: its last cell ends first."""
        forked: Forked = await self._call("fork", session_id, request, deadline_s=self._queue_s, repeatable=False)
        return forked

    async def journal(self, session_id: str) -> list[CellRecord]:
        records: list[CellRecord] = await self._call("journal", session_id)
        return records

    async def write_file(self, session_id: str, path: str, content: bytes) -> None:
        await self._call("write_file", session_id, path, content)

    async def read_file(self, session_id: str, path: str) -> bytes:
        content: bytes = await self._call("read_file", session_id, path)
        return content

    async def list_files(self, session_id: str) -> Files:
        files: Files = await self._call("list_files", session_id)
        return files

    async def close(self, session_id: str) -> None:
        await self._call("close", session_id)

    async def close_all(self) -> int:
        """End every session of every node; how many they were. Raises `SandboxUnavailable`."""
        async with failures("", _CONTROL_S):
            return sum(await self._pool.broadcast("close_all").results_async(timeout_s=_CONTROL_S))

    async def node_stats(self) -> list[dict[str, Any]]:
        """One entry per pool. Raises `SandboxUnavailable` when one does not answer."""
        async with failures("", _STATS_S):
            return list(await self._pool.broadcast("stats").results_async(timeout_s=_STATS_S))

    async def _call(
        self,
        method: str,
        session_id: str,
        *args: object,
        deadline_s: float = _CONTROL_S,
        repeatable: bool = True,
    ) -> Any:
        handle = self._handle(method, session_id)
        async with failures(session_id, deadline_s):
            try:
                return await handle.remote(session_id, *args)
            except ray.exceptions.RayActorError:
                if not repeatable:
                    raise
            # The pool died, not its cells: its successor adopts them, and they remember what they have answered.
            return await handle.remote(session_id, *args)

    def _handle(self, method: str, session_id: str) -> DeploymentHandle:
        """Kept for the sessions in use: `options()` costs more than a call's share of it should."""
        key = method, session_id
        handle = self._handles.get(key)
        if handle is None:
            handle = self._handles[key] = self._pool.options(method_name=method, session_id=session_id)
            if len(self._handles) > _HANDLES:
                self._handles.popitem(last=False)
        return handle


@asynccontextmanager
async def failures(session_id: str, deadline_s: float) -> AsyncIterator[None]:
    """A deadline, and what Serve and Ray raise, as what the service refuses."""
    try:
        async with asyncio.timeout(deadline_s):
            yield
    except BackPressureError as error:
        raise PoolFull(_BUSY_S, str(error)) from None
    except TimeoutError:
        raise SandboxUnavailable(f"no answer within {deadline_s:g} s", 504) from None
    except ray.exceptions.RayActorError as error:
        if session_id:
            raise SessionLost(session_id, f"its pool died during the call ({type(error).__name__})") from error
        raise SandboxUnavailable(f"a sandbox pool died during the call: {error}") from error
    except (ray.exceptions.RaySystemError, RayServeException) as error:
        raise SandboxUnavailable(f"{type(error).__name__}: {error}") from error
