"""Drop-in routes for SandboxFusion clients: /run_code, /run_stateful_code and /run_jupyter with that API's fields.

Python only. As there, nothing but a malformed request, a missing token and a full service is an HTTP error: a program
that fails is `Failed`, and what is our fault is `SandboxError` in an answer with status 200. Differences that remain:
paths of files are relative to the session's home directory, and a notebook's `text/plain` is str() of the value.

`/run_stateful_code` lets clients choose session ids; `serve.names` keeps which session of ours each one means.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import time
import uuid
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from serve.errors import FileRefused, PoolFull, SandboxServiceError
from serve.names import Names
from serve.routes import Authorize, documented
from serve.schema import CreateSession, ExecuteRequest, ExecuteResponse, Limits, State, Status
from serve.sessions import SandboxService

_OUTPUT_BYTES = 1 << 20  # what that API keeps of a stream
_CLOSE_S = 10.0
_OURS = frozenset({Status.SESSION_LOST, Status.PROTOCOL_ERROR, Status.INFRA_ERROR})
_KILLED = -9  # that API reports a process's return code; a killed one has the signal's number, negative


# that API's records --------------------------------------------------------------------------------------------------


class RunStatus(StrEnum):
    SUCCESS = "Success"
    FAILED = "Failed"
    SANDBOX_ERROR = "SandboxError"


class CommandStatus(StrEnum):
    FINISHED = "Finished"
    ERROR = "Error"
    TIME_LIMIT_EXCEEDED = "TimeLimitExceeded"


# fmt: off
Language = Literal[
    "python", "cpp", "nodejs", "go", "go_test", "java", "php", "csharp", "bash", "typescript", "sql", "rust", "cuda",
    "lua", "R", "perl", "D_ut", "ruby", "scala", "julia", "pytest", "junit", "kotlin_script", "jest", "verilog",
    "python_gpu", "lean", "swift", "racket",
]
# fmt: on
Seconds = Annotated[float, Field(gt=0, le=3600)]


class RunCodeRequest(BaseModel):
    code: str = Field(max_length=4 << 20)
    language: Language = Field(description="python; that API's other languages are known and answered SandboxError")
    run_timeout: Seconds = 10.0
    compile_timeout: float = Field(default=10.0, description="ignored: nothing is compiled")
    memory_limit_MB: int = Field(default=-1, le=64 << 10, description="-1: the service's own limit")
    stdin: str | None = Field(default=None, max_length=4 << 20)
    files: dict[str, str | None] = Field(default_factory=dict, description="path -> base64, written before the run")
    fetch_files: list[str] = Field(default_factory=list, max_length=1000, description="paths to send back, if there")
    args: list[str] = Field(default_factory=list, description="ignored: of pytest")


class RunStatefulCodeRequest(RunCodeRequest):
    run_timeout: Seconds = 30.0
    session_id: str | None = Field(default=None, max_length=200, description="empty: a new session")


class RunJupyterRequest(BaseModel):
    cells: list[str] = Field(max_length=1000)
    kernel: Literal["python3"] = "python3"
    cell_timeout: float = Field(default=0.0, ge=0, le=3600, description="0: no limit but the total")
    total_timeout: Seconds = 45.0
    memory_limit_MB: int = Field(default=-1, le=64 << 10)
    files: dict[str, str] = Field(default_factory=dict)
    fetch_files: list[str] = Field(default_factory=list, max_length=1000)


class CommandRunResult(BaseModel):
    status: CommandStatus
    execution_time: float | None = None
    return_code: int | None = None
    stdout: str | None = None
    stderr: str | None = None


class RunCodeResponse(BaseModel):
    status: RunStatus
    message: str = ""
    compile_result: CommandRunResult | None = None
    run_result: CommandRunResult | None = None
    executor_pod_name: str | None = None
    files: dict[str, str] = Field(default_factory=dict)


class RunStatefulCodeResponse(RunCodeResponse):
    session_id: str


class CellRunResult(BaseModel):
    stdout: str
    stderr: str
    display: list[dict[str, Any]]
    error: list[dict[str, Any]]


class RunJupyterResponse(BaseModel):
    status: RunStatus
    message: str = ""
    driver: CommandRunResult | None = None
    cells: list[CellRunResult] = Field(default_factory=list)
    executor_pod_name: str | None = None
    files: dict[str, str] = Field(default_factory=dict)


# routes --------------------------------------------------------------------------------------------------------------


def compat_routes(service: SandboxService, names: Names, *, authorize: Authorize) -> APIRouter:
    router = APIRouter(tags=["SandboxFusion"], dependencies=[Depends(authorize)])
    refusals = documented(400, 401, 413, 422, 429)

    @router.post("/run_code", response_model=RunCodeResponse, responses=refusals)
    async def run_code(body: RunCodeRequest) -> Response:
        """Run a program in a session of its own."""
        answer = RunCodeResponse(status=RunStatus.SUCCESS)
        try:
            _only_python(body.language)
            async with _Fresh(service, _limits(body.memory_limit_MB)) as session_id:
                await _run(service, session_id, body, answer)
        except PoolFull:
            raise
        except (SandboxServiceError, _Unsupported) as error:
            answer.status, answer.message = RunStatus.SANDBOX_ERROR, str(error)
        return Response(answer.model_dump_json(), media_type="application/json")

    @router.post("/run_stateful_code", response_model=RunStatefulCodeResponse, responses=refusals)
    async def run_stateful_code(body: RunStatefulCodeRequest, request: Request) -> Response:
        """Run a program in the client's session of that id, which is made when it is new."""
        name = body.session_id or str(uuid.uuid4())
        answer = RunStatefulCodeResponse(status=RunStatus.SUCCESS, session_id=name)
        try:
            _only_python(body.language)
            session_id = await names.session_for(client_of(request), name, _limits(body.memory_limit_MB))
            await _run(service, session_id, body, answer)
        except PoolFull:
            raise
        except (SandboxServiceError, _Unsupported) as error:
            answer.status, answer.message = RunStatus.SANDBOX_ERROR, str(error)
        return Response(answer.model_dump_json(), media_type="application/json")

    @router.post("/run_jupyter", response_model=RunJupyterResponse, responses=refusals)
    async def run_jupyter(body: RunJupyterRequest) -> Response:
        """Run a notebook's cells in a session of their own; a cell that fails does not stop the next."""
        answer = RunJupyterResponse(status=RunStatus.SUCCESS)
        try:
            async with _Fresh(service, _limits(body.memory_limit_MB)) as session_id:
                await _run_cells(service, session_id, body, answer)
        except PoolFull:
            raise
        except SandboxServiceError as error:
            answer.status, answer.message, answer.cells = RunStatus.SANDBOX_ERROR, str(error), []
        return Response(answer.model_dump_json(), media_type="application/json")

    return router


def client_of(request: Request) -> str:
    """Whose names these are: a token's bearer, known by a digest of it, or everybody who comes without one."""
    return hashlib.sha256(request.headers.get("authorization", "").encode()).hexdigest()


class _Unsupported(ValueError):
    pass


def _only_python(language: str) -> None:
    if language != "python":
        raise _Unsupported(f"language {language!r} is not supported: this sandbox runs python")


def _limits(memory_mb: int) -> Limits:
    """-1 is the default; less than a session can live with is raised to that."""
    return Limits(memory_bytes=max(64, memory_mb) << 20) if memory_mb > 0 else Limits()


class _Fresh:
    """A session for one request, closed behind it."""

    def __init__(self, service: SandboxService, limits: Limits) -> None:
        self._service = service
        self._limits = limits

    async def __aenter__(self) -> str:
        request = CreateSession(limits=self._limits)
        self._session_id = (await self._service.create(request)).session_id
        return self._session_id

    async def __aexit__(self, *error: object) -> None:
        try:
            await asyncio.shield(asyncio.wait_for(self._service.close(self._session_id), _CLOSE_S))
        except (SandboxServiceError, TimeoutError):  # it is gone, or its lease will end it; the answer stands
            pass


# a program -----------------------------------------------------------------------------------------------------------


async def _run(service: SandboxService, session_id: str, body: RunCodeRequest, answer: RunCodeResponse) -> None:
    """Files in, the program, files out; fills `answer`."""
    await _write_files(service, session_id, body.files)
    if body.stdin is not None:
        await _execute(service, session_id, _with_stdin(body.stdin), _CLOSE_S)
    # A program does not echo its last expression as a cell does.
    done = await _execute(service, session_id, f"{body.code}\nNone", body.run_timeout)
    if body.stdin is not None:
        await _execute(service, session_id, "__import__('sys').stdin = __import__('sys').__stdin__", _CLOSE_S)
    answer.executor_pod_name = session_id.partition(".")[0]
    if done.status in _OURS:
        answer.status, answer.message = RunStatus.SANDBOX_ERROR, done.reason or str(done.status)
        return
    answer.run_result = result = _result(done)
    succeeded = result.status is CommandStatus.FINISHED and result.return_code == 0
    answer.status = RunStatus.SUCCESS if succeeded else RunStatus.FAILED
    if done.state is State.LOST:
        answer.message = f"the session's state was lost: {done.reason}"
    answer.files = await _read_files(service, session_id, body.fetch_files)


async def _execute(
    service: SandboxService, session_id: str, code: str, timeout_s: float, *, figures: bool = False
) -> ExecuteResponse:
    request = ExecuteRequest(
        code=code, timeout_s=timeout_s, call_id=uuid.uuid4().hex, max_output_bytes=_OUTPUT_BYTES, figures=figures
    )
    return await service.execute(session_id, request)


def _with_stdin(text: str) -> str:
    data = base64.b64encode(text.encode("utf-8", "backslashreplace")).decode()
    return (
        "__import__('sys').stdin = __import__('io').TextIOWrapper("
        f"__import__('io').BytesIO(__import__('base64').b64decode({data!r})), encoding='utf-8')\nNone"
    )


def _result(done: ExecuteResponse) -> CommandRunResult:
    result = CommandRunResult(
        status=CommandStatus.FINISHED, execution_time=done.duration_s, stdout=done.stdout, stderr=done.stderr
    )
    if done.status is Status.TIMEOUT:
        result.status = CommandStatus.TIME_LIMIT_EXCEEDED
    elif done.error is not None and done.error.name == "SystemExit":  # an interpreter prints its words, no traceback
        words = "" if _is_code(done.error.value) else f"{done.error.value}\n"
        result.stderr = done.stderr.removesuffix(done.error.traceback) + words
        result.return_code = int(done.error.value or 0) & 0xFF if not words else 1
    elif done.error is not None:
        result.return_code = 1
    elif done.status is Status.OK:
        result.return_code = 0
    else:
        result.return_code = _KILLED
    return result


def _is_code(value: str) -> bool:
    """Whether sys.exit was given a status, or nothing, and not words.

    >>> _is_code(""), _is_code("-3"), _is_code("no input")
    (True, True, False)
    """
    return value.lstrip("-").isdecimal() or not value


# a notebook ----------------------------------------------------------------------------------------------------------


async def _run_cells(
    service: SandboxService, session_id: str, body: RunJupyterRequest, answer: RunJupyterResponse
) -> None:
    await _write_files(service, session_id, body.files)
    began = time.monotonic()
    answer.driver = driver = CommandRunResult(status=CommandStatus.FINISHED, return_code=0, stdout="", stderr="")
    for cell in body.cells:
        left = body.total_timeout - (time.monotonic() - began)
        limit = min(left, body.cell_timeout or left)
        done = await _execute(service, session_id, cell, limit, figures=True) if left > 0 else None
        driver.execution_time = time.monotonic() - began
        if done is not None and done.status in _OURS:
            answer.status, answer.message = RunStatus.SANDBOX_ERROR, done.reason or str(done.status)
            return
        if done is None or done.status not in (Status.OK, Status.ERROR):
            timed_out = done is None or done.status is Status.TIMEOUT
            driver.status = CommandStatus.TIME_LIMIT_EXCEEDED if timed_out else CommandStatus.FINISHED
            driver.return_code = None if timed_out else _KILLED
            answer.status, answer.cells = RunStatus.FAILED, []
            return
        answer.cells.append(_cell_result(done))
    answer.executor_pod_name = session_id.partition(".")[0]
    answer.files = await _read_files(service, session_id, body.fetch_files)


def _cell_result(done: ExecuteResponse) -> CellRunResult:
    display: list[dict[str, Any]] = []
    error: list[dict[str, Any]] = []
    stdout, stderr = done.stdout, done.stderr
    if done.result is not None:  # our cells print the value; a notebook displays it
        display.append({"text/plain": done.result})
        stdout = stdout.removesuffix(f"{done.result}\n")
    display += [{"image/png": figure} for figure in done.figures]
    if done.error is not None:
        trace = done.error.traceback.splitlines()
        error.append({"ename": done.error.name, "evalue": done.error.value, "traceback": trace})
        stderr = stderr.removesuffix(done.error.traceback)
    return CellRunResult(stdout=stdout, stderr=stderr, display=display, error=error)


# files ---------------------------------------------------------------------------------------------------------------


async def _write_files(service: SandboxService, session_id: str, files: Mapping[str, str | None]) -> None:
    """An entry without content names a file that is there already, as in that API."""
    for path, content in files.items():
        if content is None:
            continue
        try:
            data = base64.b64decode(content, validate=True)
        except (binascii.Error, ValueError) as error:
            raise FileRefused(422, f"{path}: not base64: {error}") from None
        await service.write_file(session_id, path, data)


async def _read_files(service: SandboxService, session_id: str, paths: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in paths:
        try:
            found[path] = base64.b64encode(await service.read_file(session_id, path)).decode()
        except FileRefused as error:
            if error.code != 404:
                raise
    return found
