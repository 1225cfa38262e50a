"""The HTTP side as Serve deployments: the routes over the pool's handle, and the actor that knows clients' names."""

from __future__ import annotations

import ipaddress
import os
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve.calls import PoolCalls, failures
from serve.compat import compat_routes
from serve.names import SessionNames
from serve.routes import Authorize, bearer, build_api, from_loopback
from serve.schema import Limits


class NamesReplica(SessionNames):
    """`SessionNames` as a Serve replica. Exactly one: two would give one name two meanings."""

    def __init__(self, pool: DeploymentHandle, *, ttl_s: float, idle_ttl_s: float, queue_s: float) -> None:
        super().__init__(PoolCalls(pool, queue_s=queue_s), ttl_s=ttl_s, idle_ttl_s=idle_ttl_s)


class NamesCalls:
    """`serve.names.Names` by its handle."""

    def __init__(self, handle: DeploymentHandle, *, queue_s: float) -> None:
        self._session_for = handle.options(method_name="session_for", _by_reference=False)
        self._queue_s = queue_s

    async def session_for(self, client: str, name: str, limits: Limits) -> str:
        async with failures("", self._queue_s):
            session_id: str = await self._session_for.remote(client, name, limits)
        return session_id


@serve.ingress()
class Ingress:
    """Stateless; any number of replicas.

    `queue_s`: how long a call may wait, beyond its own time limit. `nodes`: how many pools a healthy service has.
    `compat_auth`: whether the SandboxFusion routes want the token; without, Serve must listen on loopback.
    """

    def __init__(
        self,
        pool: DeploymentHandle,
        names: DeploymentHandle,
        *,
        token: str,
        queue_s: float,
        nodes: int,
        compat_auth: bool,
    ) -> None:
        if not compat_auth:
            require_loopback(_http_host())
        calls = PoolCalls(pool, queue_s=queue_s)
        authorize: Authorize = bearer(token) if compat_auth else from_loopback
        compat = compat_routes(calls, NamesCalls(names, queue_s=queue_s), authorize=authorize)
        self._api = build_api(calls, token=token, nodes=nodes, compat=compat)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._api


def require_loopback(host: str) -> None:
    """Raises ValueError unless nobody but this machine can reach `host`."""
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name
        local = False
    if not local:
        raise ValueError(
            f"compat_auth: false lets anybody who reaches the HTTP port run code, and Serve listens on {host!r}: set "
            "http_options.host to 127.0.0.1, or leave compat_auth true and give clients the token"
        )


def _http_host() -> str:
    """Where Serve's proxies listen; Serve has no public name for it inside of a replica."""
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
        return "0.0.0.0"  # HAProxy always takes every interface
    client: Any = serve.context._get_global_client()
    return str(client.http_config.host)
