"""What the clients send again, what they raise, and how a session outlives the pool it was in. No Ray."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
import pytest_asyncio
from sandboxes import start_pool

from serve.client import AsyncSandboxClient
from serve.errors import (
    CannotFork,
    FileRefused,
    PoolFull,
    RequestRefused,
    SandboxServiceError,
    SandboxUnavailable,
    SessionGone,
    SessionLost,
    SessionUnknown,
    TokenRefused,
)
from serve.policy import owner_of
from serve.pool import SandboxPool
from serve.schema import CreateSession, ExecuteRequest, ExecuteResponse, ForkSession, Session, State
from serve.sessions import AsyncSession
from serve.wire import refusal

pytestmark = pytest.mark.asyncio(loop_scope="module")

OPENED = httpx.Response(201, json={"session_id": "n.r.s", "node": "n", "expires_at": 0})
RAN = httpx.Response(200, json={"status": "ok", "result": "1"})
Step = httpx.Response | Exception


class Wire(httpx.AsyncBaseTransport):
    """Answers with `steps`, one after another, the last one for ever; keeps what was sent."""

    def __init__(self, *steps: Step) -> None:
        self.steps = list(steps)
        self.sent: list[httpx.Request] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        self.sent.append(request)
        step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        if isinstance(step, Exception):
            raise step
        return httpx.Response(step.status_code, headers=step.headers, content=step.content)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.client._PAUSE_S", 0.001)


def refused(error: SandboxServiceError) -> httpx.Response:
    status, body, headers = refusal(error)
    return httpx.Response(status, headers=headers, content=body.model_dump_json())


BROKEN = httpx.ReadError("connection reset")
NEVER_SENT = httpx.ConnectError("refused")
REPEATABLE: dict[str, Callable[[AsyncSandboxClient], Any]] = {
    "execute": lambda c: c.execute("s", ExecuteRequest(code="1", call_id="c")),
    "get": lambda c: c.get("s"),
    "close": lambda c: c.close("s"),
    "reset": lambda c: c.reset("s"),
    "read_file": lambda c: c.read_file("s", "a"),
    "write_file": lambda c: c.write_file("s", "a", b"1"),
    "journal": lambda c: c.journal("s"),
}
ONCE: dict[str, Callable[[AsyncSandboxClient], Any]] = {
    "create": lambda c: c.create(CreateSession()),
    "fork": lambda c: c.fork("s", ForkSession()),
    "interrupt": lambda c: c.interrupt("s"),
    "execute without an id": lambda c: c.execute("s", ExecuteRequest(code="1")),
}


@pytest.mark.parametrize("fault", [BROKEN, refused(SandboxUnavailable("no answer", 504)), httpx.Response(502)])
@pytest.mark.parametrize("name", REPEATABLE)
async def test_what_may_be_repeated_is_sent_three_times(name: str, fault: Step) -> None:
    wire = Wire(fault)
    async with AsyncSandboxClient("http://s", transport=wire) as client:
        with pytest.raises(SandboxUnavailable):
            await REPEATABLE[name](client)
    assert len(wire.sent) == 3
    assert len({(request.method, request.url, request.content) for request in wire.sent}) == 1


@pytest.mark.parametrize("fault", [BROKEN, refused(SandboxUnavailable("no answer", 504)), httpx.Response(500)])
@pytest.mark.parametrize("name", ONCE)
async def test_what_may_have_been_done_is_never_sent_again(name: str, fault: Step) -> None:
    wire = Wire(fault)
    async with AsyncSandboxClient("http://s", transport=wire) as client:
        with pytest.raises(SandboxUnavailable):
            await ONCE[name](client)
    assert len(wire.sent) == 1


@pytest.mark.parametrize("name", [*REPEATABLE, *ONCE])
async def test_what_never_left_is_sent_again_whatever_it_is(name: str) -> None:
    wire = Wire(NEVER_SENT)
    async with AsyncSandboxClient("http://s", transport=wire) as client:
        with pytest.raises(SandboxUnavailable, match="ConnectError") as error:
            await (REPEATABLE | ONCE)[name](client)
    assert len(wire.sent) == 3
    assert error.value.code == 503


async def test_a_call_of_a_session_carries_one_id_through_all_its_tries() -> None:
    wire = Wire(OPENED, BROKEN, BROKEN, RAN)
    async with AsyncSandboxClient("http://s", transport=wire) as client:
        session = await client.session()
        assert (await session.execute("1")).result == "1"
    bodies = [request.content for request in wire.sent[1:]]
    assert len(bodies) == 3
    assert len(set(bodies)) == 1
    assert b'"call_id":""' not in bodies[0]


async def test_a_full_service_is_asked_again_when_it_says_and_not_beyond_the_client_s_patience() -> None:
    full = httpx.Response(429, headers={"Retry-After": "0.1"}, json={"error": "full", "detail": "sandbox is full: x"})
    wire = Wire(full, full, OPENED)
    began = asyncio.get_running_loop().time()
    async with AsyncSandboxClient("http://s", transport=wire) as client:
        assert (await client.create(CreateSession())).session_id == "n.r.s"
    assert asyncio.get_running_loop().time() - began >= 0.2
    wire = Wire(full)
    async with AsyncSandboxClient("http://s", transport=wire, full_wait_s=2.0) as client:
        with pytest.raises(PoolFull, match="x") as error:
            await client.create(CreateSession())
    assert error.value.retry_after_s == 0.1
    assert 2 <= len(wire.sent) <= 21  # every 0.1 s, or less often on a slow machine


@pytest.mark.parametrize(
    "error",
    [
        SessionUnknown("s"),
        SessionGone("s", "expired after 5 s"),
        SessionLost("s", "its node died"),
        CannotFork("s", "it has 2 threads"),
        PoolFull(3.0, "8 cells run"),
        FileRefused(404, "no such file"),
        FileRefused(507, "no room"),
        TokenRefused("missing or wrong bearer token"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_a_refusal_is_the_same_exception_on_both_sides_of_the_wire(error: SandboxServiceError) -> None:
    async with AsyncSandboxClient("http://s", transport=Wire(refused(error)), full_wait_s=0) as client:
        with pytest.raises(type(error)) as raised:
            await client.read_file("s", "a")
    assert type(raised.value) is type(error)
    assert raised.value.args == error.args
    assert str(raised.value) == str(error)


async def test_a_proxy_s_page_is_known_by_its_status() -> None:
    for status, kind in ((404, RequestRefused), (429, PoolFull), (502, SandboxUnavailable), (413, RequestRefused)):
        wire = Wire(httpx.Response(status, text="<html>nginx</html>"))
        async with AsyncSandboxClient("http://s", transport=wire, full_wait_s=0) as client:
            with pytest.raises(kind, match="nginx"):
                await client.get("s")
    async with AsyncSandboxClient("http://s", transport=Wire(httpx.Response(200, text="<html>"))) as client:
        with pytest.raises(SandboxUnavailable, match="not this service"):
            await client.get("s")


async def test_no_id_and_no_path_leaves_its_place_in_the_url() -> None:
    wire = Wire(httpx.Response(204))
    async with AsyncSandboxClient("http://s", transport=wire) as client:
        await client.close("a/../b?c#d")
        assert wire.sent[0].url.raw_path == b"/v1/sessions/a%2F..%2Fb%3Fc%23d"
        await client.write_file("s", "a b/é?.txt", b"1")
        assert wire.sent[1].url.raw_path == b"/v1/sessions/s/files/a%20b/%C3%A9%3F.txt"
        with pytest.raises(FileRefused):
            await client.write_file("s", "../../t/files/a", b"1")
        with pytest.raises(SessionUnknown):
            await client.close("..")
    assert len(wire.sent) == 2


# a session that outlives its pool ------------------------------------------------------------------------------------


class TwoPools:
    """Two real pools behind one `SandboxService`, as Serve's router joins them: by the owner in the id. A pool that has
    ended is answered for by the other, as a node that was lost."""

    def __init__(self, pools: list[SandboxPool]) -> None:
        self.pools = {pool.owner: pool for pool in pools}

    async def create(self, request: CreateSession) -> Session:
        return await next(iter(self.pools.values())).create(request)

    async def execute(self, session_id: str, request: ExecuteRequest) -> ExecuteResponse:
        return await self._owner(session_id).execute(session_id, request)

    async def write_file(self, session_id: str, path: str, content: bytes) -> None:
        await self._owner(session_id).write_file(session_id, path, content)

    async def close(self, session_id: str) -> None:
        await self._owner(session_id).close(session_id)

    def _owner(self, session_id: str) -> SandboxPool:
        if owner_of(session_id) not in self.pools:
            raise SessionLost(session_id, "its owner was restarted or its node was lost")
        return self.pools[owner_of(session_id)]

    async def lose_the_first(self) -> None:
        await self.pools.pop(next(iter(self.pools))).stop()


@pytest_asyncio.fixture(loop_scope="module")
async def two() -> AsyncIterator[TwoPools]:
    service = TwoPools([await start_pool("process") for _ in range(2)])
    yield service
    for pool in service.pools.values():
        await pool.stop()


async def test_a_session_is_rebuilt_elsewhere_with_its_state_and_says_so(two: TwoPools) -> None:
    session = await AsyncSession.open(two)  # type: ignore[arg-type]
    first = session.session_id
    await session.execute("import itertools\ncounter = itertools.count(40)\nprint(next(counter))")
    await session.execute("1/0")
    await two.lose_the_first()
    answer = await session.execute("next(counter)", call_id="c")
    assert (answer.result, answer.state, answer.cell) == ("41", State.REPLAYED, 3)
    assert owner_of(session.session_id) != owner_of(first)
    after = await session.execute("next(counter)")
    assert (after.result, after.state) == ("42", State.KEPT)
    await session.close()


@pytest.mark.parametrize(
    ("cell", "why"),
    [
        ("import secrets; print(secrets.token_hex())", "cell 1 had another outcome"),
        ("import time; time.sleep(9)", "cannot be repeated"),
    ],
)
async def test_a_past_that_cannot_be_repeated_is_a_lost_session_and_leaves_nothing_behind(
    two: TwoPools, cell: str, why: str
) -> None:
    session = await AsyncSession.open(two)  # type: ignore[arg-type]
    await session.execute(cell, timeout_s=1 if "sleep" in cell else 20)
    await two.lose_the_first()
    for _ in range(2):
        with pytest.raises(SessionLost, match=why):
            await session.execute("1")
    (pool,) = two.pools.values()
    assert (await pool.stats())["sessions"] == 0


async def test_a_session_without_rebuilding_is_simply_lost(two: TwoPools) -> None:
    session = await AsyncSession.open(two, rebuild=False)  # type: ignore[arg-type]
    await session.execute("x = 1")
    await two.lose_the_first()
    with pytest.raises(SessionLost, match="its node was lost"):
        await session.execute("x")


async def test_an_interpreter_that_died_takes_its_past_with_it(two: TwoPools) -> None:
    session = await AsyncSession.open(two)  # type: ignore[arg-type]
    await session.execute("import secrets; print(secrets.token_hex())")  # could not be repeated
    assert (await session.execute("import os; os._exit(1)")).state is State.LOST
    assert (await session.execute("x = 5")).state is State.LOST  # told once: the interpreter is fresh
    await two.lose_the_first()
    answer = await session.execute("x")
    assert (answer.result, answer.state) == ("5", State.REPLAYED)


async def test_a_closed_session_stays_closed(two: TwoPools) -> None:
    async with await AsyncSession.open(two) as session:  # type: ignore[arg-type]
        await session.execute("x = 1")
    await session.close()
    with pytest.raises(SessionGone, match="closed by its client"):
        await session.execute("x")
