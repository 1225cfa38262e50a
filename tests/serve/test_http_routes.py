"""The HTTP API over a real pool in this process: every route, every status, and what must not be a 500."""

import asyncio
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import pytest_asyncio
from sandboxes import start_pool

from serve.cells.link import CellLost
from serve.compat import compat_routes
from serve.errors import CannotFork, FileRefused, PoolFull, SandboxUnavailable, SessionGone, SessionLost
from serve.names import SessionNames
from serve.pool import SandboxPool
from serve.routes import MAX_FILE_BYTES, bearer, build_api, from_loopback
from serve.schema import Limits

TOKEN = "a test's token"
pytestmark = pytest.mark.asyncio(loop_scope="module")


class Served:
    """The pool as the routes want it; `raises` lets a method refuse what a test cannot bring about."""

    def __init__(self, pool: SandboxPool) -> None:
        self.pool = pool
        self.raises: dict[str, Exception] = {}

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.pool, name)
        if name not in self.raises:
            return method

        async def refuse(*args: object) -> None:
            raise self.raises[name]

        return refuse

    async def node_stats(self) -> list[dict[str, Any]]:
        return [await self.pool.stats()]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served() -> AsyncIterator[Served]:
    pool = await start_pool("process", max_sessions=8)
    yield Served(pool)
    await pool.stop()


def client_of(served: Served, *, token: str = TOKEN, client: tuple[str, int] = ("127.0.0.1", 1)) -> httpx.AsyncClient:
    names = SessionNames(served, ttl_s=600, idle_ttl_s=600)  # type: ignore[arg-type]
    api = build_api(
        served,  # type: ignore[arg-type]
        token=TOKEN,
        nodes=1,
        compat=compat_routes(served, names, authorize=bearer(TOKEN)),  # type: ignore[arg-type]
    )
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    transport = httpx.ASGITransport(api, client=client)  # an exception that the API lets through fails the test
    return httpx.AsyncClient(transport=transport, base_url="http://s", headers=headers)


@pytest_asyncio.fixture(loop_scope="module")
async def http(served: Served) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(served) as client:
        yield client
    served.raises.clear()
    for session_id in list(served.pool._sessions):
        await served.pool.close(session_id)


@pytest_asyncio.fixture(loop_scope="module")
async def session(http: httpx.AsyncClient) -> str:
    made = await http.post("/v1/sessions")
    assert made.status_code == 201
    return f"/v1/sessions/{made.json()['session_id']}"


@pytest.mark.parametrize("token", ["", "wrong", "a test's tokem", "a test's token more"])
async def test_without_the_token_only_health_and_ping_answer(served: Served, token: str) -> None:
    async with client_of(served, token=token) as client:
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/v1/ping")).json() == "pong"
        guarded = [route for route in documented_statuses(client) if " /v1/s" in route or " /run_" in route]
        assert len(guarded) == 16
        for route in guarded:
            method, path = route.split()
            answer = await client.request(method, path.format(session_id="a.b.c", path="x"), json={})
            assert (answer.status_code, answer.json()["error"]) == (401, "unauthorized"), route
            assert answer.headers["WWW-Authenticate"] == "Bearer"


async def test_an_unset_token_lets_nobody_in(served: Served) -> None:
    api = build_api(served, token="", nodes=1)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://s") as client:
        for header in ({}, {"Authorization": "Bearer "}, {"Authorization": "Bearer x"}):
            assert (await client.post("/v1/sessions", headers=header)).status_code == 401


@pytest.mark.parametrize(("address", "status"), [("127.0.0.1", 200), ("::1", 200), ("10.0.0.7", 401), ("", 401)])
async def test_without_a_token_compat_calls_are_taken_from_this_machine_only(
    served: Served, address: str, status: int
) -> None:
    names = SessionNames(served, ttl_s=600, idle_ttl_s=600)  # type: ignore[arg-type]
    compat = compat_routes(served, names, authorize=from_loopback)  # type: ignore[arg-type]
    api = build_api(served, token=TOKEN, nodes=1, compat=compat)  # type: ignore[arg-type]
    transport = httpx.ASGITransport(api, client=(address, 9))
    async with httpx.AsyncClient(transport=transport, base_url="http://s") as client:
        answer = await client.post("/run_code", json={"code": "print(1)", "language": "python"})
        assert answer.status_code == status
        assert (await client.post("/v1/sessions")).status_code == 401


async def test_a_session_keeps_its_state_from_create_to_close(http: httpx.AsyncClient, session: str) -> None:
    assert (await http.post(f"{session}/execute", json={"code": "x = 6"})).json()["status"] == "ok"
    answer = (await http.post(f"{session}/execute", json={"code": "x * 7"})).json()
    assert (answer["result"], answer["state"], answer["cell"]) == ("42", "kept", 2)
    failed = await http.post(f"{session}/execute", json={"code": "1/0"})
    assert (failed.status_code, failed.json()["error"]["name"]) == (200, "ZeroDivisionError")
    assert f"/v1/sessions/{(await http.get(session)).json()['session_id']}" == session
    assert [(await http.delete(session)).status_code for _ in range(2)] == [204, 204]
    gone = await http.post(f"{session}/execute", json={"code": "1"})
    assert (gone.status_code, gone.json()["error"]) == (410, "session_gone")
    assert "closed by its client" in gone.json()["detail"]


async def test_an_id_that_was_never_minted_is_404_on_every_route(http: httpx.AsyncClient) -> None:
    calls = [("GET", ""), ("DELETE", ""), ("POST", "/execute"), ("POST", "/interrupt"), ("POST", "/reset")]
    calls += [("POST", "/fork"), ("GET", "/journal"), ("GET", "/files"), ("GET", "/files/a"), ("PUT", "/files/a")]
    for method, path in calls:
        body = {"code": "1"} if path == "/execute" else None
        answer = await http.request(method, f"/v1/sessions/a.b.c{path}", json=body)
        assert (answer.status_code, answer.json()["error"]) == (404, "session_unknown"), (method, path)


async def test_a_repeated_call_id_runs_nothing(http: httpx.AsyncClient, session: str) -> None:
    body = {"code": "n = globals().get('n', 0) + 1; n", "call_id": "c"}
    answers = [(await http.post(f"{session}/execute", json=body)).json()["result"] for _ in range(2)]
    assert answers == ["1", "1"]


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b'{"code": 1}',
        b'{"code": "1", "timeout": 3}',
        b'{"code": "1", "timeout_s": -1}',
        b'{"code": "1", "timeout_s": NaN}',
        b'{"code": "1", "timeout_s": 1e999}',
        b'{"code": "\\ud800"}',
        b'{"code": "1", "call_id": "\\ud800"}',
        b'{"\\ud800": 1}',
        b"[]",
        b"null",
        b"\xff\xfe",
        b"{",
        b"[" * 30_000,
        b'{"code": ' + b"1" * 6_000 + b"}",
    ],
    ids=lambda body: repr(body[:24]),
)
async def test_a_body_that_is_not_a_request_is_refused_with_words(
    http: httpx.AsyncClient, session: str, body: bytes
) -> None:
    answer = await http.post(f"{session}/execute", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422)
    assert answer.json()["error"] == "invalid"
    assert answer.json()["detail"]


async def test_a_body_is_cut_off_while_it_is_read(http: httpx.AsyncClient, session: str) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1 << 20
            yield b" " * (1 << 20)

    refused = await http.post(f"{session}/execute", content=endless(), headers={"Content-Type": "application/json"})
    assert (refused.status_code, refused.json()["error"]) == (413, "invalid")
    assert sent <= 66 << 20
    sent = 0
    refused = await http.put(f"{session}/files/big", content=endless())
    assert (refused.status_code, refused.json()["error"]) == (413, "file_refused")
    assert sent <= MAX_FILE_BYTES + (2 << 20)


@pytest.mark.parametrize(
    ("error", "status", "word"),
    [
        (CannotFork("s", "it has 2 threads"), 409, "cannot_fork"),
        (SessionLost("s", "its node died"), 410, "session_lost"),
        (SessionGone("s", "expired after 5 s"), 410, "session_gone"),
        (PoolFull(2.5, "8 cells run"), 429, "full"),
        (SandboxUnavailable("a node does not answer"), 503, "unavailable"),
        (SandboxUnavailable("no answer within 3 s", 504), 504, "unavailable"),
        *((FileRefused(code, "no"), code, "file_refused") for code in (404, 413, 422, 507)),
    ],
)
async def test_what_the_pool_refuses_is_a_status_a_word_and_a_sentence(
    served: Served, http: httpx.AsyncClient, error: Exception, status: int, word: str
) -> None:
    served.raises = {"fork": error, "read_file": error, "write_file": error}
    for method, path in (("POST", "fork"), ("GET", "files/a"), ("PUT", "files/a")):
        answer = await http.request(method, f"/v1/sessions/s/{path}")
        assert (answer.status_code, answer.json()) == (status, {"error": word, "detail": str(error)})
        assert answer.headers.get("Retry-After") == ("3" if status == 429 else None)


async def test_a_full_service_says_when_to_come_back(http: httpx.AsyncClient) -> None:
    made = [await http.post("/v1/sessions") for _ in range(8)]
    assert {answer.status_code for answer in made} == {201}
    full = await http.post("/v1/sessions")
    assert (full.status_code, full.json()["error"]) == (429, "full")
    assert int(full.headers["Retry-After"]) > 0


async def test_every_session_can_be_ended_at_once(http: httpx.AsyncClient) -> None:
    made = [(await http.post("/v1/sessions")).json()["session_id"] for _ in range(2)]
    assert (await http.delete("/v1/sessions")).json()["sessions"] >= 2
    for session_id in made:
        answer = await http.get(f"/v1/sessions/{session_id}")
        assert (answer.status_code, answer.json()["error"]) == (410, "session_gone")
        assert "all sessions were ended" in answer.json()["detail"]
    assert (await http.delete("/v1/sessions")).json() == {"sessions": 0}


def documented_statuses(http: httpx.AsyncClient) -> dict[str, set[str]]:
    paths = http._transport.app.openapi()["paths"]  # type: ignore[attr-defined]
    return {f"{m.upper()} {p}": set(route["responses"]) for p, methods in paths.items() for m, route in methods.items()}


async def test_openapi_documents_every_refusal_of_every_route(http: httpx.AsyncClient) -> None:
    statuses = documented_statuses(http)
    assert len(statuses) == 18
    for route, documented in statuses.items():
        if "/v1/sessions/{session_id}" in route:
            assert {"401", "404", "410", "413", "422", "429", "503", "504"} <= documented, route
        elif route not in ("GET /healthz", "GET /v1/ping"):
            assert "401" in documented, route
    assert "409" in statuses["POST /v1/sessions/{session_id}/fork"]
    assert "507" in statuses["PUT /v1/sessions/{session_id}/files/{path}"]
    assert (await http.get("/docs")).status_code == 200
    document = http._transport.app.openapi()  # type: ignore[attr-defined]
    assert "HTTPBearer" in document["components"]["securitySchemes"]


# SandboxFusion's routes ----------------------------------------------------------------------------------------------


async def run(http: httpx.AsyncClient, path: str, **body: object) -> dict[str, Any]:
    answer = await http.post(path, json={"language": "python", **body} if path != "/run_jupyter" else body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_run_code_answers_as_sandboxfusion_does(http: httpx.AsyncClient) -> None:
    ok = await run(http, "/run_code", code="print('hello')\n7")
    assert set(ok) == {
        "status", "message", "compile_result", "run_result", "executor_pod_name", "files",
    }  # fmt: skip
    assert (ok["status"], ok["message"], ok["compile_result"], ok["files"]) == ("Success", "", None, {})
    result = ok["run_result"]
    assert result | {"execution_time": 0} == {
        "status": "Finished", "execution_time": 0, "return_code": 0, "stdout": "hello\n", "stderr": "",
    }  # fmt: skip
    assert 0 < result["execution_time"] < 10  # its limit, in seconds


@pytest.mark.parametrize(
    ("code", "return_code", "stderr"),
    [
        ("1/0", 1, "ZeroDivisionError: division by zero\n"),
        ("if", 1, "SyntaxError: invalid syntax\n"),
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit()", 0, ""),
        ("import sys; sys.exit('bad input')", 1, "bad input\n"),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
    ],
)
async def test_a_program_that_fails_is_failed_with_its_return_code(
    http: httpx.AsyncClient, code: str, return_code: int, stderr: str
) -> None:
    answer = await run(http, "/run_code", code=code)
    assert answer["status"] == ("Failed" if return_code else "Success")
    assert answer["run_result"]["status"] == "Finished"
    assert answer["run_result"]["return_code"] == return_code
    assert answer["run_result"]["stderr"].endswith(stderr)
    assert ("Traceback" in answer["run_result"]["stderr"]) == (stderr.startswith("Zero"))


async def test_a_program_gets_its_standard_input(http: httpx.AsyncClient) -> None:
    code = "import sys\na = input()\nprint(a.upper(), sys.stdin.read())"
    assert (await run(http, "/run_code", code=code, stdin="é\nrest"))["run_result"]["stdout"] == "É rest\n"
    without = await run(http, "/run_code", code="input()")
    assert "EOFError" in without["run_result"]["stderr"]


async def test_a_timeout_is_a_time_limit_exceeded_without_return_code(http: httpx.AsyncClient) -> None:
    answer = await run(http, "/run_code", code="print(1, flush=True)\nimport time; time.sleep(60)", run_timeout=2)
    result = answer["run_result"]
    assert (answer["status"], result["status"], result["return_code"]) == ("Failed", "TimeLimitExceeded", None)
    assert result["stdout"] == "1\n"


async def test_another_language_is_refused_in_that_api_s_way(http: httpx.AsyncClient) -> None:
    answer = await run(http, "/run_code", code="int main() {}", language="cpp")
    assert (answer["status"], answer["run_result"]) == ("SandboxError", None)
    assert "'cpp'" in answer["message"]
    assert (await http.post("/run_code", json={"code": "", "language": "klingon"})).status_code == 422


async def test_a_client_s_own_session_id_keeps_its_state_and_an_empty_one_makes_a_new_session(
    http: httpx.AsyncClient,
) -> None:
    first = await run(http, "/run_stateful_code", code="x = 41", session_id="mine")
    assert (first["status"], first["session_id"]) == ("Success", "mine")
    second = await run(http, "/run_stateful_code", code="print(x + 1)", session_id="mine")
    assert second["run_result"]["stdout"] == "42\n"
    failed = await run(http, "/run_stateful_code", code="y = 1; 1/0", session_id="mine")
    assert (failed["status"], failed["run_result"]["return_code"]) == ("Failed", 1)
    assert (await run(http, "/run_stateful_code", code="print(x, y)", session_id="mine"))["status"] == "Success"
    other = await run(http, "/run_stateful_code", code="print(x)")
    assert "NameError" in other["run_result"]["stderr"]
    again = await run(http, "/run_stateful_code", code="x = 1", session_id=other["session_id"])
    assert (again["status"], again["session_id"]) == ("Success", other["session_id"])


async def test_names_belong_to_the_bearer_who_chose_them(served: Served, http: httpx.AsyncClient) -> None:
    names = SessionNames(served, ttl_s=600, idle_ttl_s=600)  # type: ignore[arg-type]
    one, same, other = await asyncio.gather(
        names.session_for("a", "s", Limits()),
        names.session_for("a", "s", Limits()),
        names.session_for("b", "s", Limits()),
    )
    assert one == same
    assert one != other


async def test_a_name_whose_session_could_not_be_made_is_free_again(served: Served, http: httpx.AsyncClient) -> None:
    names = SessionNames(served, ttl_s=600, idle_ttl_s=600)  # type: ignore[arg-type]
    served.raises = {"create": PoolFull(1.0, "full")}
    for answer in await asyncio.gather(
        *(names.session_for("a", "s", Limits()) for _ in range(2)), return_exceptions=True
    ):
        assert isinstance(answer, PoolFull)
    served.raises = {}
    assert await names.session_for("a", "s", Limits())


async def test_a_name_means_another_session_only_after_the_lifetime_of_the_first(
    served: Served, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = SessionNames(served, ttl_s=600, idle_ttl_s=600)  # type: ignore[arg-type]
    first = await names.session_for("a", "s", Limits())
    await served.pool.close(first)
    assert await names.session_for("a", "s", Limits()) == first
    monkeypatch.setattr("serve.names.time", SimpleNamespace(monotonic=lambda: time.monotonic() + 600))
    assert await names.session_for("a", "s", Limits()) != first


async def test_a_lost_session_is_a_sandbox_error_and_never_a_fresh_one(
    served: Served, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    await run(http, "/run_stateful_code", code="x = 1", session_id="doomed")
    (session_id,) = served.pool._sessions
    cell = served.pool._sessions[session_id].cell

    async def lost(*args: object) -> None:
        raise CellLost("the machine under it is gone")

    with monkeypatch.context() as patch:
        patch.setattr(cell.link, "execute", lost)
        answer = await run(http, "/run_stateful_code", code="print(x)", session_id="doomed")
    assert (answer["status"], answer["run_result"]) == ("SandboxError", None)
    for _ in range(2):
        answer = await run(http, "/run_stateful_code", code="print('fresh?')", session_id="doomed")
        assert (answer["status"], answer["run_result"]) == ("SandboxError", None)
        assert "is gone" in answer["message"]


async def test_a_full_service_refuses_a_compat_call_as_any_other(served: Served, http: httpx.AsyncClient) -> None:
    served.raises = {"create": PoolFull(7.0, "full")}
    for path, body in (
        ("/run_code", {"code": "1", "language": "python"}),
        ("/run_stateful_code", {"code": "1", "language": "python"}),
        ("/run_jupyter", {"cells": ["1"]}),
    ):
        answer = await http.post(path, json=body)
        assert (answer.status_code, answer.headers["Retry-After"]) == (429, "7")


async def test_a_notebook_goes_on_after_an_error_and_shows_values_apart_from_prints(http: httpx.AsyncClient) -> None:
    cells = ["a = 123", "a", "print(a)", "import sys; print('e', file=sys.stderr)", "raise RuntimeError('no')", "a + 1"]
    answer = await run(http, "/run_jupyter", cells=cells)
    assert (answer["status"], answer["driver"]["status"]) == ("Success", "Finished")
    shown = [(c["stdout"], c["stderr"], c["display"]) for c in answer["cells"]]
    assert shown == [
        ("", "", []), ("", "", [{"text/plain": "123"}]), ("123\n", "", []), ("", "e\n", []), ("", "", []),
        ("", "", [{"text/plain": "124"}]),
    ]  # fmt: skip
    (error,) = answer["cells"][4]["error"]
    assert (error["ename"], error["evalue"]) == ("RuntimeError", "no")
    assert error["traceback"][-1] == "RuntimeError: no"


@pytest.mark.parametrize("limits", [{"cell_timeout": 0.3}, {"total_timeout": 0.3}])
async def test_a_notebook_that_takes_too_long_is_failed(http: httpx.AsyncClient, limits: dict[str, float]) -> None:
    answer = await run(http, "/run_jupyter", cells=["1", "import time; time.sleep(9)", "2"], **limits)
    assert (answer["status"], answer["driver"]["status"], answer["cells"]) == ("Failed", "TimeLimitExceeded", [])


async def test_files_of_a_compat_call_that_are_not_base64_or_lead_out_are_a_sandbox_error(
    http: httpx.AsyncClient,
) -> None:
    answer = await run(http, "/run_code", code="1", files={"a": "not base64!"})
    assert answer["status"] == "SandboxError"
    assert "base64" in answer["message"]
