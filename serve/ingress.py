"""HTTP for everybody: translates routes, statuses and the bearer token; decides nothing about sessions."""

from __future__ import annotations

import asyncio
import hmac
import math
from typing import Any

import ray.exceptions
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from serve.errors import PoolFull, SessionGone, SessionUnknown
from serve.router import ask
from serve.schema import CreateSession, ExecuteRequest, ExecuteResponse, Health, Session

_GRACE_S = 30.0
_STATS_S = 10.0

api = FastAPI(title="Aster sandbox", description="Stateful Python sessions in isolated cells.", version="1")


def authorize(request: Request) -> None:
    """401 unless the request carries the service's token. Without a configured token nobody is let in."""
    token: str = api.state.token
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if not token:
        raise HTTPException(401, "this service has no token: set ASTER_SANDBOX_TOKEN where it is deployed")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token.encode()):
        raise HTTPException(401, "missing or wrong bearer token", headers={"WWW-Authenticate": "Bearer"})


Authorized = Depends(authorize)


class Ingress:
    """Stateless; any number of replicas. `deadline_s`: how long a call may queue, beyond its own time limit."""

    def __init__(self, pool: DeploymentHandle, *, token: str, deadline_s: float, replicas: int) -> None:
        api.state.token = token
        self._pool = pool.options(_by_reference=False)
        self._deadline_s = deadline_s
        self._replicas = replicas

    @api.post("/v1/sessions", status_code=201, dependencies=[Authorized])
    async def create(self, body: CreateSession | None = None) -> Session:
        session: Session = await self._call("create", None, body or CreateSession(), deadline_s=self._deadline_s)
        return session

    @api.get("/v1/sessions/{session_id}", dependencies=[Authorized])
    async def get(self, session_id: str) -> Session:
        session: Session = await self._call("get", session_id, session_id, deadline_s=_GRACE_S)
        return session

    @api.post("/v1/sessions/{session_id}/execute", dependencies=[Authorized])
    async def execute(self, session_id: str, body: ExecuteRequest) -> ExecuteResponse:
        deadline_s = body.timeout_s + self._deadline_s
        answer: ExecuteResponse = await self._call("execute", session_id, session_id, body, deadline_s=deadline_s)
        return answer

    @api.delete("/v1/sessions/{session_id}", status_code=204, dependencies=[Authorized])
    async def close(self, session_id: str) -> Response:
        await self._call("close", session_id, session_id, deadline_s=_GRACE_S)
        return Response(status_code=204)

    @api.get("/healthz")
    async def healthz(self) -> Health:
        nodes = await self._stats()
        backend = ",".join(sorted({str(node["backend"]) for node in nodes}))
        return Health(
            status="ok" if len(nodes) == self._replicas else "degraded",
            backend=backend,
            nodes=len(nodes),
            sessions=sum(int(node["sessions"]) for node in nodes),
        )

    @api.get("/v1/stats", dependencies=[Authorized])
    async def stats(self) -> dict[str, Any]:
        return {"nodes": await self._stats()}

    async def _stats(self) -> list[dict[str, Any]]:
        try:
            return list(await self._pool.broadcast("stats").results_async(timeout_s=_STATS_S))
        except (TimeoutError, ray.exceptions.RayError) as error:
            raise HTTPException(503, f"a sandbox node does not answer: {error}") from None

    async def _call(self, method: str, session_id: str | None, *args: object, deadline_s: float) -> Any:
        handle = self._pool.options(method_name=method, session_id=session_id or "")
        try:
            return await asyncio.wait_for(ask(handle, *args), deadline_s)
        except SessionUnknown as error:
            raise HTTPException(404, str(error)) from None
        except SessionGone as error:
            raise HTTPException(410, str(error)) from None
        except PoolFull as error:
            retry = {"Retry-After": str(math.ceil(error.retry_after_s))}
            raise HTTPException(429, str(error), headers=retry) from None
        except BackPressureError as error:
            raise HTTPException(429, str(error), headers={"Retry-After": "2"}) from None
        except TimeoutError:
            raise HTTPException(504, f"no answer within {deadline_s:g} s") from None
        except ray.exceptions.RayActorError as error:
            if session_id is None:
                raise HTTPException(503, f"a sandbox node died: {error}", headers={"Retry-After": "5"}) from None
            raise HTTPException(410, f"session {session_id} is gone: its node died during the call") from None
