"""`roles.SandboxFactory` over HTTP, for a sandbox service that runs elsewhere; and its retry policy.

A request is sent again only when it may run twice: `open` and `execute` after a connection that was never made, and
`execute` after any broken connection, because its call id makes the session repeat its first answer.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

import httpx

from aster.errors import BackPressure, SandboxError, SandboxLost
from aster.roles import ExecResult, Sandbox
from serve.schema import CellRecord, CreateSession, ExecuteRequest, ExecuteResponse, Limits, Session

_CONNECT_S = 10.0
_OPEN_S = 120.0
_CLOSE_S = 30.0
_QUEUE_S = 180.0  # how long a call may wait for its turn at the node, beyond its own time limit
_TRIES = 3
_PAUSE_S = 0.5


class HttpSandbox:
    """One session of the service at `client.base_url`."""

    def __init__(self, session_id: str, client: httpx.AsyncClient, *, max_output_bytes: int) -> None:
        self.session_id = session_id
        self._client = client
        self._max_output_bytes = max_output_bytes
        self._closed = False

    async def execute(self, code: str, *, timeout_s: float, call_id: str) -> ExecResult:
        """Raises `SandboxLost`, or `BackPressure` when nothing ran."""
        body = ExecuteRequest(code=code, timeout_s=timeout_s, call_id=call_id, max_output_bytes=self._max_output_bytes)
        answer = await _request(
            self._client,
            "POST",
            f"/v1/sessions/{self.session_id}/execute",
            session_id=self.session_id,
            body=body.model_dump(mode="json"),
            timeout_s=timeout_s + _QUEUE_S,
            repeatable=bool(call_id),
        )
        return ExecuteResponse.model_validate_json(answer.content)

    async def fork(self) -> Sandbox:
        raise SandboxError(f"session {self.session_id}: this service cannot fork sessions")

    async def journal(self) -> list[CellRecord]:
        raise SandboxError(f"session {self.session_id}: this service keeps no journal")

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        path = f"/v1/sessions/{self.session_id}"
        try:
            await _request(
                self._client, "DELETE", path, session_id=self.session_id, timeout_s=_CLOSE_S, repeatable=True
            )
        except (SandboxLost, BackPressure):  # gone already, or ended by its own lease
            pass


class HttpSandboxFactory:
    """Opens sessions at `url` with the service's bearer `token`. Picklable; one connection pool per event loop."""

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        max_output_bytes: int = 32 << 10,
        memory_bytes: int = 1 << 30,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._url = url.rstrip("/")
        self._token = token
        self._max_output_bytes = max_output_bytes
        self._memory_bytes = memory_bytes
        self._transport = transport
        self._client: tuple[asyncio.AbstractEventLoop, httpx.AsyncClient] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_client": None}

    async def open(self, key: str) -> HttpSandbox:
        """A fresh session; `key` names the trajectory in errors. Raises `BackPressure`, `SandboxLost`."""
        client = self._connect()
        body = CreateSession(limits=Limits(memory_bytes=self._memory_bytes)).model_dump(mode="json")
        try:
            answer = await _request(client, "POST", "/v1/sessions", session_id="", body=body, timeout_s=_OPEN_S)
        except SandboxLost as error:
            raise SandboxLost("", f"{key}: {error.reason}") from error
        session = Session.model_validate_json(answer.content)
        return HttpSandbox(session.session_id, client, max_output_bytes=self._max_output_bytes)

    def _connect(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        if self._client is None or self._client[0] is not loop:
            headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
            client = httpx.AsyncClient(
                base_url=self._url, headers=headers, limits=limits, transport=self._transport, trust_env=False
            )
            self._client = loop, client
        return self._client[1]

    async def aclose(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client[1].aclose()


async def _request(
    client: httpx.AsyncClient,
    method: str,
    path: str,
    *,
    session_id: str,
    timeout_s: float,
    body: object = None,
    repeatable: bool = False,
) -> httpx.Response:
    """One exchange under a deadline, with the service's statuses as exceptions."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    for attempt in range(1, _TRIES + 1):
        left = deadline - asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(left):
                timeout = httpx.Timeout(left, connect=min(left, _CONNECT_S))
                answer = await client.request(method, path, json=body, timeout=timeout)
        except TimeoutError:
            raise SandboxLost(session_id, f"no answer within {timeout_s:g} s") from None
        except httpx.TransportError as error:
            never_sent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
            if not (repeatable or never_sent) or attempt == _TRIES:
                raise SandboxLost(session_id, f"{type(error).__name__}: {error}") from error
        else:
            if answer.status_code < 500 or not repeatable or attempt == _TRIES:
                return _checked(answer, session_id)
        await asyncio.sleep(min(_PAUSE_S * 2**attempt * random.uniform(0.5, 1.0), max(0.0, left)))
    raise AssertionError("the last attempt returns or raises")


def _checked(answer: httpx.Response, session_id: str) -> httpx.Response:
    if answer.is_success:
        return answer
    words = _words(answer)
    if answer.status_code == 429:
        raise BackPressure(_retry_after(answer), words)
    if answer.status_code == 401:
        raise SandboxError(f"{answer.request.url.host} refuses the token (ASTER_SANDBOX_TOKEN): {words}")
    if answer.status_code == 422:
        raise SandboxError(f"the service does not understand the request: {words}")
    raise SandboxLost(session_id, f"HTTP {answer.status_code}: {words}")


def _words(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["detail"])[:500]
    except (ValueError, KeyError, TypeError):
        return answer.text[:500]


def _retry_after(answer: httpx.Response) -> float:
    try:
        return max(0.1, float(answer.headers["Retry-After"]))
    except (KeyError, ValueError):
        return 2.0
