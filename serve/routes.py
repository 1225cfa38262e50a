"""HTTP for everybody: routes, statuses and the bearer token as a FastAPI application; decides nothing about sessions.

`build_api` needs a `SandboxService`: in the deployment that is the pool's handle, in a test a pool in the same process.
Answers are serialised once, here, and not validated again: they come from our own pool.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, Depends, FastAPI, Path, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, TypeAdapter
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import FileRefused, SandboxServiceError, TokenRefused
from serve.schema import (
    CellRecord,
    CreateSession,
    Ended,
    ExecuteRequest,
    ExecuteResponse,
    Files,
    Forked,
    ForkSession,
    Health,
    Interrupted,
    Refusal,
    Session,
)
from serve.sessions import Event, SandboxService
from serve.wire import refusal

MAX_BODY_BYTES = 64 << 20
"""Of any request: the longest code with every character escaped."""
MAX_FILE_BYTES = 32 << 20
"""Of a file in or out: `serve.pool` says so."""
_NDJSON = "application/x-ndjson"
_journal = TypeAdapter(list[CellRecord])

Authorize = Callable[..., Awaitable[None]]
SessionId = Annotated[str, Path(description="as POST /v1/sessions answered", max_length=200)]
FilePath = Annotated[str, Path(description="relative to the session's home directory")]


class ServedPool(SandboxService, Protocol):
    """What the routes need: the sessions, and what every node says of itself."""

    async def node_stats(self) -> list[dict[str, Any]]: ...
    async def close_all(self) -> int: ...


def build_api(pool: ServedPool, *, token: str, nodes: int, compat: APIRouter | None = None) -> FastAPI:
    """`nodes`: how many a healthy service has. `compat`: the routes of `serve.compat`."""
    api = FastAPI(
        title="Aster sandbox",
        description="Stateful Python sessions in isolated cells.",
        version="1",
        redirect_slashes=False,  # a client would repeat a POST as told, and without its body or token
    )
    api.add_middleware(BodyLimit, limit=MAX_BODY_BYTES)
    api.add_exception_handler(SandboxServiceError, _refuse)
    api.add_exception_handler(RequestValidationError, _refuse_body)
    api.add_exception_handler(HTTPException, _refuse_http)
    api.include_router(_open_routes(pool, nodes=nodes))
    guarded = [Depends(bearer(token))]
    for router in (_session_routes(pool), _call_routes(pool), _file_routes(pool)):
        api.include_router(router, dependencies=guarded)
    if compat is not None:
        api.include_router(compat)
    return api


# who may call --------------------------------------------------------------------------------------------------------

_scheme = HTTPBearer(auto_error=False, description="the service's ASTER_SANDBOX_TOKEN")


def bearer(token: str) -> Authorize:
    """A dependency that raises `TokenRefused` unless the request carries `token`. Without one nobody is let in.

    Asynchronous like all of the path: FastAPI gives a plain function to a thread, which costs more than the comparison.
    """
    expected = token.encode()

    async def authorize(given: Annotated[HTTPAuthorizationCredentials | None, Depends(_scheme)]) -> None:
        if not expected:
            raise TokenRefused("this service has no token: set ASTER_SANDBOX_TOKEN where it is deployed")
        if given is None or not hmac.compare_digest(given.credentials.strip().encode(), expected):
            raise TokenRefused("missing or wrong bearer token")

    return authorize


async def from_loopback(request: Request) -> None:
    """A dependency that lets in, without a token, whoever calls from this machine."""
    host = request.client.host if request.client else ""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if not local:
        raise TokenRefused(f"calls without a token are taken from this machine only, not from {host or 'nowhere'!r}")


# routes --------------------------------------------------------------------------------------------------------------


def documented(*codes: int) -> dict[int | str, dict[str, Any]]:
    words = {
        400: "the body is not JSON",
        401: "no token, or a wrong one",
        404: "the session was never made here, or it has no such file",
        409: "the session cannot be copied: it has live threads or children",
        410: "the session is no more: closed, expired, or lost with its node (`error` says which)",
        413: "the body or the file is too large",
        422: "not a request that the service understands",
        429: "the service is full and did nothing: `Retry-After` seconds",
        503: "a node does not answer",
        504: "no answer in time; whether the call ran is not known",
        507: "no room for the file",
    }
    return {code: {"model": Refusal, "description": words[code]} for code in codes}


_ANY_CALL = (400, 401, 404, 410, 413, 422, 429, 503, 504)


def _json(body: BaseModel, status: int = 200) -> Response:
    return Response(body.model_dump_json(), status, media_type="application/json")


def _open_routes(pool: ServedPool, *, nodes: int) -> APIRouter:
    router = APIRouter(tags=["service"])

    @router.get("/healthz", response_model=Health, responses=documented(503))
    async def healthz() -> Response:
        """For load balancers: needs no token."""
        stats = await pool.node_stats()
        health = Health(
            status="ok" if len(stats) == nodes else "degraded",
            backend=",".join(sorted({str(node["backend"]) for node in stats})),
            nodes=len(stats),
            sessions=sum(int(node["sessions"]) for node in stats),
        )
        return _json(health)

    @router.get("/v1/ping")
    async def ping() -> str:
        """Answers "pong" while the ingress lives; needs no token."""
        return "pong"

    return router


def _session_routes(pool: ServedPool) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["sessions"])

    @router.post(
        "/sessions", status_code=201, response_model=Session, responses=documented(400, 401, 413, 422, 429, 503, 504)
    )
    async def create(body: CreateSession | None = None) -> Response:
        """A fresh session: one live interpreter."""
        return _json(await pool.create(body or CreateSession()), 201)

    @router.delete("/sessions", response_model=Ended, responses=documented(401, 503, 504))
    async def close_all() -> Response:
        """Ends every session of every node: before the service is removed for good."""
        return _json(Ended(sessions=await pool.close_all()))

    @router.get("/sessions/{session_id}", response_model=Session, responses=documented(*_ANY_CALL))
    async def get(session_id: SessionId) -> Response:
        return _json(await pool.get(session_id))

    @router.delete("/sessions/{session_id}", status_code=204, responses=documented(*_ANY_CALL))
    async def close(session_id: SessionId) -> Response:
        """Ends it and everything it started. Closing it again is no error."""
        await pool.close(session_id)
        return Response(status_code=204)

    @router.post("/sessions/{session_id}/reset", response_model=Session, responses=documented(*_ANY_CALL))
    async def reset(session_id: SessionId) -> Response:
        """A fresh interpreter and empty directories under the same id."""
        return _json(await pool.reset(session_id))

    @router.post(
        "/sessions/{session_id}/fork",
        status_code=201,
        response_model=Forked,
        responses=documented(*_ANY_CALL, 409),
    )
    async def fork(session_id: SessionId, body: ForkSession | None = None) -> Response:
        """Copies of the session after its last finished cell."""
        return _json(await pool.fork(session_id, body or ForkSession()), 201)

    @router.get("/sessions/{session_id}/journal", response_model=list[CellRecord], responses=documented(*_ANY_CALL))
    async def journal(session_id: SessionId) -> Response:
        """What ran in it, cell by cell."""
        return Response(_journal.dump_json(await pool.journal(session_id)), media_type="application/json")

    @router.get("/stats", response_model=dict[str, list[dict[str, Any]]], responses=documented(401, 503))
    async def stats() -> Response:
        return JSONResponse({"nodes": await pool.node_stats()})

    return router


def _call_routes(pool: ServedPool) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["calls"])
    streamed: dict[int | str, dict[str, Any]] = {
        200: {
            "description": "the answer; with `stream` lines of JSON: {output}, ..., and last {response} or {refusal}",
            "content": {_NDJSON: {"schema": {"type": "string"}}},
        }
    }

    @router.post(
        "/sessions/{session_id}/execute",
        response_model=ExecuteResponse,
        responses={**documented(*_ANY_CALL), **streamed},
    )
    async def execute(session_id: SessionId, body: ExecuteRequest) -> Response:
        """Run one cell. Status 200 whenever the session is alive or was rebuilt: a cell that fails is data."""
        if not body.stream:
            return _json(await pool.execute(session_id, body))
        events = pool.execute_stream(session_id, body)
        first = await anext(events)  # what is refused before the first line is still a status
        return StreamingResponse(_lines(first, events), media_type=_NDJSON)

    @router.post("/sessions/{session_id}/interrupt", response_model=Interrupted, responses=documented(*_ANY_CALL))
    async def interrupt(session_id: SessionId) -> Response:
        """SIGINT to the cell that runs now, as a person's Ctrl-C; does not wait for its end."""
        return _json(await pool.interrupt(session_id))

    return router


async def _lines(event: Event, rest: AsyncGenerator[Event, None]) -> AsyncIterator[str]:
    async with aclosing(rest):  # also when the client hangs up
        try:
            while True:
                key = "response" if isinstance(event, ExecuteResponse) else "output"
                yield f'{{"{key}":{event.model_dump_json()}}}\n'
                event = await anext(rest)
        except StopAsyncIteration:
            pass
        except SandboxServiceError as error:  # the status line is gone; say it in the last line instead
            yield f'{{"refusal":{refusal(error)[1].model_dump_json()}}}\n'


def _file_routes(pool: ServedPool) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["files"])
    raw = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}

    @router.get("/sessions/{session_id}/files", response_model=Files, responses=documented(*_ANY_CALL))
    async def files(session_id: SessionId) -> Response:
        """The files below the session's home directory."""
        return _json(await pool.list_files(session_id))

    @router.get(
        "/sessions/{session_id}/files/{path:path}",
        response_class=Response,
        responses={**documented(*_ANY_CALL), 200: {"description": "its bytes", **raw}},
    )
    async def read(session_id: SessionId, path: FilePath) -> Response:
        return Response(await pool.read_file(session_id, path), media_type="application/octet-stream")

    @router.put(
        "/sessions/{session_id}/files/{path:path}",
        status_code=204,
        responses=documented(*_ANY_CALL, 507),
        openapi_extra={"requestBody": {"required": True, **raw}},
    )
    async def write(session_id: SessionId, path: FilePath, request: Request) -> Response:
        """Writes the body to the file; parents are made."""
        content = bytearray()
        async for chunk in request.stream():
            content += chunk
            if len(content) > MAX_FILE_BYTES:
                raise FileRefused(413, f"a file has at most {MAX_FILE_BYTES >> 20} MB")
        await pool.write_file(session_id, path, bytes(content))
        return Response(status_code=204)

    return router


# refusals ------------------------------------------------------------------------------------------------------------


class BodyLimit:
    """413 as soon as more than `limit` bytes of a body have come, whatever its headers said."""

    def __init__(self, app: ASGIApp, *, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._limit:
                raise HTTPException(413, f"a request has at most {self._limit >> 20} MB")
            return message

        await self._app(scope, counted if scope["type"] == "http" else receive, send)


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, SandboxServiceError)
    status, body, headers = refusal(error)
    return Response(body.model_dump_json(), status, headers, media_type="application/json")


async def _refuse_body(request: Request, error: Exception) -> Response:
    """FastAPI's own answer repeats the input, which need not be something that JSON can carry."""
    assert isinstance(error, RequestValidationError)
    faults = (f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
    detail = "; ".join(faults).encode("utf-8", "backslashreplace").decode()
    return _json(Refusal(error="invalid", detail=detail), 422)


async def _refuse_http(request: Request, error: Exception) -> Response:
    """What FastAPI and Starlette refuse by themselves: no such route or method, a body that is not JSON."""
    assert isinstance(error, HTTPException)
    body = Refusal(error="invalid", detail=str(error.detail))
    return Response(body.model_dump_json(), error.status_code, error.headers, media_type="application/json")
