"""Sessions of the sandbox service as `roles.Sandbox`: its records are the same, its refusals become our two policies.

`ServiceSandbox` does not know how the service is reached. `HttpSandboxFactory` reaches one that runs elsewhere over
HTTP; `actors.sandbox.HandleSandboxFactory` one on this Ray cluster by its handle.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from aster.errors import BackPressure, SandboxError, SandboxLost
from aster.roles import ExecResult
from serve.client import AsyncSandboxClient
from serve.errors import (
    PoolFull,
    SandboxServiceError,
    SandboxUnavailable,
    SessionGone,
    SessionUnknown,
    TokenRefused,
)
from serve.schema import CellRecord, CreateSession
from serve.sessions import AsyncSession, SandboxService


class ServiceSandbox:
    """One session of a trajectory. A node that is lost costs a replay of its cells, not the trajectory."""

    def __init__(self, session: AsyncSession, *, max_output_bytes: int) -> None:
        self.session_id = session.session_id
        self._session = session
        self._max_output_bytes = max_output_bytes

    async def execute(self, code: str, *, timeout_s: float, call_id: str) -> ExecResult:
        """Raises `SandboxLost`, or `BackPressure` when nothing ran."""
        with _policies(self.session_id):
            answer = await self._session.execute(
                code, timeout_s=timeout_s, call_id=call_id, max_output_bytes=self._max_output_bytes
            )
        self.session_id = self._session.session_id  # another one after a rebuild
        return answer

    async def fork(self) -> ServiceSandbox:
        """A copy as the session is now. Raises `SandboxError` when it has live threads or children."""
        with _policies(self.session_id):
            (copy,) = await self._session.fork()
        return ServiceSandbox(copy, max_output_bytes=self._max_output_bytes)

    async def journal(self) -> list[CellRecord]:
        with _policies(self.session_id):
            return await self._session.journal()

    async def close(self) -> None:
        try:
            await self._session.close()
        except SandboxServiceError:  # gone with its node, or ended by its own lease in time
            pass


async def open_sandbox(
    service: SandboxService, key: str, *, session: CreateSession, max_output_bytes: int, rebuild: bool
) -> ServiceSandbox:
    """A fresh session; `key` names the trajectory in errors. Raises `BackPressure`, `SandboxLost`."""
    try:
        with _policies(""):
            opened = await AsyncSession.open(service, session, rebuild=rebuild)
    except SandboxLost as error:
        raise SandboxLost("", f"{key}: {error.reason}") from error
    return ServiceSandbox(opened, max_output_bytes=max_output_bytes)


class HttpSandboxFactory:
    """Opens sessions at `url` with the service's bearer `token`. Picklable; one connection pool per event loop."""

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        session: CreateSession | None = None,
        max_output_bytes: int = 32 << 10,
        rebuild: bool = True,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._url = url
        self._token = token
        self._session = session or CreateSession()
        self._max_output_bytes = max_output_bytes
        self._rebuild = rebuild
        self._transport = transport
        self._client: tuple[asyncio.AbstractEventLoop, AsyncSandboxClient] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_client": None}

    async def open(self, key: str) -> ServiceSandbox:
        """A fresh session; `key` names the trajectory in errors. Raises `BackPressure`, `SandboxLost`."""
        return await open_sandbox(
            self._connect(),
            key,
            session=self._session,
            max_output_bytes=self._max_output_bytes,
            rebuild=self._rebuild,
        )

    def _connect(self) -> AsyncSandboxClient:
        loop = asyncio.get_running_loop()
        if self._client is None or self._client[0] is not loop:
            # A rollout has its own patience with a full service.
            client = AsyncSandboxClient(self._url, token=self._token, full_wait_s=0.0, transport=self._transport)
            self._client = loop, client
        return self._client[1]

    async def aclose(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client[1].aclose()


@contextmanager
def _policies(session_id: str) -> Iterator[None]:
    """The service's refusals as what a rollout may do about them."""
    try:
        yield
    except PoolFull as error:
        raise BackPressure(error.retry_after_s, error.reason) from None
    except (SessionGone, SessionUnknown, SandboxUnavailable) as error:
        raise SandboxLost(session_id, str(error)) from error
    except TokenRefused as error:
        raise SandboxError(f"the sandbox service refuses the token (ASTER_SANDBOX_TOKEN): {error}") from error
    except SandboxServiceError as error:
        raise SandboxError(str(error)) from error
