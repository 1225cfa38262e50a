"""One pool per backend and module, one session per test."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from sandboxes import BACKENDS, Session, open_session, start_pool

from serve.pool import SandboxPool


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=BACKENDS)
async def pool(request: pytest.FixtureRequest) -> AsyncIterator[SandboxPool]:
    pool = await start_pool(request.param)
    yield pool
    await pool.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def session(pool: SandboxPool) -> AsyncIterator[Session]:
    session = await open_session(pool)
    yield session
    await session.close()
