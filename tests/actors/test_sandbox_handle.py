"""The Serve application on a real local Ray: HTTP statuses, affinity over two pools, handles, and a clean end."""

import asyncio
import os
import pickle
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from ports import free_ports

from aster.agent.sandbox import HttpSandboxFactory
from aster.config import SandboxConfig
from aster.errors import BackPressure, SandboxError, SandboxLost
from aster.roles import Sandbox
from serve.schema import State, Status

ROOT = Path(__file__).parents[2]
TOKEN = "a test's token"


def supervisors(node: str) -> dict[int, str]:
    """Start times of the cells of this node's pools: nobody's children, so known by the owner's directory they name."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"/{node[:12]}-".encode() in (entry / "cmdline").read_bytes():
                found[int(entry.name)] = start_time(int(entry.name))
        except OSError:
            continue
    return found


def start_time(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def alive(pid: int, started: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z" and start_time(pid) == started
    except OSError:
        return False


def our_containers(node: str) -> list[str]:
    docker = pytest.importorskip("docker")
    containers = docker.from_env().containers.list(all=True, filters={"label": f"aster.node={node[:12]}"})
    return [container.name for container in containers]


@pytest.fixture(scope="module")
def backend() -> str:
    """Bubblewrap needs no image; Docker where it does not work."""
    from serve.cells import BackendUnavailable, CellSettings, choose_backend

    for name in ("bwrap", "docker"):
        try:
            choose_backend(name, CellSettings())
        except BackendUnavailable as error:
            why = str(error)
        else:
            return name
    pytest.skip(f"no isolated sandbox backend here: {why}")


@pytest.fixture(scope="module")
def service(backend: str) -> Iterator[str]:
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray = pytest.importorskip("ray")
    from ray import serve

    from actors.sandbox import deploy_sandbox, is_deployed

    with tempfile.TemporaryDirectory(prefix="rs", dir="/tmp", ignore_cleanup_errors=True) as directory:
        ray.init(include_dashboard=False, _temp_dir=directory, num_cpus=2, log_to_driver=False)
        try:
            assert not is_deployed()
            (port,) = free_ports()
            config = SandboxConfig(backend=backend, replicas=2, sessions_per_cell=2, max_sessions=3, http_port=port)
            deploy_sandbox(config, token=TOKEN)
            assert is_deployed()
            yield f"http://127.0.0.1:{port}"
        finally:
            node = ray.get_runtime_context().get_node_id()
            ours = supervisors(node)
            serve.shutdown()
            left = [pid for pid, started in ours.items() if alive(pid, started)]
            left_containers = our_containers(node) if backend == "docker" else []
            ray.shutdown()
    assert ours or backend == "docker"
    assert not left, f"supervisors {left} outlived serve.shutdown()"
    assert not left_containers


async def use(sandbox: Sandbox, number: int) -> None:
    """Ten calls in one session; another session's state would show."""
    await sandbox.execute(f"x = {number}", timeout_s=20, call_id="0")
    for call in range(1, 10):
        answer = await sandbox.execute("x += 1; x", timeout_s=20, call_id=str(call))
        assert (answer.result, answer.state) == (str(number + call), State.KEPT)


@pytest.mark.e2e
@pytest.mark.parametrize("path", ["handle", "http"])
async def test_sessions_stay_with_their_owner_and_a_full_service_says_so(service: str, path: str) -> None:
    from actors.sandbox import HandleSandboxFactory

    factory = HandleSandboxFactory() if path == "handle" else HttpSandboxFactory(service, token=TOKEN)
    factory = pickle.loads(pickle.dumps(factory))
    sandboxes = await asyncio.gather(*(factory.open(f"t{i}") for i in range(6)))  # 2 nodes x 3 sessions
    try:
        assert len({s.session_id.partition(".")[0] for s in sandboxes}) == 2
        await asyncio.gather(*(use(sandbox, 100 * i) for i, sandbox in enumerate(sandboxes)))
        with pytest.raises(BackPressure) as full:
            await factory.open("one too many")
        assert full.value.retry_after_s > 0
    finally:
        await asyncio.gather(*(sandbox.close() for sandbox in sandboxes))
    await sandboxes[0].close()
    with pytest.raises(SandboxLost, match="closed by its client"):
        await sandboxes[0].execute("1", timeout_s=5, call_id="z")


@pytest.mark.e2e
@pytest.mark.parametrize("path", ["handle", "http"])
async def test_a_cell_s_failure_is_data_and_a_repeated_call_runs_once(service: str, path: str) -> None:
    from actors.sandbox import HandleSandboxFactory

    factory = HandleSandboxFactory() if path == "handle" else HttpSandboxFactory(service, token=TOKEN)
    sandbox = await factory.open("t")
    try:
        died = await sandbox.execute("import os; os._exit(1)", timeout_s=20, call_id="a")
        assert (died.status, died.state) == (Status.SESSION_DIED, State.LOST)
        late = await sandbox.execute("import time; time.sleep(600)", timeout_s=0.2, call_id="b")
        assert late.status is Status.TIMEOUT
        one = await sandbox.execute("n = globals().get('n', 0) + 1; n", timeout_s=20, call_id="c")
        two = await sandbox.execute("n = globals().get('n', 0) + 1; n", timeout_s=20, call_id="c")
        assert (one.result, two.result) == ("1", "1")
    finally:
        await sandbox.close()


@pytest.mark.e2e
@pytest.mark.parametrize("path", ["handle", "http"])
async def test_a_session_of_a_lost_owner_is_replayed_or_gone_as_its_user_wants(service: str, path: str) -> None:
    from actors.sandbox import HandleSandboxFactory

    for rebuild in (True, False):
        if path == "handle":
            factory = HandleSandboxFactory(rebuild=rebuild)
        else:
            factory = HttpSandboxFactory(service, token=TOKEN, rebuild=rebuild)
        sandbox = await factory.open("t")
        await sandbox.execute("x = 41", timeout_s=20, call_id="a")
        mine = sandbox.session_id
        sandbox._session.session_id = minted_by_nobody_who_lives()
        if rebuild:
            answer = await sandbox.execute("x + 1", timeout_s=20, call_id="b")
            assert (answer.result, answer.state) == ("42", State.REPLAYED)
            assert sandbox.session_id != mine
        else:
            with pytest.raises(SandboxLost, match="its node was lost"):
                await sandbox.execute("x + 1", timeout_s=20, call_id="b")
        await sandbox.close()
        sandbox._session.session_id, sandbox._session._closed = mine, False
        await sandbox.close()


def minted_by_nobody_who_lives() -> str:
    """An id of the service's own minting, as a node that was lost would have made it."""
    from actors.sandbox import app_args
    from serve.policy import Mint

    return Mint(app_args(SandboxConfig(), token=TOKEN).pool_settings().mint_key.encode()).new("node-0")


async def test_a_wrong_token_is_our_error_not_a_lost_session() -> None:
    refuse = httpx.MockTransport(lambda request: httpx.Response(401, json={"detail": "wrong"}))
    with pytest.raises(SandboxError, match="ASTER_SANDBOX_TOKEN"):
        await HttpSandboxFactory("http://s", token="x", transport=refuse).open("t")


class Flaky(httpx.AsyncBaseTransport):
    """Breaks the connection of the first `breaks` requests after they were sent."""

    def __init__(self, breaks: int) -> None:
        self.breaks, self.bodies = breaks, []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body = await request.aread()
        if request.url.path == "/v1/sessions":
            return httpx.Response(201, json={"session_id": "n.r.s", "node": "n", "expires_at": 0})
        self.bodies.append(body)
        if len(self.bodies) <= self.breaks:
            raise httpx.ReadError("broken")
        return httpx.Response(200, json={"status": "ok", "result": "1"})


async def test_a_broken_execute_is_sent_again_under_one_call_id_also_when_the_caller_gave_none() -> None:
    transport = Flaky(breaks=2)
    sandbox = await HttpSandboxFactory("http://s", transport=transport).open("t")
    assert (await sandbox.execute("1", timeout_s=5, call_id="a")).result == "1"
    assert len(set(transport.bodies)) == 1
    assert len(transport.bodies) == 3
    transport = Flaky(breaks=9)
    sandbox = await HttpSandboxFactory("http://s", transport=transport).open("t")
    with pytest.raises(SandboxLost, match="ReadError"):
        await sandbox.execute("1", timeout_s=5, call_id="")
    assert len(transport.bodies) == 3
    assert len(set(transport.bodies)) == 1
    assert b'"call_id":"' in transport.bodies[0]
    assert b'"call_id":""' not in transport.bodies[0]


def test_the_shipped_serve_config_is_what_ray_and_the_builder_accept() -> None:
    from ray.serve.schema import ServeDeploySchema

    from serve.app import SandboxAppArgs

    config = yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text())
    schema = ServeDeploySchema.model_validate(config)
    (application,) = schema.applications
    assert application.import_path == "serve.app:build_app"
    assert SandboxAppArgs.model_validate(application.args).replicas == 1
    assert config["http_options"]["host"] == "127.0.0.1"
    with pytest.raises(ValueError, match="extra"):
        SandboxAppArgs.model_validate({**application.args, "sesions": 1})


def test_a_recipe_s_sandbox_section_becomes_the_application_s_arguments() -> None:
    from actors.sandbox import app_args

    args = app_args(SandboxConfig(max_sessions=7, sessions_per_cell=3), token="t")
    assert (args.max_sessions, args.sessions_per_cell, args.bearer_token()) == (7, 3, "t")
    assert "t'" not in repr(args.token)
    assert args.pool_settings().mint_key == app_args(SandboxConfig(), token="t").pool_settings().mint_key
    assert args.pool_settings().mint_key != app_args(SandboxConfig(), token="u").pool_settings().mint_key
