"""Sandboxes for rollout actors, by the Serve handle and without HTTP; deploying the application."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import ray
from pydantic import SecretStr
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

from aster.agent.sandbox import ServiceSandbox, open_sandbox
from aster.config import SandboxConfig
from aster.errors import SandboxError, SandboxLost
from serve.app import APP_NAME, POOL, SandboxAppArgs, build_app
from serve.calls import PoolCalls
from serve.errors import SandboxServiceError
from serve.schema import CreateSession

log = logging.getLogger("aster")

_POLL_S = 0.2


class HandleSandboxFactory:
    """`roles.SandboxFactory` over the running application; picklable, connects where it is first used."""

    def __init__(
        self,
        app_name: str = APP_NAME,
        *,
        session: CreateSession | None = None,
        max_output_bytes: int = 32 << 10,
        rebuild: bool = True,
    ) -> None:
        self._app_name = app_name
        self._session = session or CreateSession()
        self._max_output_bytes = max_output_bytes
        self._rebuild = rebuild
        self._calls: PoolCalls | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_calls": None}

    async def open(self, key: str) -> ServiceSandbox:
        """A fresh session; `key` only names the trajectory in errors. Raises `BackPressure`, `SandboxLost`."""
        if self._calls is None:
            try:
                self._calls = pool_calls(self._app_name)
            except RayServeException as error:
                raise SandboxLost("", f"{key}: no sandbox application {self._app_name!r} runs: {error}") from None
        return await open_sandbox(
            self._calls,
            key,
            session=self._session,
            max_output_bytes=self._max_output_bytes,
            rebuild=self._rebuild,
        )


def pool_calls(app_name: str = APP_NAME) -> PoolCalls:
    """The running application's pools. Raises RayServeException when it does not run.

    The handle gets a thread of its own for routing, in every mode of Serve: a driver runs one event loop after another,
    and in throughput mode a handle would belong to the first.
    """
    handle = serve.get_deployment_handle(POOL, app_name=app_name)
    if not handle.is_initialized:
        handle._init(_run_router_in_separate_loop=True)
    return PoolCalls(handle)


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


def deploy_sandbox(config: SandboxConfig, *, token: str | None = None, timeout_s: float = 180.0) -> None:
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


def is_deployed() -> bool:
    """Whether the application runs on the connected cluster, whoever deployed it."""
    return _status() is not None


def remove_sandbox() -> None:
    """Delete the application; its sessions and cells are gone when this returns. Called outside of an event loop."""
    if _status() is not None:
        try:
            asyncio.run(pool_calls(APP_NAME).close_all())
        except (SandboxServiceError, RayServeException) as error:  # policy: what is left, the janitor ends
            log.warning("the sandbox's sessions could not be ended before it was removed: %s", error)
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
