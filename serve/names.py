"""What the session ids that SandboxFusion clients choose mean: one small actor knows, all ingress replicas ask it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Protocol

from serve.schema import CreateSession, Limits
from serve.sessions import SandboxService


class Names(Protocol):
    """`SessionNames`, or a handle to it."""

    def session_for(self, client: str, name: str, limits: Limits) -> Awaitable[str]: ...


@dataclass(frozen=True)
class _Named:
    opened: asyncio.Task[str]
    expires: float


class SessionNames:
    """(client, its own session id) -> our session id. Made once however many ask at the same time.

    A name keeps its meaning until the session's lifetime is over, also when the session ended before: whoever asks then
    is told, and gets no fresh session in the place of a lost one. The names are in memory: they end with this actor,
    and a client that comes back after its death begins anew.
    """

    def __init__(self, service: SandboxService, *, ttl_s: float, idle_ttl_s: float) -> None:
        self._service = service
        self._ttl_s = ttl_s
        self._idle_ttl_s = idle_ttl_s
        self._names: dict[tuple[str, str], _Named] = {}

    async def session_for(self, client: str, name: str, limits: Limits) -> str:
        """Raises what `create` raises, and then the name is free again."""
        self._forget_expired()
        key = client, name
        named = self._names.get(key)
        if named is None:
            request = CreateSession(ttl_s=self._ttl_s, idle_ttl_s=self._idle_ttl_s, limits=limits)
            named = _Named(asyncio.create_task(self._open(key, request)), time.monotonic() + self._ttl_s)
            self._names[key] = named
        return await asyncio.shield(named.opened)  # another caller may wait for the same one

    async def _open(self, key: tuple[str, str], request: CreateSession) -> str:
        try:
            return (await self._service.create(request)).session_id
        except BaseException:
            del self._names[key]
            raise

    def _forget_expired(self) -> None:
        """Names are kept in the order in which they expire, because all live equally long."""
        now = time.monotonic()
        while self._names and next(iter(self._names.values())).expires <= now:
            del self._names[next(iter(self._names))]
