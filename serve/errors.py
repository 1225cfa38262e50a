"""What the sandbox service refuses, as exceptions that survive pickling; the same by handle and by HTTP client."""

from __future__ import annotations


class SandboxServiceError(Exception):
    """Base of those below."""


class SessionUnknown(SandboxServiceError):
    """An id that this service never minted: HTTP 404."""

    def __init__(self, session_id: str) -> None:
        super().__init__(session_id)
        self.session_id = session_id

    def __str__(self) -> str:
        return f"no session {self.session_id!r}"


class SessionGone(SandboxServiceError):
    """A session that was, and is no more: closed, expired, or lost with its cell or node. HTTP 410."""

    def __init__(self, session_id: str, reason: str) -> None:
        super().__init__(session_id, reason)
        self.session_id = session_id
        self.reason = reason

    def __str__(self) -> str:
        return f"session {self.session_id} is gone: {self.reason}"


class SessionLost(SessionGone):
    """A session that ended through no doing of its client: its cell, its pool or its node is no more. HTTP 410.

    The only end after which the cells of the session may be run again elsewhere."""


class PoolFull(SandboxServiceError):
    """Nothing was done; try again after `retry_after_s`: HTTP 429."""

    def __init__(self, retry_after_s: float, reason: str) -> None:
        super().__init__(retry_after_s, reason)
        self.retry_after_s = retry_after_s
        self.reason = reason

    def __str__(self) -> str:
        return f"sandbox is full: {self.reason}"


class CannotFork(SandboxServiceError):
    """The session has live threads or child processes, which a copy would lack: HTTP 409."""

    def __init__(self, session_id: str, reason: str) -> None:
        super().__init__(session_id, reason)
        self.session_id = session_id
        self.reason = reason

    def __str__(self) -> str:
        return f"session {self.session_id} cannot be forked: {self.reason}"


class FileRefused(SandboxServiceError):
    """A file that cannot be read or written. `code`: the HTTP status, 404, 413, 422 or 507."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class SandboxUnavailable(SandboxServiceError):
    """No answer. `code`: 503 when nothing was done, 504 when a deadline passed and it is not known what was."""

    def __init__(self, reason: str, code: int = 503) -> None:
        super().__init__(reason, code)
        self.reason = reason
        self.code = code

    def __str__(self) -> str:
        return f"sandbox unavailable: {self.reason}"


class TokenRefused(SandboxServiceError):
    """The request carried no token or a wrong one: HTTP 401."""


class RequestRefused(SandboxServiceError):
    """The request is not one that the service understands: HTTP 400, 405, 413 or 422."""
