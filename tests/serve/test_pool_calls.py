"""The calls to the pools when a pool dies over one."""

import pytest
import ray

from serve.calls import PoolCalls
from serve.errors import SandboxUnavailable
from serve.schema import CreateSession


class Handle:
    """A deployment whose replicas die over the first `deaths` calls."""

    def __init__(self, deaths: int) -> None:
        self.deaths, self.asked = deaths, 0

    def options(self, **_: object) -> "Handle":
        return self

    async def remote(self, *_: object) -> str:
        self.asked += 1
        if self.asked <= self.deaths:
            raise ray.exceptions.ActorUnavailableError("killed", None)
        return "opened"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.calls._PAUSE_S", 0.001)


async def test_a_session_is_asked_for_again_when_the_pool_dies_that_was_opening_it() -> None:
    handle = Handle(deaths=3)
    assert await PoolCalls(handle).create(CreateSession()) == "opened"  # type: ignore[arg-type]  # stands in for Serve's
    assert handle.asked == 4


async def test_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.calls._SUCCESSOR_S", 0.05)
    with pytest.raises(SandboxUnavailable, match="a sandbox pool died"):
        await PoolCalls(Handle(deaths=10**6)).create(CreateSession())  # type: ignore[arg-type]
