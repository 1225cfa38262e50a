"""The HTTP service for programs with an event loop. `serve.blocking` is for those without one.

    async with AsyncSandboxClient("http://127.0.0.1:8000", token=token) as client, client.session() as session:
        await session.execute("x = 41")
        (await session.execute("x + 1")).result        # "42"

A cell that fails is a result. A service that fails is an exception of `serve.errors`: `SandboxUnavailable`,
`SessionLost`, `SessionGone`, `PoolFull`, ... A request is sent again only where that cannot do a thing twice: always
when it never left, and after a broken connection or a 5xx when it is repeatable, which an execute is by its call id.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, TypeAdapter, ValidationError

from serve.errors import FileRefused, PoolFull, SandboxServiceError, SandboxUnavailable, SessionUnknown
from serve.schema import (
    CellRecord,
    CreateSession,
    ExecuteRequest,
    ExecuteResponse,
    Files,
    Forked,
    ForkSession,
    Health,
    Interrupted,
    OutputChunk,
    Session,
)
from serve.sessions import AsyncSession, Event
from serve.wire import exception

_CONNECT_S = 10.0
_CONTROL_S = 60.0
_QUEUE_S = 240.0  # how long a call may wait for a session or its turn at the node, beyond its own time limit
_TRIES = 3
_PAUSE_S = 0.5
_NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
_journal = TypeAdapter(list[CellRecord])
T = TypeVar("T", bound=BaseModel)


class AsyncSandboxClient:
    """`serve.sessions.SandboxService` over HTTP. Belongs to the event loop that first uses it; `async with` closes it.

    `full_wait_s`: how long to go on asking a service that is full (429), as slowly as it says; 0 raises `PoolFull`.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        full_wait_s: float = 60.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._http = httpx.AsyncClient(
            base_url=url.rstrip("/"), headers=headers, limits=limits, transport=transport, trust_env=False
        )
        self._full_wait_s = full_wait_s

    async def __aenter__(self) -> AsyncSandboxClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._http.aclose()

    def session(self, request: CreateSession | None = None, *, rebuild: bool = True) -> _Opening:
        """`async with client.session() as session:`, or `session = await client.session()` and `close()` later."""
        return _Opening(self, request, rebuild=rebuild)

    # the service ---------------------------------------------------------------------------------------------------

    async def create(self, request: CreateSession) -> Session:
        answer = await self._exchange("POST", "/v1/sessions", json=request, timeout_s=_QUEUE_S)
        return _parsed(Session, answer)

    async def get(self, session_id: str) -> Session:
        return _parsed(Session, await self._exchange("GET", _path(session_id), session_id, repeatable=True))

    async def execute(self, session_id: str, request: ExecuteRequest) -> ExecuteResponse:
        answer = await self._exchange(
            "POST",
            _path(session_id, "execute"),
            session_id,
            json=request,
            timeout_s=request.timeout_s + _QUEUE_S,
            repeatable=bool(request.call_id),
        )
        return _parsed(ExecuteResponse, answer)

    async def execute_stream(self, session_id: str, request: ExecuteRequest) -> AsyncGenerator[Event, None]:
        """Output as it is printed; the response comes last. Never sent again: what was shown cannot be taken back."""
        seconds = request.timeout_s + _QUEUE_S
        body = request.model_copy(update={"stream": True}).model_dump(mode="json")
        timeout = httpx.Timeout(seconds, connect=_CONNECT_S)
        try:
            async with self._http.stream("POST", _path(session_id, "execute"), json=body, timeout=timeout) as answer:
                if not answer.is_success:
                    await answer.aread()
                    raise _refused(answer, session_id)
                async for line in answer.aiter_lines():
                    yield _event(line, session_id)
        except httpx.TransportError as error:
            raise SandboxUnavailable(f"the stream broke: {type(error).__name__}: {error}", 504) from error

    async def interrupt(self, session_id: str) -> Interrupted:
        return _parsed(Interrupted, await self._exchange("POST", _path(session_id, "interrupt"), session_id))

    async def reset(self, session_id: str) -> Session:
        answer = await self._exchange("POST", _path(session_id, "reset"), session_id, repeatable=True)
        return _parsed(Session, answer)

    async def fork(self, session_id: str, request: ForkSession) -> Forked:
        answer = await self._exchange("POST", _path(session_id, "fork"), session_id, json=request, timeout_s=_QUEUE_S)
        return _parsed(Forked, answer)

    async def journal(self, session_id: str) -> list[CellRecord]:
        answer = await self._exchange("GET", _path(session_id, "journal"), session_id, repeatable=True)
        return _journal.validate_json(answer.content)

    async def write_file(self, session_id: str, path: str, content: bytes) -> None:
        """Raises `FileRefused`."""
        await self._exchange("PUT", _path(session_id, "files", path), session_id, content=content, repeatable=True)

    async def read_file(self, session_id: str, path: str) -> bytes:
        """Raises `FileRefused`."""
        return (await self._exchange("GET", _path(session_id, "files", path), session_id, repeatable=True)).content

    async def list_files(self, session_id: str) -> Files:
        return _parsed(Files, await self._exchange("GET", _path(session_id, "files"), session_id, repeatable=True))

    async def close(self, session_id: str) -> None:
        await self._exchange("DELETE", _path(session_id), session_id, repeatable=True)

    async def health(self) -> Health:
        """Needs no token."""
        return _parsed(Health, await self._exchange("GET", "/healthz", repeatable=True))

    async def stats(self) -> list[dict[str, Any]]:
        """One entry per sandbox node."""
        answer = await self._exchange("GET", "/v1/stats", repeatable=True)
        nodes: list[dict[str, Any]] = answer.json()["nodes"]
        return nodes

    # one exchange --------------------------------------------------------------------------------------------------

    async def _exchange(
        self,
        method: str,
        path: str,
        session_id: str = "",
        *,
        json: BaseModel | None = None,
        content: bytes | None = None,
        timeout_s: float = _CONTROL_S,
        repeatable: bool = False,
    ) -> httpx.Response:
        loop = asyncio.get_running_loop()
        began, failures = loop.time(), 0
        body = None if json is None else json.model_dump(mode="json")
        while True:
            try:
                return await self._once(method, path, session_id, json=body, content=content, timeout_s=timeout_s)
            except PoolFull as full:
                if loop.time() - began + full.retry_after_s > self._full_wait_s:
                    raise
                pause = full.retry_after_s
            except _Failed as failed:
                failures += 1
                if failures == _TRIES or not (repeatable or failed.never_sent):
                    raise failed.error from failed.__cause__
                pause = _PAUSE_S * 2**failures
            await asyncio.sleep(pause * random.uniform(0.5, 1.0) if failures else pause)

    async def _once(
        self, method: str, path: str, session_id: str, *, json: object, content: bytes | None, timeout_s: float
    ) -> httpx.Response:
        """Raises `_Failed` for what may be tried again, and whatever the service refuses."""
        timeout = httpx.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_S))
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self._http.request(method, path, json=json, content=content, timeout=timeout)
        except TimeoutError:
            raise SandboxUnavailable(f"no answer within {timeout_s:g} s", 504) from None
        except httpx.TransportError as error:
            never_sent = isinstance(error, _NEVER_SENT)
            words = f"{self._http.base_url}: {type(error).__name__}: {error}"
            raise _Failed(SandboxUnavailable(words, 503 if never_sent else 504), never_sent=never_sent) from error
        if answer.is_success:
            return answer
        refused = _refused(answer, session_id)
        if isinstance(refused, SandboxUnavailable):
            raise _Failed(refused, never_sent=False)
        raise refused


class _Failed(Exception):
    """An exchange that gave no answer, or a 5xx."""

    def __init__(self, error: SandboxUnavailable, *, never_sent: bool) -> None:
        super().__init__(str(error))
        self.error = error
        self.never_sent = never_sent


class _Opening:
    """A session that is about to be opened: awaited, or entered."""

    def __init__(self, client: AsyncSandboxClient, request: CreateSession | None, *, rebuild: bool) -> None:
        self._open = AsyncSession.open(client, request, rebuild=rebuild)

    def __await__(self) -> Any:
        return self._open.__await__()

    async def __aenter__(self) -> AsyncSession:
        self._session = await self._open
        return self._session

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.__aexit__(kind, error, trace)


def _path(session_id: str, *parts: str) -> str:
    """Escaped, so that no id and no file name can leave its place in the path."""
    if session_id in ("", ".", ".."):
        raise SessionUnknown(session_id)
    if any(".." in part.split("/") for part in parts):
        raise FileRefused(422, f"{parts[-1]!r} leads out of the session's home directory")
    return "/".join(["/v1/sessions", quote(session_id, safe=""), *(quote(part, safe="/") for part in parts)])


def _parsed(kind: type[T], answer: httpx.Response) -> T:
    try:
        return kind.model_validate_json(answer.content)
    except ValidationError as error:
        raise SandboxUnavailable(f"{answer.request.url} is not this service: {error}") from error


def _refused(answer: httpx.Response, session_id: str) -> SandboxServiceError:
    try:
        body = answer.json()
        word, detail = str(body["error"]), str(body["detail"])
    except (ValueError, KeyError, TypeError):
        word, detail = "", answer.text
    return exception(
        answer.status_code, word, detail[:2000], session_id=session_id, retry_after=answer.headers.get("Retry-After")
    )


def _event(line: str, session_id: str) -> Event:
    entry = json.loads(line)
    if "response" in entry:
        return ExecuteResponse.model_validate(entry["response"])
    if "refusal" in entry:
        raise exception(503, entry["refusal"]["error"], entry["refusal"]["detail"], session_id=session_id)
    return OutputChunk.model_validate(entry["output"])
