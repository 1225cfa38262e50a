"""The sandbox's wire records, shared by HTTP, Serve handles and clients. Pydantic only: no ray, no docker, no torch.

A cell that fails is *data* (`ExecuteResponse.status`); a sandbox that fails is an HTTP error or an exception.
"""

from __future__ import annotations

import enum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Status(enum.StrEnum):
    """What became of a cell. Decided by the supervisor (`sandbox_image/slot.py`), not by the session."""

    OK = "ok"
    ERROR = "error"
    TIMEOUT = "timeout"
    OOM = "oom"
    OUTPUT_LIMIT = "output_limit"
    SESSION_DIED = "session_died"
    SESSION_LOST = "session_lost"
    PROTOCOL_ERROR = "protocol_error"
    INFRA_ERROR = "infra_error"


class State(enum.StrEnum):
    """What became of the interpreter's state."""

    KEPT = "kept"
    LOST = "lost"
    REPLAYED = "replayed"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Limits(_Strict):
    """Per-session limits; the service caps each at its own configured maximum."""

    memory_bytes: int = Field(default=1 << 30, ge=64 << 20, le=64 << 30)
    processes: int = Field(default=32, ge=1, le=512)
    file_bytes: int = Field(default=64 << 20, ge=1 << 16, le=4 << 30)


MAX_TTL_S = 7 * 86400
MAX_IDLE_TTL_S = 86400


class CreateSession(_Strict):
    """Body of POST /v1/sessions."""

    ttl_s: float = Field(default=7200.0, gt=0, le=MAX_TTL_S, description="hard lifetime")
    idle_ttl_s: float = Field(
        default=1800.0, gt=0, le=MAX_IDLE_TTL_S, description="closed after this long without a call"
    )
    limits: Limits = Limits()


class Session(_Strict):
    """Answer of POST /v1/sessions (201) and GET /v1/sessions/{id}."""

    session_id: str
    node: str
    expires_at: float = Field(description="unix time")


class Ended(_Strict):
    """Answer of DELETE /v1/sessions."""

    sessions: int


class ForkSession(_Strict):
    """Body of POST /v1/sessions/{id}/fork."""

    count: int = Field(default=1, ge=1, le=64, description="copies of the session as it is now")


class Forked(_Strict):
    """Answer of fork (201): the copies; each is a session of its own, with the original's lifetime from now on."""

    sessions: list[Session]


class Interrupted(_Strict):
    """Answer of POST /v1/sessions/{id}/interrupt."""

    was_running: bool


class FileInfo(_Strict):
    path: str = Field(description="relative to the session's home directory")
    size: int
    modified: float = Field(description="unix time")


class Files(_Strict):
    """Answer of GET /v1/sessions/{id}/files."""

    files: list[FileInfo]
    truncated: bool = False


class ExecuteRequest(_Strict):
    """Body of POST /v1/sessions/{id}/execute."""

    code: str = Field(max_length=4 << 20)
    timeout_s: float = Field(default=30.0, gt=0, le=3600)
    call_id: str = Field(default="", max_length=200, description="a repeated id returns the first answer, never reruns")
    max_output_bytes: int = Field(default=32 << 10, ge=256, le=16 << 20)
    figures: bool = Field(default=False, description="return the open matplotlib figures as PNG")
    stream: bool = Field(
        default=False, description="answer in lines of JSON: output as it is printed, then the response"
    )


class CellError(_Strict):
    name: str
    value: str
    traceback: str


class ExecuteResponse(_Strict):
    """Answer of execute (200 whenever the session is alive or was rebuilt). Seconds and bytes."""

    status: Status
    stdout: str = ""
    stderr: str = ""
    text: str = Field(default="", description="stdout, stderr and the echoed last expression, interleaved as printed")
    result: str | None = Field(default=None, description="str() of the last expression; None when there is none")
    error: CellError | None = None
    state: State = State.KEPT
    duration_s: float = 0.0
    queue_s: float = 0.0
    truncated: bool = False
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    cell: int = 0
    figures: list[str] = Field(default_factory=list, description="PNG, base64")
    reason: str = Field(default="", description="the supervisor's words when the session died")


class OutputChunk(_Strict):
    """A line of a streamed answer; the last line is `{"response": ExecuteResponse}`."""

    stream: Literal["stdout", "stderr"]
    text: str


class CellRecord(_Strict):
    """One line of a session's journal."""

    cell: int
    call_id: str
    code: str
    status: Status
    text_sha256: str


class Refusal(_Strict):
    """Body of every answer that is not a success."""

    error: str = Field(description="which refusal, for programs: session_unknown, session_lost, full, ...")
    detail: str = Field(description="why, for people")


class Health(_Strict):
    status: str
    backend: str
    nodes: int
    sessions: int
    detail: dict[str, Any] = Field(default_factory=dict)
