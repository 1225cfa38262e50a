"""A pool and its sessions as the sandbox tests use them; a backend that this machine lacks skips with its own words."""

import asyncio
import os
import signal
from itertools import count

import pytest
from waiting import until

from serve.cells import BackendUnavailable, Cell
from serve.pool import PoolSettings, SandboxPool
from serve.schema import CreateSession, ExecuteRequest, ExecuteResponse, Limits

BACKENDS = [pytest.param("docker", marks=pytest.mark.docker), "bwrap", "process"]
ISOLATED = BACKENDS[:2]
# a thread that prints when the test has put `over` there, having got the answer of the cell that began it
PRINTS_LATER = """
import threading, time
def late():
    while not os.path.exists('over'): time.sleep(.01)
    print('late', flush=True)
    open('printed', 'w').close()
threading.Thread(target=late).start()
"""
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


async def there(session: Session, path: str) -> None:
    """Until the session has a file of that name: what its code writes to say how far it is."""

    async def listed() -> bool:
        return any(file.path == path for file in (await session.pool.list_files(session.id)).files)

    await until(listed)


async def put(session: Session, path: str) -> None:
    """An empty file that the journal knows nothing of: the session can be rebuilt, and then the file is not there."""
    cell = session.pool._sessions[session.id].cell
    assert cell is not None
    await cell.link.write_file(session.id, path, b"")


async def gone(session: Session) -> None:
    """Until the session's interpreter has died and its supervisor has waited for it. A neighbour in the cell looks."""
    cell = session.pool._sessions[session.id].cell
    assert cell is not None
    (pid,) = [told.pid for told in (await cell.link.status()).sessions if told.session_id == session.id]
    neighbour = await open_session(session.pool)
    assert session.pool._sessions[neighbour.id].cell is cell

    async def ended() -> bool:
        return (await neighbour.run(f"import os; os.path.exists('/proc/{pid}')")).result == "False"

    await until(ended)
    await neighbour.close()


def new_node() -> str:
    """A node that no other test's pool has: on the same node a pool would adopt what another one left."""
    return f"t{os.getpid()}n{next(_ids)}"


def cells(pool: SandboxPool) -> list[Cell]:
    return [cell.link.cell for cell in pool.fleet.cells]


def kill_supervisor(pool: SandboxPool, cell: Cell) -> None:
    """SIGKILL to PID 1 of a cell, from outside, as the kernel does when memory is short."""
    if pool.fleet.backend.name == "docker":
        import docker

        docker.from_env().api.kill(cell.handle)
    elif pool.fleet.backend.name == "bwrap":
        for pid in cell.handle.children():
            os.kill(pid, signal.SIGKILL)
    else:
        cell.handle.kill()


def pool_settings(backend: str, **settings: object) -> PoolSettings:
    defaults = {"sessions_per_cell": 8, "max_sessions": 64, "max_running": 8, "mint_key": "test"}
    return PoolSettings(backend=backend, **{**defaults, **settings})


async def start_pool(backend: str, *, node: str = "", **settings: object) -> SandboxPool:
    pool = SandboxPool(pool_settings(backend, **settings), node=node or new_node())
    try:
        await pool.start()
    except BackendUnavailable as error:
        await pool.stop()
        pytest.skip(str(error))
    return pool
