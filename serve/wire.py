"""How refusals travel over HTTP: a status, a word and a sentence; and how a client makes the same exception of them."""

from __future__ import annotations

import math
from collections.abc import Callable

from serve.errors import (
    CannotFork,
    FileRefused,
    PoolFull,
    RequestRefused,
    SandboxServiceError,
    SandboxUnavailable,
    SessionGone,
    SessionLost,
    SessionUnknown,
    TokenRefused,
)
from serve.schema import Refusal

_DEFAULT_RETRY_S = 2.0
_WORDS: dict[type[SandboxServiceError], tuple[int, str]] = {
    RequestRefused: (422, "invalid"),
    TokenRefused: (401, "unauthorized"),
    SessionUnknown: (404, "session_unknown"),
    SessionGone: (410, "session_gone"),
    SessionLost: (410, "session_lost"),
    CannotFork: (409, "cannot_fork"),
    PoolFull: (429, "full"),
    FileRefused: (422, "file_refused"),
    SandboxUnavailable: (503, "unavailable"),
}


def refusal(error: SandboxServiceError) -> tuple[int, Refusal, dict[str, str]]:
    """Status, body and headers.

    >>> refusal(PoolFull(1.5, "8 cells run"))
    (429, Refusal(error='full', detail='sandbox is full: 8 cells run'), {'Retry-After': '2'})
    """
    status, word = _WORDS.get(type(error), (503, "unavailable"))
    status = int(getattr(error, "code", status))
    headers: dict[str, str] = {}
    if isinstance(error, PoolFull):
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    if isinstance(error, TokenRefused):
        headers["WWW-Authenticate"] = "Bearer"
    return status, Refusal(error=word, detail=str(error)), headers


def exception(
    status: int, word: str, detail: str, *, session_id: str = "", retry_after: str | None = None
) -> SandboxServiceError:
    """What `refusal` was made of. An answer that is not ours (a proxy's page) is known by its status alone."""
    known: dict[str, Callable[[], SandboxServiceError]] = {
        "session_unknown": lambda: SessionUnknown(session_id),
        "session_gone": lambda: SessionGone(session_id, _after(detail, "is gone: ")),
        "session_lost": lambda: SessionLost(session_id, _after(detail, "is gone: ")),
        "cannot_fork": lambda: CannotFork(session_id, _after(detail, "cannot be forked: ")),
        "file_refused": lambda: FileRefused(status, detail),
    }
    if word in known:
        return known[word]()
    if status == 429:
        return PoolFull(_seconds(retry_after), _after(detail, "sandbox is full: "))
    if status == 401:
        return TokenRefused(detail)
    if status >= 500:
        return SandboxUnavailable(
            f"HTTP {status}: {_after(detail, 'sandbox unavailable: ')}", 504 if status == 504 else 503
        )
    return RequestRefused(f"HTTP {status}: {detail}")


def _after(text: str, lead: str) -> str:
    """`text` behind `lead`, which the exception's own words will say again."""
    return text.partition(lead)[2] or text


def _seconds(retry_after: str | None) -> float:
    try:
        return max(0.1, float(retry_after or ""))
    except ValueError:
        return _DEFAULT_RETRY_S
