"""What the sandbox service refuses, as exceptions that survive pickling. Clients map them to their own."""

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
