"""What a recipe's numbers become where its parts are put together."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from actors import rollout, weight_sync
from aster import launch
from aster.config import Recipe
from serve.schema import CreateSession, ExecuteRequest, ExecuteResponse, Session, Status

# sandboxes ------------------------------------------------------------------------------------------------------------


class Recorded:
    """A sandbox service, by its handle or over HTTP, that remembers what it was asked."""

    def __init__(self) -> None:
        self.opened: list[CreateSession] = []
        self.ran: list[ExecuteRequest] = []

    async def create(self, request: CreateSession) -> Session:
        self.opened.append(request)
        return Session(session_id="n.r.s", node="n", expires_at=0)

    async def execute(self, session_id: str, request: ExecuteRequest) -> ExecuteResponse:
        self.ran.append(request)
        return ExecuteResponse(status=Status.OK)

    async def answer(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        if request.url.path == "/v1/sessions":
            return httpx.Response(201, json=(await self.create(CreateSession(**body))).model_dump())
        answer = await self.execute("n.r.s", ExecuteRequest(**body))
        return httpx.Response(200, json=answer.model_dump(mode="json"))


async def use(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """One cell of one trajectory, on a service that is not there."""
    service = Recorded()
    for name in ("deploy_sandbox", "is_deployed", "remove_sandbox"):
        monkeypatch.setattr(f"actors.sandbox.{name}", lambda *_, **__: None)
    monkeypatch.setattr("actors.sandbox.pool_calls", lambda _: service)
    with launch.sandboxes(recipe) as factory:
        assert factory is not None
        if recipe.sandbox.url:
            factory._transport = httpx.MockTransport(service.answer)
        sandbox = await factory.open("a trajectory")
        await sandbox.execute("1", timeout_s=5, call_id="0")
    return service


@pytest.mark.parametrize("url", [None, "http://sandbox"])
async def test_a_recipe_s_limits_reach_the_session_and_its_calls(url: str | None, monkeypatch) -> None:
    mine = ["sandbox.memory_bytes=134217728", "tool.max_output_bytes=5000", "budget.trajectory_timeout_s=600"]
    eval_budget = "eval.budget={trajectory_timeout_s: 28800}"
    service = await use(Recipe.load("rl_stage1_18k", [f"sandbox.url={url or 'null'}", *mine, eval_budget]), monkeypatch)
    (opened,), (ran,) = service.opened, service.ran
    assert (opened.limits.memory_bytes, ran.max_output_bytes) == (128 << 20, 5000)
    assert opened.ttl_s == 28800 + 300, "an evaluation's trajectory is the longest"
    assert opened.idle_ttl_s == 1800 + 300, "and generate_timeout_s its longest turn"


@pytest.mark.parametrize(
    ("timeout_s", "ttl_s", "idle_ttl_s"), [(28800, 29100, 29100), (100_000, 100_300, 86_400), (1e6, 604_800, 86_400)]
)
def test_a_session_lives_as_long_as_a_turn_may_take_and_the_service_allows(timeout_s, ttl_s, idle_ttl_s) -> None:
    request = launch.session_request(Recipe.load("eval_90k", [f"budget.trajectory_timeout_s={timeout_s}"]))
    assert (request.ttl_s, request.idle_ttl_s) == (ttl_s, idle_ttl_s)


# publication ----------------------------------------------------------------------------------------------------------


class Built(Exception):
    pass


async def test_a_publication_has_a_time_of_its_own(monkeypatch, tmp_path):
    def publisher(engines: Any, **options: Any) -> None:
        raise Built(options["timeout_s"])

    class Maker:
        def __init__(self, *args: Any, **options: Any) -> None: ...

        def start(self) -> list[Any]:
            return []

    monkeypatch.setattr(rollout, "EngineMaker", Maker)
    monkeypatch.setattr(weight_sync, "WeightSync", publisher)
    monkeypatch.setattr(launch.ChatRenderer, "from_model_dir", lambda path: None)
    (tmp_path / "config.json").touch()
    recipe = Recipe.load("cpu_quickstart", [f"model.path={tmp_path}", "rollout.publish_timeout_s=7"])
    with pytest.raises(Built) as built:
        async with launch.rollouts(recipe, sandboxes=None):
            pass
    assert built.value.args == (7,)
