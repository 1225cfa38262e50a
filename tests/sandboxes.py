"""A pool and its sessions as the sandbox tests use them; a backend that this machine lacks skips with its own words."""

import asyncio
from itertools import count

import pytest

from serve.cells import BackendUnavailable
from serve.pool import PoolSettings, SandboxPool
from serve.schema import CreateSession, ExecuteRequest, ExecuteResponse, Limits

BACKENDS = [pytest.param("docker", marks=pytest.mark.docker), "bwrap", "process"]
ISOLATED = BACKENDS[:2]
_ids = count()


class Session:
    """A session of the pool under test, with calls as short as a test wants them."""

    def __init__(self, pool: SandboxPool, session_id: str) -> None:
        self.pool, self.id = pool, session_id

    async def run(
        self, code: str, *, timeout_s: float = 20.0, call_id: str = "", keep: int = 32 << 10
    ) -> ExecuteResponse:
        request = ExecuteRequest(code=code, timeout_s=timeout_s, call_id=call_id, max_output_bytes=keep)
        return await asyncio.wait_for(self.pool.execute(self.id, request), timeout_s + 30)

    async def close(self) -> None:
        await self.pool.close(self.id)


async def open_session(pool: SandboxPool, **limits: int) -> Session:
    return Session(pool, (await pool.create(CreateSession(limits=Limits(**limits)))).session_id)


async def start_pool(backend: str, **settings: object) -> SandboxPool:
    defaults = {"sessions_per_cell": 8, "max_sessions": 64, "max_running": 8, "mint_key": "test"}
    pool = SandboxPool(PoolSettings(backend=backend, **{**defaults, **settings}), node=f"test{next(_ids)}")
    try:
        await pool.start()
    except BackendUnavailable as error:
        await pool.stop()
        pytest.skip(str(error))
    return pool
