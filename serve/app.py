r"""The typed builder of the Serve application "sandbox": three deployments, nothing else.

HTTP --> Ingress (stateless, bearer token) --handle--> SandboxPool (one replica per sandbox node)
                \--> SessionNames (one actor: the ids that SandboxFusion clients chose) --handle--/
"""

# No `from __future__ import annotations`: Serve validates `args` by the annotation of `build_app`, and only if it is a
# class, not a string.

import hashlib
import os
import secrets
from typing import Any

from pydantic import Field, SecretStr
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from serve.ingress import Ingress, NamesReplica
from serve.metrics import MeteredReplica
from serve.router import SessionRouter
from serve.schema import MAX_IDLE_TTL_S, MAX_TTL_S
from serve.settings import PoolSettings

APP_NAME = "sandbox"
POOL = "SandboxPool"
TOKEN_VARIABLE = "ASTER_SANDBOX_TOKEN"

_CALLS_PER_REPLICA = 8192  # the pool's own turnstile decides; Serve's limit would queue where nobody can see it
_STOP_S = 60.0
_STATS_PERIOD_S = 2.0
_QUIET = {"enable_access_log": False}  # a line per call and replica costs more than the call; metrics count them


class SandboxAppArgs(PoolSettings):
    """`args` of the application in a Serve config file; the pool's settings and what only the deployment needs."""

    replicas: int = Field(default=1, ge=1)
    """Sandbox nodes: one pool each."""
    one_per_node: bool = False
    """Refuse a second pool on a node; set it on a cluster."""
    ingress_replicas: int = Field(default=1, ge=1)
    num_cpus: float = Field(default=0.0, ge=0)
    """Logical CPUs that Ray reserves for a pool."""
    resources: dict[str, float] = Field(default_factory=dict)
    """Custom Ray resources that a sandbox node has, for example {"sandbox": 0.01}."""
    token: SecretStr | None = None
    """Bearer token of the HTTP API; better left out of files and given by ASTER_SANDBOX_TOKEN."""
    compat_auth: bool = True
    """Whether the SandboxFusion routes want the token, which few of its clients send. false: only with HTTP on
    loopback, else the deployment fails."""
    compat_ttl_s: float = Field(default=7200.0, gt=0, le=MAX_TTL_S)
    """Lifetime of a session that /run_stateful_code made, and of the meaning of its id."""
    compat_idle_ttl_s: float = Field(default=1800.0, gt=0, le=MAX_IDLE_TTL_S)
    """That API cannot close a session: it ends after so long without a call."""

    def bearer_token(self) -> str:
        return self.token.get_secret_value() if self.token else os.environ.get(TOKEN_VARIABLE, "")

    def pool_settings(self) -> PoolSettings:
        """With a key for session ids: derived from the token, so that ids stay recognisable over a redeployment."""
        token = self.bearer_token()
        key = (
            self.mint_key or hashlib.sha256(f"aster session ids {token or secrets.token_hex(32)}".encode()).hexdigest()
        )
        names = PoolSettings.model_fields
        return PoolSettings(**{**{n: getattr(self, n) for n in names}, "mint_key": key})


def build_app(args: SandboxAppArgs) -> Application:
    """For `serve.run(build_app(args))` and for `import_path: serve.app:build_app` in a config file."""
    settings = args.pool_settings()
    router = RequestRouterConfig.model_validate(
        {"request_router_class": SessionRouter, "request_routing_stats_period_s": _STATS_PERIOD_S}
    )
    actor: dict[str, Any] = {"num_cpus": args.num_cpus, "resources": args.resources}
    pool = serve.deployment(
        name=POOL,
        num_replicas=args.replicas,
        max_ongoing_requests=_CALLS_PER_REPLICA,
        ray_actor_options=actor,
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=_STOP_S,
        request_router_config=router,
        logging_config=_QUIET,
    )(MeteredReplica)
    if args.one_per_node:
        pool = pool.options(max_replicas_per_node=1)
    pools = pool.bind(settings)
    queue_s = settings.queue_timeout_s + settings.create_timeout_s + 30.0
    names = serve.deployment(
        name="SessionNames",
        num_replicas=1,
        max_ongoing_requests=_CALLS_PER_REPLICA,
        ray_actor_options={"num_cpus": 0},
        logging_config=_QUIET,
    )(NamesReplica)
    ingress = serve.deployment(
        name="Ingress",
        num_replicas=args.ingress_replicas,
        max_ongoing_requests=_CALLS_PER_REPLICA,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_wait_loop_s=0.5,
        logging_config=_QUIET,
    )(Ingress)
    return ingress.bind(
        pools,
        names.bind(pools, ttl_s=args.compat_ttl_s, idle_ttl_s=args.compat_idle_ttl_s, queue_s=queue_s),
        token=args.bearer_token(),
        queue_s=queue_s,
        nodes=args.replicas,
        compat_auth=args.compat_auth,
    )
