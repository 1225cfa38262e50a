"""The composition root: a recipe becomes a Ray cluster, a sandbox service, engines and a learner gang.

The only library module that imports `actors/`, and it does so where it starts something: ray, torch and vllm take
seconds to import, and `--dry-run` and `--help` must work where they are not installed. Every context manager here
closes what it opened, in reverse order, also when the body fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aster.agent.chat import ChatRenderer
from aster.agent.rewards import RewardPool
from aster.agent.sandbox import HttpSandboxFactory
from aster.config import Recipe
from aster.errors import ConfigError
from aster.roles import LearnerGroup, RolloutPool, SandboxFactory
from aster.tracking import Sink
from serve.schema import MAX_IDLE_TTL_S, MAX_TTL_S, CreateSession, Limits

if TYPE_CHECKING:
    from actors.group import RayLearnerGroup

TOKEN_VARIABLE = "ASTER_SANDBOX_TOKEN"

_LEASE_GRACE_S = 300.0


@contextlib.contextmanager
def cluster(recipe: Recipe) -> Iterator[None]:
    """A Ray connection for the body. One that was there before is left as it was."""
    from actors.cluster import connect, disconnect

    mine = connect(recipe.cluster)
    try:
        yield
    finally:
        if mine:
            disconnect()


@contextlib.contextmanager
def sandboxes(recipe: Recipe) -> Iterator[SandboxFactory | None]:
    """Sessions for trajectories: the service at `sandbox.url`, the app already deployed here, or one for the body."""
    from actors.sandbox import HandleSandboxFactory, deploy_sandbox, is_deployed, remove_sandbox

    token = os.environ.get(TOKEN_VARIABLE)
    session, keep = session_request(recipe), recipe.tool.max_output_bytes
    if not recipe.tool.enabled:
        yield None
    elif recipe.sandbox.url:
        yield HttpSandboxFactory(recipe.sandbox.url, token=token, session=session, max_output_bytes=keep)
    else:
        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # its steps of starting up are no news
        mine = not is_deployed()
        try:
            deploy_sandbox(recipe.sandbox, token=token)
            yield HandleSandboxFactory(session=session, max_output_bytes=keep)
        finally:
            if mine:
                remove_sandbox()


def session_request(recipe: Recipe) -> CreateSession:
    """A session that no trajectory of the recipe can outlive, since the end of a lease counts as SANDBOX_LOST.

    Without a call it ends after the longest turn, and not later: what a killed engine leaves open holds its place in
    the service until then.
    """
    longest = max(recipe.train_budget().trajectory_timeout_s, recipe.eval_budget().trajectory_timeout_s)
    turn = min(longest, recipe.rollout.generate_timeout_s or longest)
    return CreateSession(
        ttl_s=min(longest + _LEASE_GRACE_S, MAX_TTL_S),
        idle_ttl_s=min(turn + _LEASE_GRACE_S, MAX_IDLE_TTL_S),
        limits=Limits(memory_bytes=recipe.sandbox.memory_bytes),
    )


def metric_sinks(recipe: Recipe) -> list[Sink]:
    """Where a run's metrics go beside its directory: Prometheus, unless `cluster.metrics=false`. Needs the cluster."""
    from actors.metrics import RunGauges

    return [RunGauges(recipe.run.name)] if recipe.cluster.metrics else []


@dataclass(frozen=True)
class Rollouts:
    """A pool of engines and the renderer of the model they run."""

    pool: RolloutPool
    renderer: ChatRenderer


@contextlib.asynccontextmanager
async def rollouts(
    recipe: Recipe, *, sandboxes: SandboxFactory | None, on: RayLearnerGroup | None = None
) -> AsyncIterator[Rollouts]:
    """Engines on `model.path`, with rewards and weight publication, behind one pool.

    `on`: learners at rest, whose devices the engines share.
    """
    from actors.colocated import ColocatedPool, DeviceTurn
    from actors.metrics import pool_gauges
    from actors.rollout import EngineMaker
    from actors.router import EnginePool
    from actors.weight_sync import WeightSync

    require_model(recipe)
    renderer = ChatRenderer.from_model_dir(recipe.model.path)
    workers = recipe.rollout.reward_workers or max(2, (os.cpu_count() or 1) // 8)
    rewards = RewardPool(reward=recipe.algo.reward, workers=workers)
    try:
        maker = EngineMaker(
            recipe, model_path=recipe.model.path, sandboxes=sandboxes, shared=None if on is None else await on.devices()
        )
        engines = await asyncio.to_thread(maker.start)
        turn = None if on is None else DeviceTurn(on, lambda: engines)
        pool = EnginePool(
            engines,
            rewards=rewards,
            publisher=WeightSync(
                engines,
                backend=recipe.rollout.weight_backend,
                rollback=recipe.rollout.weight_rollback,
                handover=turn,
                timeout_s=recipe.rollout.publish_timeout_s,
            ),
            replace_engine=maker.replace if on is None else None,  # vLLM starts only where the memory is free
            recall=maker.kept.of if maker.kept else None,
            max_retries=recipe.rollout.max_retries,
            max_infra_failed_rate=recipe.rollout.max_infra_failed_rate,
            max_staleness=recipe.rollout.max_staleness,
            run_name=recipe.run.name,
        )
        watched = pool_gauges(pool, run=recipe.run.name) if recipe.cluster.metrics else contextlib.nullcontext()
        try:
            async with watched:
                yield Rollouts(pool if turn is None else ColocatedPool(pool, turn), renderer)
        finally:
            await pool.close()
    finally:
        rewards.close()


@contextlib.asynccontextmanager
async def learners(recipe: Recipe, *, total_steps: int) -> AsyncIterator[RayLearnerGroup]:
    """The FSDP2 gang on `model.path`; `total_steps` optimizer steps shape the learning-rate schedule."""
    from actors.group import RayLearnerGroup

    require_model(recipe)
    group = await RayLearnerGroup.spawn(recipe, model_path=recipe.model.path, total_steps=total_steps)
    try:
        yield group
    finally:
        await group.close()


@contextlib.asynccontextmanager
async def trainer(
    recipe: Recipe, *, sandboxes: SandboxFactory | None, total_steps: int
) -> AsyncIterator[tuple[Rollouts, LearnerGroup]]:
    """`rollouts` and `learners`, started side by side: engines take longest, and neither needs the other to start.

    Colocated, one after the other, and the engines into the memory that the learners left.
    """
    if recipe.cluster.placement == "colocated":
        from actors.colocated import ColocatedLearners, ColocatedPool
        from actors.placement import require_shareable

        require_shareable(recipe)
        async with learners(recipe, total_steps=total_steps) as group:
            await group.rest()
            async with rollouts(recipe, sandboxes=sandboxes, on=group) as opened_on:
                assert isinstance(opened_on.pool, ColocatedPool)
                yield opened_on, ColocatedLearners(group, opened_on.pool.turn)
        return
    async with contextlib.AsyncExitStack() as stack:
        opened = await asyncio.gather(
            stack.enter_async_context(rollouts(recipe, sandboxes=sandboxes)),
            stack.enter_async_context(learners(recipe, total_steps=total_steps)),
            return_exceptions=True,  # wait for both, so that the one that did start is closed again
        )
        for result in opened:
            if isinstance(result, BaseException):
                raise result
        yield opened[0], opened[1]  # type: ignore[misc]  # narrowed by the loop above


def merge_checkpoint(path: str, out: str, *, source: str, dtype: str) -> None:
    """The learner checkpoint `path` as the Hugging Face directory `out`, in this process, without Ray."""
    from actors.persist import merge_checkpoint

    merge_checkpoint(path, out, source=source, dtype=dtype)


def merge_reference(path: str, out: str, *, dtype: str) -> None:
    """A directory in the reference's FSDP layout as the Hugging Face directory `out`, in this process."""
    from actors.reference_layout import merge_reference

    merge_reference(path, out, dtype=dtype)


def require_model(recipe: Recipe) -> None:
    """Raises `ConfigError` unless `model.path` is a directory with a config.json."""
    path = recipe.model.path
    if not path:
        raise ConfigError(
            "model.path is empty: give a Hugging Face model directory, for example model.path=models/qwen3"
        )
    if not os.path.isfile(os.path.join(path, "config.json")):
        raise ConfigError(
            f"model.path={path!r} holds no config.json: give a Hugging Face model directory "
            "(`aster prepare` writes one for the CPU recipes, `aster merge` one from a checkpoint)"
        )
