"""The HTTP service for programs without an event loop: `SandboxClient` and its sessions, over `serve.client`.

    with SandboxClient("http://127.0.0.1:8000", token=token) as client, client.session() as session:
        session.execute("x = 41")
        session.execute("x + 1").result        # "42"

One thread runs the asynchronous client, so that retries, streams and rebuilding exist once. Any thread may call; a
session takes one call at a time. Not for use after os.fork: the child has no such thread.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from types import TracebackType
from typing import Any, TypeVar

from serve.client import AsyncSandboxClient
from serve.errors import SandboxServiceError
from serve.schema import CellRecord, CreateSession, ExecuteResponse, FileInfo, Health
from serve.sessions import AsyncSession, Event

T = TypeVar("T")
_JOIN_S = 10.0


class _Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sandbox-client", daemon=True)
        self._thread.start()

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        """Its result; an exception in the waiting thread (Ctrl-C) cancels it."""
        future = asyncio.run_coroutine_threadsafe(call, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_JOIN_S)
        if not self._thread.is_alive():
            self._loop.close()


class SandboxClient:
    """Arguments and errors as `AsyncSandboxClient`'s."""

    def __init__(self, url: str, *, token: str | None = None, full_wait_s: float = 60.0) -> None:
        self._loop = _Loop()
        self._client = AsyncSandboxClient(url, token=token, full_wait_s=full_wait_s)

    def __enter__(self) -> SandboxClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._loop.run(self._client.aclose())
        self._loop.stop()

    def session(self, request: CreateSession | None = None, *, rebuild: bool = True) -> SandboxSession:
        """A fresh session; `with` closes it."""
        return SandboxSession(self._loop, self._loop.run(AsyncSession.open(self._client, request, rebuild=rebuild)))

    def health(self) -> Health:
        return self._loop.run(self._client.health())

    def stats(self) -> list[dict[str, Any]]:
        return self._loop.run(self._client.stats())


class SandboxSession:
    """`serve.sessions.AsyncSession`, whose methods wait."""

    def __init__(self, loop: _Loop, session: AsyncSession) -> None:
        self._loop = loop
        self._session = session

    @property
    def session_id(self) -> str:
        return self._session.session_id

    def __enter__(self) -> SandboxSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except SandboxServiceError:
            if error is None:
                raise

    def execute(
        self,
        code: str,
        *,
        timeout_s: float = 30.0,
        call_id: str = "",
        max_output_bytes: int = 32 << 10,
        figures: bool = False,
    ) -> ExecuteResponse:
        call = self._session.execute(
            code, timeout_s=timeout_s, call_id=call_id, max_output_bytes=max_output_bytes, figures=figures
        )
        return self._loop.run(call)

    def stream(
        self, code: str, *, timeout_s: float = 30.0, call_id: str = "", max_output_bytes: int = 32 << 10
    ) -> Iterator[Event]:
        """Output as it is printed; the response comes last."""
        events = self._session.stream(code, timeout_s=timeout_s, call_id=call_id, max_output_bytes=max_output_bytes)
        try:
            while (event := self._loop.run(_next(events))) is not None:
                yield event
        finally:
            self._loop.run(events.aclose())

    def interrupt(self) -> bool:
        """From another thread than the one that waits for the cell."""
        return self._loop.run(self._session.interrupt())

    def reset(self) -> None:
        self._loop.run(self._session.reset())

    def fork(self, count: int = 1) -> list[SandboxSession]:
        return [SandboxSession(self._loop, copy) for copy in self._loop.run(self._session.fork(count))]

    def journal(self) -> list[CellRecord]:
        return self._loop.run(self._session.journal())

    def write_file(self, path: str, content: bytes) -> None:
        self._loop.run(self._session.write_file(path, content))

    def read_file(self, path: str) -> bytes:
        return self._loop.run(self._session.read_file(path))

    def files(self) -> list[FileInfo]:
        return self._loop.run(self._session.files())

    def close(self) -> None:
        self._loop.run(self._session.close())


async def _next(events: AsyncGenerator[Event, None]) -> Event | None:
    """None at the end: StopAsyncIteration does not survive a future."""
    return await anext(events, None)
