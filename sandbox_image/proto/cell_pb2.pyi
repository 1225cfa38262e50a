from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class OpenRequest(_message.Message):
    __slots__ = ("session_id", "memory_bytes", "processes", "file_bytes")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROCESSES_FIELD_NUMBER: _ClassVar[int]
    FILE_BYTES_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    memory_bytes: int
    processes: int
    file_bytes: int
    def __init__(self, session_id: _Optional[str] = ..., memory_bytes: _Optional[int] = ..., processes: _Optional[int] = ..., file_bytes: _Optional[int] = ...) -> None: ...

class OpenReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ExecuteRequest(_message.Message):
    __slots__ = ("session_id", "code", "timeout_s", "call_id", "max_output_bytes", "figures")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    MAX_OUTPUT_BYTES_FIELD_NUMBER: _ClassVar[int]
    FIGURES_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    code: str
    timeout_s: float
    call_id: str
    max_output_bytes: int
    figures: bool
    def __init__(self, session_id: _Optional[str] = ..., code: _Optional[str] = ..., timeout_s: _Optional[float] = ..., call_id: _Optional[str] = ..., max_output_bytes: _Optional[int] = ..., figures: _Optional[bool] = ...) -> None: ...

class ExecuteCall(_message.Message):
    __slots__ = ("number", "request")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    number: int
    request: ExecuteRequest
    def __init__(self, number: _Optional[int] = ..., request: _Optional[_Union[ExecuteRequest, _Mapping]] = ...) -> None: ...

class ExecuteAnswer(_message.Message):
    __slots__ = ("number", "reply", "failure")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    REPLY_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    number: int
    reply: ExecuteReply
    failure: str
    def __init__(self, number: _Optional[int] = ..., reply: _Optional[_Union[ExecuteReply, _Mapping]] = ..., failure: _Optional[str] = ...) -> None: ...

class SessionRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class InterruptReply(_message.Message):
    __slots__ = ("was_running",)
    WAS_RUNNING_FIELD_NUMBER: _ClassVar[int]
    was_running: bool
    def __init__(self, was_running: _Optional[bool] = ...) -> None: ...

class ResetReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ForkRequest(_message.Message):
    __slots__ = ("session_id", "new_ids")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    NEW_IDS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    new_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, session_id: _Optional[str] = ..., new_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class ForkReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WriteFileRequest(_message.Message):
    __slots__ = ("session_id", "path", "content")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    path: str
    content: bytes
    def __init__(self, session_id: _Optional[str] = ..., path: _Optional[str] = ..., content: _Optional[bytes] = ...) -> None: ...

class WriteFileReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReadFileRequest(_message.Message):
    __slots__ = ("session_id", "path", "max_bytes")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    path: str
    max_bytes: int
    def __init__(self, session_id: _Optional[str] = ..., path: _Optional[str] = ..., max_bytes: _Optional[int] = ...) -> None: ...

class ReadFileReply(_message.Message):
    __slots__ = ("content",)
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    content: bytes
    def __init__(self, content: _Optional[bytes] = ...) -> None: ...

class FileInfo(_message.Message):
    __slots__ = ("path", "size", "modified")
    PATH_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    MODIFIED_FIELD_NUMBER: _ClassVar[int]
    path: str
    size: int
    modified: float
    def __init__(self, path: _Optional[str] = ..., size: _Optional[int] = ..., modified: _Optional[float] = ...) -> None: ...

class ListFilesReply(_message.Message):
    __slots__ = ("files", "truncated")
    FILES_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    files: _containers.RepeatedCompositeFieldContainer[FileInfo]
    truncated: bool
    def __init__(self, files: _Optional[_Iterable[_Union[FileInfo, _Mapping]]] = ..., truncated: _Optional[bool] = ...) -> None: ...

class CellError(_message.Message):
    __slots__ = ("name", "value", "traceback")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    TRACEBACK_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: str
    traceback: str
    def __init__(self, name: _Optional[str] = ..., value: _Optional[str] = ..., traceback: _Optional[str] = ...) -> None: ...

class ExecuteReply(_message.Message):
    __slots__ = ("status", "state", "stdout", "stderr", "text", "result", "error", "duration_s", "queue_s", "truncated", "stdout_bytes", "stderr_bytes", "cell", "reason", "figures")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STDOUT_FIELD_NUMBER: _ClassVar[int]
    STDERR_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    DURATION_S_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    STDOUT_BYTES_FIELD_NUMBER: _ClassVar[int]
    STDERR_BYTES_FIELD_NUMBER: _ClassVar[int]
    CELL_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    FIGURES_FIELD_NUMBER: _ClassVar[int]
    status: str
    state: str
    stdout: str
    stderr: str
    text: str
    result: str
    error: CellError
    duration_s: float
    queue_s: float
    truncated: bool
    stdout_bytes: int
    stderr_bytes: int
    cell: int
    reason: str
    figures: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, status: _Optional[str] = ..., state: _Optional[str] = ..., stdout: _Optional[str] = ..., stderr: _Optional[str] = ..., text: _Optional[str] = ..., result: _Optional[str] = ..., error: _Optional[_Union[CellError, _Mapping]] = ..., duration_s: _Optional[float] = ..., queue_s: _Optional[float] = ..., truncated: _Optional[bool] = ..., stdout_bytes: _Optional[int] = ..., stderr_bytes: _Optional[int] = ..., cell: _Optional[int] = ..., reason: _Optional[str] = ..., figures: _Optional[_Iterable[bytes]] = ...) -> None: ...

class ExecuteEvent(_message.Message):
    __slots__ = ("output", "reply")
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    REPLY_FIELD_NUMBER: _ClassVar[int]
    output: OutputChunk
    reply: ExecuteReply
    def __init__(self, output: _Optional[_Union[OutputChunk, _Mapping]] = ..., reply: _Optional[_Union[ExecuteReply, _Mapping]] = ...) -> None: ...

class OutputChunk(_message.Message):
    __slots__ = ("is_stderr", "text")
    IS_STDERR_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    is_stderr: bool
    text: str
    def __init__(self, is_stderr: _Optional[bool] = ..., text: _Optional[str] = ...) -> None: ...

class CloseRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class CloseReply(_message.Message):
    __slots__ = ("existed",)
    EXISTED_FIELD_NUMBER: _ClassVar[int]
    existed: bool
    def __init__(self, existed: _Optional[bool] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SessionStatus(_message.Message):
    __slots__ = ("session_id", "cells", "running", "pid", "family")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    CELLS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    cells: int
    running: bool
    pid: int
    family: str
    def __init__(self, session_id: _Optional[str] = ..., cells: _Optional[int] = ..., running: _Optional[bool] = ..., pid: _Optional[int] = ..., family: _Optional[str] = ...) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("slots", "free", "warm", "served", "oom_kills", "broken", "packages", "sessions", "python")
    class PackagesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    FREE_FIELD_NUMBER: _ClassVar[int]
    WARM_FIELD_NUMBER: _ClassVar[int]
    SERVED_FIELD_NUMBER: _ClassVar[int]
    OOM_KILLS_FIELD_NUMBER: _ClassVar[int]
    BROKEN_FIELD_NUMBER: _ClassVar[int]
    PACKAGES_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    PYTHON_FIELD_NUMBER: _ClassVar[int]
    slots: int
    free: int
    warm: int
    served: int
    oom_kills: int
    broken: str
    packages: _containers.ScalarMap[str, str]
    sessions: _containers.RepeatedCompositeFieldContainer[SessionStatus]
    python: str
    def __init__(self, slots: _Optional[int] = ..., free: _Optional[int] = ..., warm: _Optional[int] = ..., served: _Optional[int] = ..., oom_kills: _Optional[int] = ..., broken: _Optional[str] = ..., packages: _Optional[_Mapping[str, str]] = ..., sessions: _Optional[_Iterable[_Union[SessionStatus, _Mapping]]] = ..., python: _Optional[str] = ...) -> None: ...
