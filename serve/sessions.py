"""One session as its user holds it, whichever way the service is reached: in process, by Serve handle, over HTTP.

`SandboxService` is what the three ways have in common. `AsyncSession` is a session of any of them, and the one place
that rebuilds a session whose node was lost. Neither ray nor httpx is imported here.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from serve.errors import SandboxServiceError, SessionGone, SessionLost
from serve.schema import (
    CellRecord,
    CreateSession,
    ExecuteRequest,
    ExecuteResponse,
    FileInfo,
    Files,
    Forked,
    ForkSession,
    Interrupted,
    OutputChunk,
    Session,
    State,
    Status,
)

Event = OutputChunk | ExecuteResponse
"""Of a stream: output as it is printed, and last the response."""
_REPEATABLE = frozenset({Status.OK, Status.ERROR})


class SandboxService(Protocol):
    """`serve.pool.SandboxPool` in process, `serve.calls.PoolCalls` by handle, `serve.client.AsyncSandboxClient` over
    HTTP. All raise the exceptions of `serve.errors`."""

    async def create(self, request: CreateSession) -> Session: ...
    async def get(self, session_id: str) -> Session: ...
    async def execute(self, session_id: str, request: ExecuteRequest) -> ExecuteResponse: ...
    def execute_stream(self, session_id: str, request: ExecuteRequest) -> AsyncGenerator[Event, None]: ...
    async def interrupt(self, session_id: str) -> Interrupted: ...
    async def reset(self, session_id: str) -> Session: ...
    async def fork(self, session_id: str, request: ForkSession) -> Forked: ...
    async def journal(self, session_id: str) -> list[CellRecord]: ...
    async def write_file(self, session_id: str, path: str, content: bytes) -> None: ...
    async def read_file(self, session_id: str, path: str) -> bytes: ...
    async def list_files(self, session_id: str) -> Files: ...
    async def close(self, session_id: str) -> None: ...


@dataclass(frozen=True)
class _Ran:
    """A cell as it must be run again, and what must come of it."""

    request: ExecuteRequest
    status: Status
    text_sha256: str

    @classmethod
    def of(cls, request: ExecuteRequest, answer: ExecuteResponse) -> _Ran:
        return cls(request, answer.status, _digest(answer.text))


class AsyncSession:
    """A session of `service`; `async with` closes it.

    With `rebuild`, what ran is remembered, and when the session is lost with its node (`SessionLost`) it is run again
    in a fresh one, output for output. The interrupted call then runs there and says `state: replayed`; where an output
    differs, or a file or an interrupt changed what no cell did, `SessionLost` it stays. Calls one at a time.
    """

    def __init__(
        self,
        service: SandboxService,
        session_id: str,
        *,
        request: CreateSession | None = None,
        rebuild: bool = True,
        history: Sequence[_Ran] | None = (),
    ) -> None:
        self.session_id = session_id
        self._service = service
        self._request = request or CreateSession()
        self._rebuild = rebuild
        # by call id; None: the past cannot be repeated
        self._history = None if history is None else {ran.request.call_id: ran for ran in history}
        self._closed = False

    @classmethod
    async def open(
        cls, service: SandboxService, request: CreateSession | None = None, *, rebuild: bool = True
    ) -> AsyncSession:
        request = request or CreateSession()
        opened = await service.create(request)
        return cls(service, opened.session_id, request=request, rebuild=rebuild)

    async def __aenter__(self) -> AsyncSession:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.close()
        except SandboxServiceError:
            if error is None:
                raise

    async def execute(
        self,
        code: str,
        *,
        timeout_s: float = 30.0,
        call_id: str = "",
        max_output_bytes: int = 32 << 10,
        figures: bool = False,
    ) -> ExecuteResponse:
        """Run one cell. A repeated `call_id` (made up when empty) returns the first answer and runs nothing."""
        request = ExecuteRequest(
            code=code,
            timeout_s=timeout_s,
            call_id=call_id or secrets.token_hex(8),
            max_output_bytes=max_output_bytes,
            figures=figures,
        )
        try:
            answer = await self._service.execute(self.session_id, request)
        except SessionLost as lost:
            await self._replay(lost)
            answer = await self._service.execute(self.session_id, request)
            if answer.state is State.KEPT:
                answer = answer.model_copy(update={"state": State.REPLAYED})
        self._remember(request, answer)
        return answer

    async def stream(
        self,
        code: str,
        *,
        timeout_s: float = 30.0,
        call_id: str = "",
        max_output_bytes: int = 32 << 10,
        figures: bool = False,
    ) -> AsyncGenerator[Event, None]:
        """`execute`, with the output as it is printed; the response comes last. A lost stream is not rebuilt."""
        request = ExecuteRequest(
            code=code,
            timeout_s=timeout_s,
            call_id=call_id or secrets.token_hex(8),
            max_output_bytes=max_output_bytes,
            figures=figures,
            stream=True,
        )
        async with aclosing(self._service.execute_stream(self.session_id, request)) as events:
            async for event in events:
                if isinstance(event, ExecuteResponse):
                    self._remember(request.model_copy(update={"stream": False}), event)
                yield event

    async def interrupt(self) -> bool:
        """SIGINT to the cell that runs now; whether there was one."""
        answer = await self._service.interrupt(self.session_id)
        if answer.was_running:
            self._history = None
        return answer.was_running

    async def reset(self) -> None:
        """A fresh interpreter and empty directories under the same id."""
        await self._service.reset(self.session_id)
        self._history = {}

    async def fork(self, count: int = 1) -> list[AsyncSession]:
        """Copies of the session as it is now, each of which lives and ends by itself."""
        answer = await self._service.fork(self.session_id, ForkSession(count=count))
        past = None if self._history is None else list(self._history.values())
        return [
            AsyncSession(self._service, copy.session_id, request=self._request, rebuild=self._rebuild, history=past)
            for copy in answer.sessions
        ]

    async def journal(self) -> list[CellRecord]:
        return await self._service.journal(self.session_id)

    async def write_file(self, path: str, content: bytes) -> None:
        """`path` is relative to the session's home directory; parents are made."""
        self._history = None
        await self._service.write_file(self.session_id, path, content)

    async def read_file(self, path: str) -> bytes:
        return await self._service.read_file(self.session_id, path)

    async def files(self) -> list[FileInfo]:
        return (await self._service.list_files(self.session_id)).files

    async def close(self) -> None:
        """Idempotent; a session that is gone already is closed."""
        if self._closed:
            return
        self._closed = True
        try:
            await self._service.close(self.session_id)
        except SessionGone:
            pass

    def _remember(self, request: ExecuteRequest, answer: ExecuteResponse) -> None:
        if answer.state is State.LOST:  # the interpreter is a fresh one: what ran in the old one has left no trace
            self._history = {}
        if self._history is None or request.call_id in self._history:
            return
        if answer.status in _REPEATABLE:
            self._history[request.call_id] = _Ran.of(request, answer)
        elif answer.state is not State.LOST:  # how far an interrupted cell came is chance
            self._history = None

    async def _replay(self, lost: SessionLost) -> None:
        """Put a fresh session with the same past in place of the lost one, or raise `SessionLost` with the reason."""
        if not self._rebuild or self._closed:
            raise lost
        if self._history is None:
            raise SessionLost(self.session_id, f"{lost.reason}; its past cannot be repeated") from lost
        fresh = await self._service.create(self._request)
        try:
            for number, ran in enumerate(self._history.values(), 1):
                again = _Ran.of(ran.request, await self._service.execute(fresh.session_id, ran.request))
                if again != ran:
                    reason = f"{lost.reason}; when run again, cell {number} had another outcome"
                    raise SessionLost(self.session_id, reason) from lost
        except BaseException:
            await _close_quietly(self._service, fresh.session_id)
            raise
        self.session_id = fresh.session_id


async def _close_quietly(service: SandboxService, session_id: str) -> None:
    """Tidying up behind an error, which matters more than one of its own; the lease ends the session anyway."""
    try:
        await service.close(session_id)
    except SandboxServiceError:
        pass


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()
