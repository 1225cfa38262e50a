"""Decisions without I/O: session ids, who may run now, when a session has expired. Each is tested without a cell."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from serve.errors import PoolFull, SessionGone, SessionLost, SessionUnknown

_RANDOM_BYTES = 16
_SEAL_HEX = 8
_TOMBSTONES = 4096


@dataclass(frozen=True)
class Mint:
    """Makes session ids `OWNER.RANDOM.SEAL` and recognises its own. The seal tells "never minted" from "lost"; the 128
    random bits are what protects a session."""

    key: bytes

    def new(self, owner: str) -> str:
        body = f"{owner}.{secrets.token_hex(_RANDOM_BYTES)}"
        return f"{body}.{self._seal(body)}"

    def is_ours(self, session_id: str) -> bool:
        body, _, seal = session_id.rpartition(".")
        return body.count(".") == 1 and hmac.compare_digest(seal.encode(), self._seal(body).encode())

    def _seal(self, body: str) -> str:
        return hmac.new(self.key, body.encode(), hashlib.sha256).hexdigest()[:_SEAL_HEX]


def owner_of(session_id: str | None) -> str:
    """The replica that holds the session; "" when the id does not say.

    >>> owner_of("2fd4e1c67a2d-0.0123456789abcdef0123456789abcdef.1a2b3c4d")
    '2fd4e1c67a2d-0'
    """
    return session_id.partition(".")[0] if session_id and session_id.count(".") == 2 else ""


class Tombstones:
    """Why sessions ended, for as long as anybody may ask: the last few thousand."""

    def __init__(self, mint: Mint) -> None:
        self._mint = mint
        self._reasons: OrderedDict[str, str] = OrderedDict()

    def bury(self, session_id: str, reason: str) -> None:
        self._reasons[session_id] = reason
        while len(self._reasons) > _TOMBSTONES:
            self._reasons.popitem(last=False)

    def explain(self, session_id: str) -> SessionUnknown | SessionGone:
        """The exception for an id that no session has now."""
        reason = self._reasons.get(session_id)
        if reason is not None:
            return SessionGone(session_id, reason)
        if self._mint.is_ours(session_id):
            return SessionLost(session_id, "its owner was restarted or its node was lost")
        return SessionUnknown(session_id)


class Turnstile:
    """At most `running` cells of a node run at once; at most `waiting` more wait, each at most `timeout_s`."""

    def __init__(self, *, running: int, waiting: int, timeout_s: float) -> None:
        self.running_limit, self.waiting_limit, self.timeout_s = running, waiting, timeout_s
        self._slots = asyncio.Semaphore(running)
        self.running = 0
        self.waiting = 0

    @asynccontextmanager
    async def admit(self) -> AsyncIterator[float]:
        """Yields the seconds waited. Raises `PoolFull`, and then nothing ran."""
        began = time.monotonic()
        if self._slots.locked():
            if self.waiting >= self.waiting_limit:
                raise PoolFull(self.retry_after_s, f"{self.running} cells run and {self.waiting} wait")
            self.waiting += 1
            try:
                await asyncio.wait_for(self._slots.acquire(), self.timeout_s)
            except TimeoutError:
                raise PoolFull(
                    self.retry_after_s, f"waited {self.timeout_s:g} s for one of {self.running_limit}"
                ) from None
            finally:
                self.waiting -= 1
        else:
            await self._slots.acquire()
        self.running += 1
        try:
            yield time.monotonic() - began
        finally:
            self.running -= 1
            self._slots.release()

    @property
    def retry_after_s(self) -> float:
        """A guess: one second for every full round of the queue, between 1 and 30."""
        return float(min(30, 1 + self.waiting // max(1, self.running_limit)))


@dataclass
class Lease:
    """When a session ends if nobody ends it. Unix time for people, the monotonic clock for decisions."""

    ttl_s: float
    idle_ttl_s: float
    began: float
    used: float

    @classmethod
    def new(cls, *, ttl_s: float, idle_ttl_s: float) -> Lease:
        now = time.monotonic()
        return cls(ttl_s, idle_ttl_s, now, now)

    @classmethod
    def restored(cls, *, ttl_s: float, idle_ttl_s: float, began: float, used: float) -> Lease:
        """One that another process began; `began` and `used` in unix time."""
        ahead = time.monotonic() - time.time()
        return cls(ttl_s, idle_ttl_s, began + ahead, used + ahead)

    def touch(self) -> None:
        self.used = time.monotonic()

    def expired(self, now: float) -> str:
        """Why it is over at `now`; empty while it is not."""
        if now - self.began >= self.ttl_s:
            return f"expired after {self.ttl_s:g} s"
        if now - self.used >= self.idle_ttl_s:
            return f"expired after {self.idle_ttl_s:g} s without a call"
        return ""

    @property
    def expires_at(self) -> float:
        """Unix time of the end if nothing more is called."""
        left = min(self.began + self.ttl_s, self.used + self.idle_ttl_s) - time.monotonic()
        return time.time() + left
