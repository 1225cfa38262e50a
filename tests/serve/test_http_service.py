"""The deployed service over real HTTP: what only Serve can get wrong, its clients, and any request OpenAPI allows."""

import asyncio
import os
import re
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from openapi_requests import Request, operations, requests_of

from serve.blocking import SandboxClient
from serve.client import AsyncSandboxClient
from serve.errors import CannotFork, FileRefused, PoolFull, SessionGone, TokenRefused
from serve.schema import ExecuteResponse, OutputChunk, Status
from serve.sessions import AsyncSession

TOKEN = "a test's token"
pytestmark = pytest.mark.e2e
_FUZZ_S = 40.0


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    """One pool, HTTP on loopback, SandboxFusion's routes without a token."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray = pytest.importorskip("ray")
    from pydantic import SecretStr
    from ray import serve

    from serve.app import SandboxAppArgs, build_app

    args = SandboxAppArgs(
        backend="process", max_sessions=24, warm_sessions=4, compat_auth=False, token=SecretStr(TOKEN)
    )
    with tempfile.TemporaryDirectory(prefix="rh", dir="/tmp", ignore_cleanup_errors=True) as directory:
        ray.init(include_dashboard=False, _temp_dir=directory, num_cpus=2, log_to_driver=False)
        with socket.socket() as probe:  # after Ray has taken all those that it wants
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            serve.run(build_app(args), name="sandbox", route_prefix="/")
            yield f"http://127.0.0.1:{port}"
        finally:
            serve.shutdown()
            ray.shutdown()


@pytest.fixture
def client(service: str) -> Iterator[SandboxClient]:
    with SandboxClient(service, token=TOKEN) as client:
        yield client


def http(service: str, *, token: str = TOKEN) -> httpx.Client:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx.Client(base_url=service, headers=headers, timeout=60, trust_env=False)


def test_health_docs_token_and_refusals_through_serve_s_proxy(service: str) -> None:
    with http(service, token="") as open_door:
        health = open_door.get("/healthz").json()
        assert (health["status"], health["nodes"], health["backend"]) == ("ok", 1, "process")
        assert open_door.get("/v1/ping").json() == "pong"
        assert open_door.get("/docs").status_code == 200
        refused = open_door.post("/v1/sessions")
        assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
    with http(service) as door:
        assert door.get("/v1/sessions/a.b.c").json()["error"] == "session_unknown"
        assert door.post("/v1/sessions", content=b"{").status_code == 422
        made = door.post("/v1/sessions").json()
        owner = made["session_id"].partition(".")[0]
        assert door.delete(f"/v1/sessions/{made['session_id']}").status_code == 204
        gone = door.get(f"/v1/sessions/{made['session_id']}")
        assert (gone.status_code, gone.json()["error"]) == (410, "session_gone")
        stats = door.get("/v1/stats").json()["nodes"]
        assert [node["owner"] for node in stats] == [owner]


def test_the_blocking_client_does_what_a_session_can(client: SandboxClient) -> None:
    with client.session() as session:
        assert session.execute("x = 41").status is Status.OK
        assert session.execute("x + 1").result == "42"
        failed = session.execute("1/0")
        assert (failed.status, failed.error and failed.error.name) == (Status.ERROR, "ZeroDivisionError")
        session.write_file("data/in.txt", b"\x00\xff")
        assert session.execute("open('data/in.txt', 'rb').read()").result == repr(b"\x00\xff")
        session.execute("open('out.txt', 'w').write('é')")
        assert session.read_file("out.txt") == "é".encode()
        assert {file.path for file in session.files()} >= {"data/in.txt", "out.txt"}
        with pytest.raises(FileRefused) as missing:
            session.read_file("nowhere")
        assert missing.value.code == 404
        (copy,) = session.fork()
        copy.execute("x = 0")
        assert (session.execute("x").result, copy.execute("x").result) == ("41", "0")
        copy.close()
        assert [record.code for record in session.journal()][:2] == ["x = 41", "x + 1"]
        session.reset()
        assert session.execute("x").error is not None
    with pytest.raises(SessionGone):
        session.execute("1")
    assert client.health().status == "ok"
    assert client.stats()[0]["executed"] > 0


def test_a_session_with_threads_cannot_be_forked(client: SandboxClient) -> None:
    with client.session() as session:
        session.execute("import threading, time\nthreading.Thread(target=time.sleep, args=(30,), daemon=True).start()")
        with pytest.raises(CannotFork, match="thread"):
            session.fork()


def test_a_file_that_is_too_large_is_refused_on_the_way(client: SandboxClient) -> None:
    with client.session() as session:
        with pytest.raises(FileRefused) as large:
            session.write_file("big", b"0" * ((32 << 20) + 1))
        assert large.value.code == 413
        assert session.execute("1").result == "1"


def test_an_interrupt_reaches_the_cell_that_runs(client: SandboxClient) -> None:
    with client.session() as session:
        assert session.interrupt() is False
        code = "x = 1\nprint('running', flush=True)\nimport time\ntime.sleep(30)"
        for event in session.stream(code):
            if isinstance(event, OutputChunk) and event.text == "running\n":
                assert session.interrupt() is True
        assert isinstance(event, ExecuteResponse)
        assert event.error is not None
        assert event.error.name == "KeyboardInterrupt"
        assert event.duration_s < 20
        assert session.execute("x").result == "1"


async def test_output_is_streamed_as_it_is_printed(service: str) -> None:
    """The cell ends only after its first print was seen."""
    code = "import os, time\nprint(0, flush=True)\nwhile not os.path.exists('go'): time.sleep(0.01)\nprint(1)\n2"
    async with AsyncSandboxClient(service, token=TOKEN) as client, client.session() as session:
        seen = []
        async for event in session.stream(code):
            seen.append(event)
            if len(seen) == 1:
                await session.write_file("go", b"")
        *chunks, response = seen
        assert isinstance(response, ExecuteResponse)
        assert (response.status, response.result) == (Status.OK, "2")
        assert "".join(event.text for event in chunks) == response.stdout == "0\n1\n2\n"
        await client.close(session.session_id)
        with pytest.raises(SessionGone):
            await anext(session.stream("1"))


def test_a_stream_is_lines_of_json_and_what_is_refused_before_it_is_a_status(service: str) -> None:
    with http(service) as door:
        session = f"/v1/sessions/{door.post('/v1/sessions').json()['session_id']}"
        with door.stream("POST", f"{session}/execute", json={"code": "print(1); 2", "stream": True}) as answer:
            assert (answer.status_code, answer.headers["content-type"]) == (200, "application/x-ndjson")
            lines = [line for line in answer.iter_lines() if line]
        assert lines[-1].startswith('{"response":{"status":"ok"')
        assert all(line.startswith('{"output":{"stream":"stdout","text":') for line in lines[:-1])
        door.delete(session)
        assert door.post(f"{session}/execute", json={"code": "1", "stream": True}).status_code == 410


def test_a_call_whose_connection_dropped_after_it_was_sent_runs_once(service: str) -> None:
    """The request is on its way, the client hangs up, and sends it again under the same id."""
    with http(service) as door:
        session = f"/v1/sessions/{door.post('/v1/sessions').json()['session_id']}"
        body = {"code": "n = globals().get('n', 0) + 1\nimport time; time.sleep(1)\nn", "call_id": "once"}
        request = door.build_request("POST", f"{session}/execute", json=body)
        lines = [f"POST {request.url.raw_path.decode()} HTTP/1.1", f"Host: {request.url.netloc.decode()}"]
        lines += [f"{key}: {request.headers[key]}" for key in ("authorization", "content-type", "content-length")]
        with socket.create_connection((request.url.host, request.url.port or 80)) as raw:
            raw.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + request.content)
            time.sleep(0.4)
        again = door.send(request).json()
        assert (again["result"], again["cell"]) == ("1", 1)
        assert door.post(f"{session}/execute", json={"code": "n"}).json()["result"] == "1"
        door.delete(session)


async def test_a_full_service_is_429_and_a_patient_client_gets_its_session(service: str) -> None:
    opened: list[AsyncSession] = []

    async def until_full(client: AsyncSandboxClient) -> None:
        while True:
            opened.append(await client.session())

    async with AsyncSandboxClient(service, token=TOKEN, full_wait_s=0) as client:
        try:
            with pytest.raises(PoolFull) as full:
                await until_full(client)
            assert full.value.retry_after_s > 0
            asyncio.get_running_loop().call_later(1.0, lambda: asyncio.ensure_future(opened[0].close()))
            async with AsyncSandboxClient(service, token=TOKEN, full_wait_s=30) as patient:
                await (await patient.session()).close()
        finally:
            await asyncio.gather(*(session.close() for session in opened))
    async with AsyncSandboxClient(service, token="wrong") as stranger:
        with pytest.raises(TokenRefused):
            await stranger.session()


def test_sandboxfusion_s_clients_need_no_token_here_and_share_their_names(service: str) -> None:
    with http(service, token="") as door:
        body = {"code": "print(1)", "language": "python", "files": {"a.txt": "aGk="}, "fetch_files": ["a.txt", "no"]}
        answer = door.post("/run_code", json=body).json()
        assert (answer["status"], answer["run_result"]["stdout"]) == ("Success", "1\n")
        assert answer["files"] == {"a.txt": "aGk="}
        body = {"language": "python", "session_id": "shared"}
        assert door.post("/run_stateful_code", json=body | {"code": "x = 7"}).json()["status"] == "Success"
    with http(service, token="") as another:
        answer = another.post("/run_stateful_code", json=body | {"code": "print(x)"}).json()
        assert answer["run_result"]["stdout"] == "7\n"
        notebook = another.post("/run_jupyter", json={"cells": ["a = 1", "a + 1"]}).json()
        assert notebook["cells"][1]["display"] == [{"text/plain": "2"}]
    with http(service, token="") as door:
        assert door.post("/v1/sessions").status_code == 401


def test_calls_are_counted_where_prometheus_looks(service: str, client: SandboxClient) -> None:
    import ray

    with client.session() as session:
        session.execute("1/0")
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    names = [
        f"ray_aster_sandbox_{name}{{"
        for name in ("sessions", "cells", "running", "waiting", "duration_s_bucket", "queue_s_bucket")
    ]
    deadline = time.monotonic() + 120
    while True:
        try:
            text = httpx.get(url, timeout=10, trust_env=False).text
        except httpx.TransportError:  # it has other work now
            text = ""
        counted = re.findall(r'^ray_aster_sandbox_calls(?:_total)?\{.*status="error".*\} (\S+)$', text, re.MULTILINE)
        if counted and float(counted[0]) >= 1 and all(name in text for name in names):
            break
        assert time.monotonic() < deadline, [line for line in text.splitlines() if "aster_sandbox" in line]
        time.sleep(1.0)


def test_a_pool_that_is_killed_under_a_call_costs_time_and_nothing_else(service: str, tmp_path: Path) -> None:
    """Its successor adopts the cells, or replays their journals; the call is asked again under its id. The cell sees
    this machine's files, and does not end by itself before the pool is killed."""
    begun = tmp_path / "begun"
    with http(service) as door:
        session = f"/v1/sessions/{door.post('/v1/sessions').json()['session_id']}"
        door.post(f"{session}/execute", json={"code": "x = 1", "call_id": "a"})
        code = (
            f"import os, time\nif not os.path.exists({str(begun)!r}):\n"
            f"    open({str(begun)!r}, 'w').close(); time.sleep(100)\nx += 1; x"
        )
        body = {"code": code, "call_id": "b", "timeout_s": 120}
        (node,) = door.get("/v1/stats").json()["nodes"]

        def kill() -> None:
            deadline = time.monotonic() + 100
            while not begun.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            os.kill(node["pid"], signal.SIGKILL)

        threading.Thread(target=kill, daemon=True).start()
        answer = door.post(f"{session}/execute", json=body, timeout=200).json()
        assert (answer["status"], answer["result"]) == ("ok", "2"), answer
        assert answer["state"] in ("kept", "replayed")
        assert door.post(f"{session}/execute", json={"code": "x"}).json()["result"] == "2"
        door.delete(session)


def test_open_compat_routes_are_refused_where_others_can_reach_the_port() -> None:
    from serve.ingress import require_loopback

    for host in ("127.0.0.1", "localhost", "::1", "127.1.2.3"):
        require_loopback(host)
    for host in ("0.0.0.0", "::", "10.0.0.1", "sandbox.example"):
        with pytest.raises(ValueError, match=re.escape(f"listens on '{host}'")):
            require_loopback(host)


@given(st.data())
@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def any_request(
    door: httpx.Client, session: list[str], document: dict[str, Any], until: float, data: st.DataObject
) -> None:
    if time.monotonic() > until:
        return
    operation = data.draw(st.sampled_from(operations(document)))
    request: Request = data.draw(requests_of(document, operation, session_ids=session))
    answer = door.request(
        request.method, request.path, content=request.body, headers={"Content-Type": request.content_type}
    )
    words = f"{request.method} {request.path} {request.body[:300]!r} -> {answer.status_code} {answer.text[:300]}"
    assert answer.status_code < 500 or answer.status_code in (503, 504, 507), words
    assert str(answer.status_code) in operation.statuses, f"not documented: {words}"
    if request.path.endswith("/sessions") and answer.status_code == 201:
        door.delete(f"/v1/sessions/{answer.json()['session_id']}")
    if request.method == "DELETE" and answer.status_code == 204:
        session[:] = [door.post("/v1/sessions").json()["session_id"]]
    for copy in answer.json().get("sessions", []) if request.path.endswith("/fork") else []:
        door.delete(f"/v1/sessions/{copy['session_id']}")


def test_no_request_that_openapi_allows_or_nearly_allows_is_a_server_error(service: str) -> None:
    with http(service) as door:
        document = door.get("/openapi.json").json()
        session = [door.post("/v1/sessions").json()["session_id"]]
        any_request(door, session, document, time.monotonic() + _FUZZ_S)
        assert door.get("/healthz").json()["status"] == "ok"
