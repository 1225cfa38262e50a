"""Ids, admission, leases and routing, without a cell."""

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

from serve.errors import PoolFull, SessionGone, SessionUnknown
from serve.policy import Lease, Mint, Tombstones, Turnstile, owner_of


def test_an_id_names_its_owner_and_only_its_mint_knows_it() -> None:
    mint, other = Mint(b"a"), Mint(b"b")
    one, two = mint.new("node-0"), mint.new("node-0")
    assert one != two
    assert owner_of(one) == "node-0"
    assert len(one.split(".")[1]) == 32
    assert mint.is_ours(one)
    assert not other.is_ours(one)
    for forged in ("", "x", "node-0.ab.cd", one + "0", one.replace("node-0", "node-1"), "é.é.é"):
        assert not mint.is_ours(forged)
    assert owner_of("free text") == owner_of(None) == owner_of("a.b.c.d") == ""


def test_an_unknown_id_is_unknown_and_a_lost_one_says_why() -> None:
    mint = Mint(b"k")
    graves = Tombstones(mint)
    known, forgotten = mint.new("n-0"), mint.new("n-0")
    graves.bury(known, "expired")
    assert isinstance(graves.explain("a.b.c"), SessionUnknown)
    gone = graves.explain(known)
    assert isinstance(gone, SessionGone)
    assert gone.reason == "expired"
    assert "restarted" in str(graves.explain(forgotten))


async def test_no_more_cells_run_than_allowed_and_a_full_queue_refuses() -> None:
    turnstile = Turnstile(running=2, waiting=1, timeout_s=5)
    release = asyncio.Event()
    peak = 0

    async def cell() -> float:
        nonlocal peak
        async with turnstile.admit() as waited:
            peak = max(peak, turnstile.running)
            await release.wait()
            return waited

    tasks = [asyncio.create_task(cell()) for _ in range(3)]
    await asyncio.sleep(0.05)
    assert (turnstile.running, turnstile.waiting) == (2, 1)
    with pytest.raises(PoolFull, match="2 cells run and 1 wait"):
        await cell()
    release.set()
    waits = await asyncio.gather(*tasks)
    assert peak == 2
    assert max(waits) >= 0.04
    assert (turnstile.running, turnstile.waiting) == (0, 0)


async def test_waiting_has_an_end_and_leaves_no_trace() -> None:
    turnstile = Turnstile(running=1, waiting=5, timeout_s=0.05)
    async with turnstile.admit():
        with pytest.raises(PoolFull, match=r"waited 0\.05 s"):
            async with turnstile.admit():
                raise AssertionError("admitted beyond the limit")
    began = time.monotonic()
    async with turnstile.admit() as waited:
        assert (turnstile.running, turnstile.waiting) == (1, 0)
        assert 0 <= waited <= time.monotonic() - began


def test_a_lease_ends_by_age_or_by_silence() -> None:
    before = time.time()
    lease = Lease.new(ttl_s=100, idle_ttl_s=10)
    now = time.monotonic()
    assert lease.expired(now) == ""
    assert "without a call" in lease.expired(now + 11)
    assert "after 100 s" in lease.expired(now + 101)
    assert before + 9.9 < lease.expires_at < time.time() + 10.1


def replica(name: str, sessions: int = 0) -> Any:
    return SimpleNamespace(replica_id=name, replica_metadata={"owner": name}, routing_stats={"sessions": sessions})


def router(*replicas: Any) -> Any:
    from serve.router import SessionRouter

    made = SessionRouter.__new__(SessionRouter)
    made.initialize_state()
    made._owners = {r.replica_metadata["owner"]: r for r in replicas}
    return made


def request(session_id: str) -> Any:
    return SimpleNamespace(
        metadata=SimpleNamespace(session_id=session_id), routing_context=SimpleNamespace(should_backoff=False)
    )


async def test_a_session_is_routed_to_its_owner_alone() -> None:
    a, b = replica("a-0"), replica("b-0")
    pending = request(Mint(b"k").new("b-0"))
    assert await router(a, b).choose_replicas([a, b], pending) == [[b]]
    assert pending.routing_context.should_backoff


async def test_a_session_whose_owner_is_gone_is_answered_by_somebody() -> None:
    a, b = replica("a-0"), replica("b-0")
    ranks = await router(a, b).choose_replicas([a, b], request(Mint(b"k").new("gone-0")))
    assert sorted(r.replica_id for rank in ranks for r in rank) == ["a-0", "b-0"]


async def test_new_sessions_go_to_the_emptiest_and_spread_between_two_reports() -> None:
    a, b = replica("a-0", sessions=5), replica("b-0", sessions=3)
    one = router(a, b)
    first = [(await one.choose_replicas([a, b], request("")))[0][0].replica_id for _ in range(6)]
    assert first == ["b-0", "b-0", "a-0", "b-0", "a-0", "b-0"]
    assert (await one.choose_replicas([a, b], None))[0]
