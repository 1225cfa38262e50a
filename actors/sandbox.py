"""Sandboxes for rollout actors: the Serve handle as `roles.Sandbox`, without HTTP; deploying the application."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

import ray
import ray.exceptions
from pydantic import SecretStr
from ray import serve
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

from aster.config import SandboxConfig
from aster.errors import BackPressure, SandboxError, SandboxLost
from aster.roles import ExecResult, Sandbox
from serve.app import APP_NAME, POOL, SandboxAppArgs, build_app
from serve.errors import PoolFull, SessionGone, SessionUnknown
from serve.router import ask
from serve.schema import CellRecord, CreateSession, ExecuteRequest, Limits

T = TypeVar("T")

_OPEN_S = 120.0
_CLOSE_S = 30.0
_QUEUE_S = 180.0  # how long a call may wait for its turn at the node, beyond its own time limit
_POLL_S = 0.2


class HandleSandbox:
    """One session. Its handle is made once: `options()` costs more than a call's share of it should."""

    def __init__(self, session_id: str, pool: DeploymentHandle, *, max_output_bytes: int) -> None:
        self.session_id = session_id
        self._max_output_bytes = max_output_bytes
        self._execute = pool.options(method_name="execute", session_id=session_id)
        self._close = pool.options(method_name="close", session_id=session_id)
        self._closed = False

    async def execute(self, code: str, *, timeout_s: float, call_id: str) -> ExecResult:
        request = ExecuteRequest(
            code=code, timeout_s=timeout_s, call_id=call_id, max_output_bytes=self._max_output_bytes
        )
        call = ask(self._execute, self.session_id, request)
        answer: ExecResult = await _deadline(call, timeout_s + _QUEUE_S, session_id=self.session_id)
        return answer

    async def fork(self) -> Sandbox:
        raise SandboxError(f"session {self.session_id}: this service cannot fork sessions")

    async def journal(self) -> list[CellRecord]:
        raise SandboxError(f"session {self.session_id}: this service keeps no journal")

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            await _deadline(ask(self._close, self.session_id), _CLOSE_S, session_id=self.session_id)
        except (SandboxLost, BackPressure):  # gone already, or going with its node
            pass


class HandleSandboxFactory:
    """`roles.SandboxFactory` over the running application; picklable, connects where it is first used."""

    def __init__(
        self, app_name: str = APP_NAME, *, max_output_bytes: int = 32 << 10, memory_bytes: int = 1 << 30
    ) -> None:
        self._app_name = app_name
        self._max_output_bytes = max_output_bytes
        self._memory_bytes = memory_bytes
        self._pool: DeploymentHandle | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _make_factory, (self._app_name, self._max_output_bytes, self._memory_bytes)

    async def open(self, key: str) -> HandleSandbox:
        """A fresh session; `key` only names the trajectory in errors. Raises `BackPressure`, `SandboxLost`."""
        if self._pool is None:
            try:
                self._pool = serve.get_deployment_handle(POOL, app_name=self._app_name).options(_by_reference=False)
            except RayServeException as error:
                raise SandboxLost("", f"{key}: no sandbox application {self._app_name!r} runs: {error}") from None
        request = CreateSession(limits=Limits(memory_bytes=self._memory_bytes))
        call = ask(self._pool.options(method_name="create", session_id=""), request)
        session = await _deadline(call, _OPEN_S, session_id="")
        return HandleSandbox(session.session_id, self._pool, max_output_bytes=self._max_output_bytes)


def _make_factory(app_name: str, max_output_bytes: int, memory_bytes: int) -> HandleSandboxFactory:
    return HandleSandboxFactory(app_name, max_output_bytes=max_output_bytes, memory_bytes=memory_bytes)


async def _deadline(call: Coroutine[Any, Any, T], seconds: float, *, session_id: str) -> T:
    """The service's refusals and Ray's failures, as the two exceptions that a rollout has a policy for."""
    try:
        return await asyncio.wait_for(call, seconds)
    except PoolFull as error:
        raise BackPressure(error.retry_after_s, error.reason) from None
    except BackPressureError as error:
        raise BackPressure(2.0, str(error)) from None
    except (SessionGone, SessionUnknown) as error:
        raise SandboxLost(session_id, str(error)) from None
    except TimeoutError:
        raise SandboxLost(session_id, f"no answer within {seconds:g} s") from None
    except (ray.exceptions.RayError, RayServeException) as error:
        raise SandboxLost(session_id, f"{type(error).__name__}: {error}") from error


# deploying -----------------------------------------------------------------------------------------------------------


def app_args(config: SandboxConfig, *, token: str | None) -> SandboxAppArgs:
    """The application's arguments for a recipe's `sandbox` section."""
    return SandboxAppArgs(
        backend=config.backend,
        image=config.image,
        runtime=config.runtime,
        replicas=config.replicas,
        max_sessions=config.max_sessions,
        sessions_per_cell=config.sessions_per_cell,
        max_running=config.max_running,
        memory_bytes=config.memory_bytes,
        num_cpus=config.num_cpus,
        token=SecretStr(token) if token else None,
    )


def deploy_sandbox(
    config: SandboxConfig, *, token: str | None = None, timeout_s: float = 180.0
) -> HandleSandboxFactory:
    """Run the application on the connected Ray cluster, unless a healthy one is there already, and wait for it.

    HTTP on 127.0.0.1:`http_port` (0 = no HTTP). Raises `SandboxError` with Serve's own words when it does not come up.
    """
    if not ray.is_initialized():
        raise SandboxError("deploy_sandbox needs a connected Ray: call ray.init() first")
    if _status() is not ApplicationStatus.RUNNING:
        if config.http_port:
            serve.start(http_options={"host": "127.0.0.1", "port": config.http_port})
        else:
            serve.start(proxy_location="Disabled")
        target = serve.RunTarget(target=build_app(app_args(config, token=token)), name=APP_NAME, route_prefix="/")
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        _wait_until_running(timeout_s)
    return HandleSandboxFactory(memory_bytes=config.memory_bytes)


def is_deployed() -> bool:
    """Whether the application runs on the connected cluster, whoever deployed it."""
    return _status() is not None


def remove_sandbox() -> None:
    """Delete the application; its sessions and cells are gone when this returns."""
    if _status() is not None:
        serve.delete(APP_NAME)


def _status() -> ApplicationStatus | None:
    application = serve.status().applications.get(APP_NAME)
    return None if application is None else application.status


def _wait_until_running(timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        application = serve.status().applications.get(APP_NAME)
        if application is not None and application.status == ApplicationStatus.RUNNING:
            return
        words = _words(application)
        if application is not None and application.status == ApplicationStatus.DEPLOY_FAILED:
            raise SandboxError(f"the sandbox application failed to start: {words}")
        if time.monotonic() > deadline:
            raise SandboxError(f"the sandbox application was not ready within {timeout_s:g} s: {words}")
        time.sleep(_POLL_S)


def _words(application: Any) -> str:
    if application is None:
        return "not deployed"
    parts = [application.message, *(f"{name}: {d.message}" for name, d in application.deployments.items() if d.message)]
    return " | ".join(part for part in parts if part) or str(application.status)
