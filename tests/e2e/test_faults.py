"""Faults injected into the whole chain: engines, learner, sandbox cells behind Serve, verifier, pool and ledger.

After every fault: each sample is there exactly once, the causes of all attempts add up, a sample has no reward if and
only if we lost it, the tool's answers are those of an undisturbed session (`faults.py`), and nothing waits for ever.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from fakes import MemoryLog
from faults import FIRST, ROWS, SECOND, assert_whole, kill_cells, taught_model, verifiers
from learners import hf_log_probs
from transformers import Qwen3ForCausalLM
from waiting import until

pytest.importorskip("vllm", reason="vllm is not installed: make setup")

import psutil  # vllm's
import ray

from actors.rollout import EngineMaker, RayEngine
from actors.router import EnginePool
from actors.sandbox import pool_calls, remove_sandbox
from actors.weight_sync import WeightSync
from aster import launch
from aster.agent.rewards import RewardPool
from aster.algo.packing import pack, unpack
from aster.config import Recipe
from aster.data.journal import FOLDER, KeptTurns
from aster.data.prompts import PromptStream
from aster.driver import GrpoLoop
from aster.errors import CircuitOpen
from aster.metrics import cause_metrics
from aster.recorder import RolloutStep
from aster.roles import LearnerGroup, RolloutPool, SandboxFactory
from aster.types import Cause, PromptRow, RolloutWork, Sample, Trajectory, TrajectoryGroup
from serve.calls import PoolCalls

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1000), pytest.mark.asyncio(loop_scope="module")]

GROUP = 4
UNREADABLE = ""  # a ground truth that the verifier cannot read, whatever the answer is


@dataclass
class World:
    """What lives through all tests. `rewards` decides with math-verify, so that its failures matter."""

    recipe: Recipe
    engines: list[RayEngine]
    learners: LearnerGroup
    rewards: RewardPool
    sync: WeightSync
    cells: PoolCalls
    node: str
    kept: KeptTurns

    @property
    def journal(self) -> Path:
        return self.recipe.run.path.resolve() / FOLDER

    @asynccontextmanager
    async def pool(self, name: str, **settings: Any) -> AsyncIterator[EnginePool]:
        """A pool of its own, with its own ledger, over the same engines."""
        pool = EnginePool(
            self.engines,
            rewards=self.rewards,
            publisher=self.sync,
            recall=self.kept.of,
            run_name=name,
            **settings,
        )
        try:
            yield pool
        finally:
            await pool.drain()

    def loop(self, pool: RolloutPool) -> GrpoLoop:
        prompts = PromptStream(ROWS, batch=len(ROWS), seed=0, epochs=1)
        return GrpoLoop(self.recipe, self.learners, pool, prompts, MemoryLog(), decode=str)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    root = tmp_path_factory.mktemp("faults")
    return Recipe.load(
        "cpu_rl_stage1",
        [
            f"model.path={taught_model(root / 'model')}",
            f"run.dir={root}",
            f"sandbox.backend={os.environ.get('ASTER_TEST_BACKEND', 'auto')}",
            "sandbox.sessions_per_cell=4",
            "sandbox.max_running=16",
            "rollout.engines=2",
            "rollout.start_timeout_s=600",
            f"rollout.prompts_per_step={len(ROWS)}",
            f"rollout.group_size={GROUP}",
            "rollout.max_num_seqs=16",
            "rollout.kv_cache_bytes=33554432",
            f"algo.mini_batch_prompts={len(ROWS)}",
            "algo.reward=math_verify",
            "optim.lr=1e-3",
            "budget.max_response_tokens=240",
            "budget.max_tool_calls=4",
            "budget.trajectory_timeout_s=150",
            "tool.timeout_s=60",  # a call that a busy machine stops for a while is none that timed out
        ],
    )


@pytest.fixture(scope="module")
def sandboxes(recipe: Recipe) -> Iterator[SandboxFactory]:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with launch.cluster(recipe), launch.sandboxes(recipe) as factory:
        assert factory is not None
        yield factory


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(recipe: Recipe, sandboxes: SandboxFactory) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        rewards = RewardPool(reward="math_verify", timeout_s=15.0)
        stack.callback(rewards.close)
        maker = EngineMaker(recipe, model_path=recipe.model.path, sandboxes=sandboxes)
        assert maker.kept is not None
        engines, learners = await asyncio.gather(
            asyncio.to_thread(maker.start),
            stack.enter_async_context(launch.learners(recipe, total_steps=10)),
        )
        for engine in engines:
            stack.push_async_callback(engine.close)
        node = ray.get_runtime_context().get_node_id()
        yield World(
            recipe, engines, learners, rewards, WeightSync(engines, timeout_s=60), pool_calls(), node, maker.kept
        )


# work and its accounts ------------------------------------------------------------------------------------------------


def submit(
    world: World, pool: EnginePool, rows: Sequence[PromptRow] = ROWS, *, timeout_s: float = 150
) -> list[RolloutWork]:
    recipe = world.recipe
    budget = replace(recipe.train_budget(), trajectory_timeout_s=timeout_s)
    works = [RolloutWork(row, GROUP, budget, recipe.sampling.sampling(), step=1, seed=recipe.run.seed) for row in rows]
    for work in works:
        pool.submit(work)
    return works


async def finished(pool: EnginePool, works: Sequence[RolloutWork]) -> list[TrajectoryGroup]:
    """All groups, once their accounts are found right."""
    stream = pool.groups()
    async with asyncio.timeout(200):
        groups = [await anext(stream) for _ in works]
    asked = {(work.row.row_id, sample) for work in works for sample in range(work.group_size)}
    final = [t for group in groups for t in group.trajectories]
    assert Counter((t.row_id, t.sample) for t in final) == Counter(asked), "each sample exactly once"
    await until(lambda: (pool.in_flight, pool.waiting) == (0, 0))  # the last task has delivered its group, and ends
    attempts = [*final, *(t for group in groups for t in group.lost)]
    causes = Counter(t.cause for t in attempts)
    assert causes == pool.ledger.totals, "every attempt has one cause, and the ledger knows it"
    values = cause_metrics(groups)
    assert values["infra_failed_rate"] == sum(n for cause, n in causes.items() if cause.is_ours) / len(attempts)
    assert sum(values[f"causes/{cause}_count"] for cause in Cause) == len(attempts)
    for t in attempts:
        assert (t.reward is None) == t.cause.is_ours, (t.uid, t.cause, t.error)
        assert_whole(t)
    return groups


def lost(groups: Sequence[TrajectoryGroup]) -> list[Trajectory]:
    return [t for group in groups for t in group.lost]


def scored(groups: Sequence[TrajectoryGroup]) -> list[Trajectory]:
    return [t for group in groups for t in group.scored]


async def calls_run(world: World) -> None:
    """Until some cells are executing."""

    async def running() -> bool:
        return sum(node["running"] for node in await world.cells.node_stats()) >= 2

    await until(running, seconds=30)


# sandboxes ------------------------------------------------------------------------------------------------------------


async def test_nothing_is_lost_when_nothing_fails_and_the_model_is_as_taught(world: World) -> None:
    async with world.pool("calm") as pool:
        groups = await finished(pool, submit(world, pool))
    by_heart = [t for t in scored(groups) if [c.code for c in t.calls] == [FIRST, SECOND]]
    assert len(by_heart) >= 4, "so many strayed from what they were taught"
    assert lost(groups) == []
    assert {t.engine for t in scored(groups)} == {"engine-0", "engine-1"}
    assert {t.reward for t in scored(groups)} <= {0.0, 1.0}  # what each answer earns: assert_whole


async def test_cells_that_are_killed_in_mid_call_cost_a_replay_and_no_trajectory(world: World) -> None:
    async with world.pool("cells") as pool:
        works = submit(world, pool)
        await calls_run(world)
        assert kill_cells(world.node) > 0
        groups = await finished(pool, works)
        assert sum(node["replayed"] for node in await world.cells.node_stats()) > 0
    assert len(scored(groups)) == len(ROWS) * GROUP


async def test_a_sandbox_node_that_is_killed_in_mid_call_comes_back_and_no_trajectory_notices(world: World) -> None:
    async with world.pool("node") as pool:
        works = submit(world, pool)
        await calls_run(world)
        [before] = await world.cells.node_stats()
        os.kill(before["pid"], signal.SIGKILL)
        groups = await finished(pool, works)
        [after] = await world.cells.node_stats()
    assert after["pid"] != before["pid"]
    assert len(scored(groups)) == len(ROWS) * GROUP


# the verifier ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [signal.SIGSTOP, signal.SIGKILL], ids=["hung", "killed"])
async def test_a_verifier_that_is_hung_or_killed_is_asked_again_in_its_successor(world: World, fault: int) -> None:
    await world.rewards.score("\\boxed{1}", "1")  # warm: a worker that still imports has minutes
    failures = world.rewards.failures
    [worker] = verifiers()
    worker.send_signal(fault)
    async with world.pool(f"verifier-{fault}") as pool:
        groups = await finished(pool, submit(world, pool, ROWS[:2]))
    assert world.rewards.failures == failures + 1
    assert [p.pid for p in verifiers()] != [worker.pid]
    assert len(scored(groups)) == 2 * GROUP


async def test_what_the_verifier_cannot_judge_is_masked_and_leaves_the_statistics_of_its_group_alone(
    world: World,
) -> None:
    async with world.pool("unreadable", max_infra_failed_rate=0.9) as pool:
        works = submit(world, pool, [replace(ROWS[0], ground_truth=UNREADABLE), ROWS[1]])
        groups = {group.row.row_id: group for group in await finished(pool, works)}
        loop = world.loop(pool)
    masked, judged = groups[ROWS[0].row_id], groups[ROWS[1].row_id]
    assert {t.cause for t in masked.trajectories} == {Cause.REWARD_FAILED}
    assert masked.lost == (), "its tokens are not at fault: no engine samples them again"
    assert loop.samples_of(masked, 0) == []
    assert len(loop.samples_of(judged, 1)) == GROUP


# engines --------------------------------------------------------------------------------------------------------------


async def test_malformed_answers_of_an_engine_are_its_own_fault_and_run_again_elsewhere(world: World) -> None:
    broken = world.engines[0]._actor
    kinds = ["no version", "a log-prob is missing", "another token's log-prob", "not a number", "no token"]
    await broken.__ray_call__.remote(_answer_badly, kinds)
    async with world.pool("malformed") as pool:
        groups = await finished(pool, submit(world, pool))
    assert await broken.__ray_call__.remote(_answer_well) == 0, "not all of the bad answers were given"
    assert Counter((t.cause, t.engine) for t in lost(groups)) == {(Cause.ENGINE_LOST, "engine-0"): len(kinds)}
    assert all("malformed answer" in t.error for t in lost(groups))
    assert len(scored(groups)) == len(ROWS) * GROUP
    assert not world.engines[0].lost, "one bad answer does not end an engine"


def _answer_badly(engine: Any, kinds: list[str]) -> None:
    """In the actor: damage the next answers of vLLM, one for each kind."""
    import dataclasses

    honest = engine._complete
    left = list(kinds)

    async def complete(*args: Any, **kwargs: Any) -> Any:
        output = await honest(*args, **kwargs)
        if left and not args[2].startswith("canary"):
            first, kind = output.outputs[0], left.pop(0)
            if kind == "no version":
                first.weight_versions = None
            elif kind == "a log-prob is missing":
                first.logprobs = first.logprobs[:-1]
            elif kind == "another token's log-prob":
                first.logprobs = [{token + 1: entry for token, entry in e.items()} for e in first.logprobs]
            elif kind == "not a number":
                first.logprobs = [
                    {token: dataclasses.replace(entry, logprob=float("nan")) for token, entry in e.items()}
                    for e in first.logprobs
                ]
            elif kind == "no token":
                first.token_ids, first.logprobs, first.weight_versions = [], [], []
        return output

    engine._complete, engine._left = complete, left


def _answer_well(engine: Any) -> int:
    del engine._complete
    return len(engine._left)


async def test_trajectories_go_on_under_new_weights_and_each_token_has_the_log_prob_of_its_version(
    world: World, tmp_path: Path
) -> None:
    """The updates are real ones, learnt from trajectories of the weights before; one must fall into a turn."""
    model = world.recipe.model.path
    async with world.pool("update") as pool:
        loop = world.loop(pool)
        await pool.publish(world.learners.weight_source(), 0)
        groups = await finished(pool, submit(world, pool))
        for new in (1, 2, 3):  # now and then the engines have just ended every turn
            await loop.learn(RolloutStep(groups))
            works = submit(world, pool)
            flying = asyncio.ensure_future(_take(pool, works))
            await publish_amid(world.engines[1], pool, world.learners, new)
            groups = await flying
            trajectories = scored(groups)
            assert len(trajectories) == len(ROWS) * GROUP
            if any(len(set(t.versions[turn.start : turn.stop])) == 2 for t in trajectories for turn in t.turns):
                break
            model = await written(world.learners, tmp_path / str(new), source=world.recipe.model.path)
        else:
            pytest.fail("three publications, and none fell into a turn")
    old = Qwen3ForCausalLM.from_pretrained(model, dtype="float32").eval()
    under_old, under_new = hf_logprobs(old, trajectories), await log_probs(world.learners, trajectories)
    drift = 0.0
    for t, before, after in zip(trajectories, under_old, under_new, strict=True):
        expected = np.where(t.versions == new - 1, before, after)
        np.testing.assert_allclose(t.behaviour_logprobs[t.mask], expected[t.mask], atol=1e-4)
        drift = max(drift, float(np.abs(before - after)[t.mask].max()))
        assert set(t.versions[t.mask]) <= {new - 1, new}
        assert_whole(t)
    assert drift > 1e-2, "too small an update to tell the versions apart"


async def publish_amid(engine: RayEngine, pool: EnginePool, learners: LearnerGroup, version: int) -> None:
    """While the engine generates, however slow this machine: its core stands still from a token on until its gate is
    shut. The group is open: there was a publication before."""
    core = psutil.Process(engine.pid).children()
    await generating(engine, then=_stop_core)
    publication = asyncio.ensure_future(pool.publish(learners.weight_source(), version))
    try:
        await until(lambda: publication.done() or engine._actor.__ray_call__.remote(_shut), seconds=50)
    finally:
        for process in core:
            process.resume()
    await publication


async def _take(pool: EnginePool, works: Sequence[RolloutWork]) -> list[TrajectoryGroup]:
    stream = pool.groups()
    async with asyncio.timeout(200):
        return [await anext(stream) for _ in works]


async def written(learners: LearnerGroup, folder: Path, *, source: str) -> str:
    """The learner's weights, as they are now, as a model directory."""
    folder.mkdir()
    await learners.save(str(folder / "checkpoint"))
    await learners.saved()
    launch.merge_checkpoint(str(folder / "checkpoint"), str(folder / "model"), source=source, dtype="float32")
    return str(folder / "model")


async def log_probs(learners: LearnerGroup, trajectories: Sequence[Trajectory]) -> list[np.ndarray]:
    """What the learner's weights, as they are now, say of the response: float32 [T] each."""
    samples = [as_sample(t) for t in trajectories]
    rows = pack(samples, row_tokens=1500, dp_size=1)
    scores = [await learners.log_probs(row) for row in rows]
    whole = unpack([[s.logprobs for s in ranks] for ranks in scores], rows, [len(s) for s in samples])
    return [logprobs[-len(t.ids) :] for logprobs, t in zip(whole, trajectories, strict=True)]


@torch.no_grad()
def hf_logprobs(model: Qwen3ForCausalLM, trajectories: Sequence[Trajectory]) -> list[np.ndarray]:
    return [hf_log_probs(model, as_sample(t))[-len(t.ids) :].numpy() for t in trajectories]


def as_sample(t: Trajectory) -> Sample:
    return Sample(np.concatenate([t.prompt_ids, t.ids]), np.concatenate([np.zeros(len(t.prompt_ids), bool), t.mask]))


async def test_an_engine_core_that_is_killed_in_mid_turn_costs_that_turn_and_no_trajectory(world: World) -> None:
    victim = world.engines[0]
    before = written_by(world, victim)
    async with world.pool("core") as pool:
        works = submit(world, pool)
        await until(lambda: written_by(world, victim) >= before + 2, seconds=30)
        await generating(victim, then=_kill_core)
        groups = await finished(pool, works)
    assert {(t.cause, t.engine) for t in lost(groups)} == {(Cause.ENGINE_LOST, "engine-0")}
    assert victim.lost
    assert len(scored(groups)) == len(ROWS) * GROUP
    again = [t for t in scored(groups) if t.uid in {gone.uid for gone in lost(groups)}]
    assert {t.engine for t in again} == {"engine-1"}
    assert any(t.recalled_turns for t in again), "the turns that the dead one had finished are not sampled again"
    assert not any(t.began_afresh for t in again)


def written_by(world: World, engine: RayEngine) -> int:
    """Finished turns that the engine has put into its journal."""
    return sum(path.read_bytes().count(b'"number"') for path in world.journal.glob(f"*.{engine.name}.jsonl"))


# ruins ----------------------------------------------------------------------------------------------------------------


async def test_without_a_sandbox_service_the_circuit_opens_and_names_it(world: World) -> None:
    await asyncio.to_thread(remove_sandbox)
    limit = 0.2  # a sampled answer without a call is not lost: most may be
    async with world.pool("no-sandbox", max_retries=0, max_infra_failed_rate=limit) as pool:
        works = submit(world, pool, timeout_s=30)
        with pytest.raises(CircuitOpen, match=r"lost by our own failures.*Broken: the sandbox service \(sandbox_lost"):
            await _take(pool, works)
        assert pool.ledger.totals[Cause.SANDBOX_LOST] > len(ROWS) * GROUP * limit


async def test_without_an_engine_the_pool_stops_and_names_all_of_them(world: World) -> None:
    async with world.pool("no-engine", max_infra_failed_rate=1.0) as pool:
        works = submit(world, pool)
        with suppress(ray.exceptions.RayActorError):  # nobody is left to answer
            await generating(world.engines[1], then=psutil.Process.kill)
        with pytest.raises(CircuitOpen, match=r"every engine is dead, \d+ trajectories .*engine-0: .*; engine-1: "):
            await _take(pool, works)
        assert pool.ledger.totals[Cause.ENGINE_LOST] > 0


# reaching in ----------------------------------------------------------------------------------------------------------


async def generating(engine: RayEngine, then: Callable[[psutil.Process], None] = lambda actor: None) -> None:
    """Until a turn of this engine has its first token; `then`, in the actor, has it still under way."""

    def busy(actor: Any) -> bool:
        states = actor._engine.output_processor.request_states.values()
        found = any(not state.is_prefilling for state in states)
        if found:
            then(psutil.Process())
        return found

    await until(lambda: engine._actor.__ray_call__.remote(busy), seconds=60)


def _stop_core(actor: psutil.Process) -> None:
    for process in actor.children():
        process.suspend()


def _kill_core(actor: psutil.Process) -> None:
    for process in actor.children():
        process.kill()


def _shut(engine: Any) -> bool:
    return not engine._gate._open
