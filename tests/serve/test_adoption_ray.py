"""The same under Ray Serve: it starts a killed replica again, which finds its sessions, and the router waits for it."""

import asyncio
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import until

from serve.cells import BackendUnavailable, CellSettings, choose_backend
from serve.schema import CreateSession, ExecuteRequest, State

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def sockets() -> Iterator[Path]:
    """Where the pools of a real Serve application on a real local Ray have their directories."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray = pytest.importorskip("ray")
    from ray import serve

    from serve.app import APP_NAME, SandboxAppArgs, build_app

    try:
        choose_backend("bwrap", CellSettings())
    except BackendUnavailable as error:
        pytest.skip(str(error))
    with (
        tempfile.TemporaryDirectory(prefix="ra", dir="/tmp", ignore_cleanup_errors=True) as directory,
        tempfile.TemporaryDirectory(prefix="sk", dir="/tmp", ignore_cleanup_errors=True) as root,
    ):
        ray.init(include_dashboard=False, _temp_dir=directory, num_cpus=2, log_to_driver=False)
        try:
            serve.start(proxy_location="Disabled")
            # two sessions fill a pool: the router, whose numbers are seconds old, can give neither a third one
            args = SandboxAppArgs(
                backend="bwrap", replicas=2, sessions_per_cell=2, max_sessions=2, token="t", socket_root=root
            )
            serve.run(build_app(args), name=APP_NAME, route_prefix="/")
            yield Path(root)
        finally:
            serve.shutdown()
            left = [path for path in Path(root).glob("*/*-*") if path.is_dir()]
            ray.shutdown()
    assert left == []


async def test_a_session_outlives_its_replica_and_calls_wait_for_the_next_one(sockets: Path) -> None:
    from ray import serve as ray_serve

    from serve.app import APP_NAME, POOL
    from serve.calls import PoolCalls

    pool = PoolCalls(ray_serve.get_deployment_handle(POOL, app_name=APP_NAME))
    sessions = [(await pool.create(CreateSession())).session_id for _ in range(4)]
    owners = {session_id: session_id.partition(".")[0] for session_id in sessions}
    assert len(set(owners.values())) == 2
    for number, session_id in enumerate(sessions):
        await pool.execute(session_id, ExecuteRequest(code=f"import threading; l = threading.Lock(); x = {number}"))
    victim = owners[sessions[0]]
    (pid,) = [node["pid"] for node in await pool.node_stats() if node["owner"] == victim]
    code = "open('begun', 'w').close(); import time; time.sleep(2); n = globals().get('n', 0) + 1\nn"
    under_way = asyncio.create_task(pool.execute(sessions[0], ExecuteRequest(code=code, call_id="slow")))

    async def begun() -> bool:
        return any(file.path == "begun" for file in (await pool.list_files(sessions[0])).files)

    await until(begun)
    os.kill(pid, signal.SIGKILL)
    answer = await under_way  # asked again of the successor under its call id, which finds that it has run
    assert (answer.result, answer.state) == ("1", State.KEPT)
    assert (await pool.execute(sessions[0], ExecuteRequest(code="n"))).result == "1"
    for number, session_id in enumerate(sessions):
        answer = await pool.execute(session_id, ExecuteRequest(code="l.acquire(), x"))
        assert (answer.result, answer.state) == (f"(True, {number})", State.KEPT), owners[session_id] == victim
    stats = {node["owner"]: node for node in await pool.node_stats()}
    assert stats[victim]["pid"] != pid
    assert (stats[victim]["adopted"], stats[victim]["replayed"]) == (2, 0)
    for session_id in sessions:
        await pool.close(session_id)


async def test_a_new_deployment_keeps_the_sessions_of_the_old_one(sockets: Path) -> None:
    from ray import serve as ray_serve

    from serve.app import APP_NAME, POOL, SandboxAppArgs, build_app
    from serve.calls import PoolCalls

    pool = PoolCalls(ray_serve.get_deployment_handle(POOL, app_name=APP_NAME))
    sessions = [(await pool.create(CreateSession())).session_id for _ in range(2)]
    for number, session_id in enumerate(sessions):
        await pool.execute(session_id, ExecuteRequest(code=f"g = iter(range({number}, 9)); next(g)"))
    before = {node["owner"]: node["pid"] for node in await pool.node_stats()}
    changed = SandboxAppArgs(
        backend="bwrap", replicas=2, sessions_per_cell=2, max_sessions=6, token="t", socket_root=str(sockets)
    )
    await asyncio.to_thread(ray_serve.run, build_app(changed), name=APP_NAME, route_prefix="/")
    for number, session_id in enumerate(sessions):
        answer = await pool.execute(session_id, ExecuteRequest(code="next(g)"))
        assert (answer.result, answer.state) == (str(number + 1), State.KEPT)
    after = {node["owner"]: node for node in await pool.node_stats()}
    assert {node["max_sessions"] for node in after.values()} == {6}
    assert all(after[owner]["pid"] != pid for owner, pid in before.items())
    assert await pool.close_all() == 2
