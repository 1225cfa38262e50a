"""Two real vLLM engines on CPU, a toy learner that publishes to them, and Hugging Face to say what is right."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import publishing
import pytest
from waiting import until

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # read when Ray is imported

import ray

from actors.metrics import NAMES, RUN_FAMILIES, RUN_GAUGES, RunGauges, pool_gauges
from actors.rollout import EngineMaker, RayEngine, spawn_engines
from actors.weight_sync import RayWeightSource, WeightSync
from aster.errors import ConfigError, EngineLost, GangFailure, WeightSyncError
from aster.types import Budget, Cause, Sampling, Task

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

PROMPT = np.random.default_rng(1).integers(3, publishing.VOCAB, 24).astype(np.int32)
BUCKET = 100_000  # bytes: the toy model makes a handful of buckets


@dataclass
class World:
    """The engines, the learner behind `source`, and `model`: Hugging Face with the learner's weights."""

    maker: EngineMaker
    engines: list[RayEngine]
    learner: Any
    source: RayWeightSource
    model: Any
    version: int = 0

    def train(self) -> int:
        """One "optimizer step" on both copies; returns the new version."""
        self.version += 1
        ray.get(self.learner.perturb.remote(self.version), timeout=30)
        publishing.perturb(self.model, self.version)
        return self.version

    def sync(self) -> WeightSync:
        return WeightSync(self.engines, bucket_bytes=BUCKET, timeout_s=30)

    async def publish(self) -> Any:
        return await self.sync().publish(self.source, self.train())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = publishing.save_model(tmp_path_factory.mktemp("model"))
    ray.cloudpickle.register_pickle_by_value(publishing)
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=f"/tmp/re{os.getpid()}")
    try:
        maker = EngineMaker(publishing.recipe(folder, engines=2), model_path=str(folder), sandboxes=None)
        engines = maker.start()
        learner = ray.remote(publishing.ToyLearner).remote()
        yield World(maker, engines, learner, RayWeightSource([learner], timeout_s=60), publishing.build_model())
        asyncio.run(close(engines))
    finally:
        ray.shutdown()


async def close(engines: list[RayEngine]) -> None:
    await asyncio.gather(*(engine.close() for engine in engines))


async def generate(engine: RayEngine, ids: np.ndarray = PROMPT, **changes: Any) -> Any:
    request: dict[str, Any] = {
        "max_tokens": 40,
        "sampling": Sampling(),
        "stop_token_ids": (),
        "seed": 1,
        "request_id": os.urandom(4).hex(),
    }
    return await engine.call("generate", ids, deadline_s=250, **(request | changes))


async def generating(engine: RayEngine, requests: int = 1, *, stop: bool = False) -> None:
    """Until vLLM has so many requests of this engine, and a token of one of them. `stop`: its core with it."""

    def busy(actor: Any) -> bool:
        states = actor._engine.output_processor.request_states.values()
        found = len(states) >= requests and any(not state.is_prefilling for state in states)
        if found and stop:
            for process in psutil.Process().children():
                process.suspend()
        return found

    await until(lambda: engine._actor.__ray_call__.remote(busy), seconds=60)


async def begun_amid(engine: RayEngine, publication: Coroutine[Any, Any, Any], requests: int = 1) -> asyncio.Task[Any]:
    """`publication` under way, begun while so many requests were generated, however slow this machine: the core stands
    still from a token of theirs until the gate is shut. The group must be open, since a core opens that."""

    def shut(actor: Any) -> bool:
        return not actor._gate._open

    core = psutil.Process(engine.pid).children()
    await generating(engine, requests, stop=True)
    under_way = asyncio.create_task(publication)
    try:
        await until(lambda: under_way.done() or engine._actor.__ray_call__.remote(shut), seconds=25)
        assert not under_way.done(), "it never began"
    finally:
        for process in core:
            process.resume()
    return under_way


def copy_of(model: Any) -> Any:
    copy = publishing.build_model()
    copy.load_state_dict(model.state_dict())
    return copy


async def engine_log_probs(engine: RayEngine, ids: np.ndarray = PROMPT, **options: Any) -> np.ndarray:
    return await engine.call("log_probs", ids, 1, deadline_s=60, **options)


def task(**changes: Any) -> Task:
    budget = Budget(max_prompt_tokens=128, max_response_tokens=32, max_tool_calls=0, trajectory_timeout_s=60)
    messages = ({"role": "user", "content": "What is 2 + 2?"},)
    base = Task("run/train/0/row/0", "row", 0, messages, "single_turn_agent", budget, Sampling(), seed=5)
    return replace(base, **changes)


async def test_two_engines_do_not_draw_the_same_samples(world: World) -> None:
    """First: both have drawn nothing yet, so equal engine seeds would give equal tokens, a group of copies."""
    one, other = [await generate(engine) for engine in world.engines]
    assert not np.array_equal(one.ids, other.ids)


async def test_log_probs_at_start_up_equal_hugging_face(world: World) -> None:
    for temperature in (1.0, 0.7):
        ours = await engine_log_probs(world.engines[0], temperature=temperature)
        theirs = publishing.log_probs(world.model, PROMPT, temperature=temperature)
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def scrape() -> str:
    """What Prometheus would read from every node."""
    pages = []
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        pages.append(httpx.get(url, timeout=60, trust_env=False).text)
    return "\n".join(pages)


class _Pool:
    in_flight, waiting, living = 3, 5, 2


async def test_every_metric_of_ours_is_where_prometheus_looks(world: World) -> None:
    sink = RunGauges("scraped")
    sink.write(1, {**dict.fromkeys(RUN_GAUGES, 0.5), **{f"{begin}gen{end}": 0.5 for begin, end in RUN_FAMILIES}})
    sink.write(1, {"timing_s/began_unix": 1.8e9, "timing_s/agent_loop/slowest/prompt_length": 52.0})
    sink.event(1, "collapse", "few calls")
    prompt = np.tile(PROMPT, 8)  # more than one block of the prefix cache
    async with pool_gauges(_Pool(), run="scraped"):
        for _ in range(2):
            await generate(world.engines[0], prompt)
        deadline = time.monotonic() + 120
        wanted = {f"ray_{name}" for name in NAMES - {"aster_engine_preempted"}}  # nothing is thrown out here
        mine = f'(?:engine="{world.engines[0].name}"|run="scraped")'
        while True:
            page = scrape()
            missing = {n for n in wanted if not re.search(rf"^{n}(_total)?{{", page, re.MULTILINE)}
            samples = dict(re.findall(rf"^ray_(aster_\w+)\{{.*{mine}.*\}} (\S+)$", page, re.MULTILINE))
            generated, hits = (
                float(samples.get(f"aster_engine_{n}_total", 0)) for n in ("generated_tokens", "prefix_hits")
            )
            if not missing and generated >= 80 and hits >= 128:  # the names may be there with what was told before
                break
            assert time.monotonic() < deadline, (missing, [x for x in page.splitlines() if x.startswith("ray_aster")])
            await asyncio.sleep(1.0)
    assert set(re.findall(r'^ray_aster_phase_seconds{.*phase="([^"]*)".*run="scraped"', page, re.MULTILINE)) == {"gen"}
    assert float(samples["aster_pool_in_flight"]) == 3


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9)])
async def test_recorded_log_probs_are_those_of_the_sampling_distribution(
    world: World, temperature: float, top_p: float
) -> None:
    out = await generate(world.engines[0], sampling=Sampling(temperature, top_p), max_tokens=60)
    ids = np.concatenate([PROMPT, out.ids])
    expected = publishing.log_probs(world.model, ids, temperature=temperature, top_p=top_p)[len(PROMPT) - 1 :]
    assert out.ids.dtype == np.int32
    assert out.logprobs.dtype == np.float32
    # where the nucleus ends hangs on the last bit of a probability: a token more or less in it shifts all others
    wrong = np.abs(out.logprobs - expected) > 1e-4
    assert wrong.sum() <= (2 if top_p < 1 else 0), (out.logprobs - expected)[wrong]
    if temperature != 1.0:  # the raw ones would be far off, so the lines above can tell
        raw = publishing.log_probs(world.model, ids)[len(PROMPT) - 1 :]
        assert np.abs(raw - out.logprobs).max() > 0.1


async def test_a_turn_ends_with_its_stop_id_and_keeps_it(world: World) -> None:
    greedy = Sampling(temperature=0.0)
    free = await generate(world.engines[0], sampling=greedy)
    stop = int(free.ids[12])
    stopped = await generate(world.engines[0], sampling=greedy, stop_token_ids=(stop,))
    end = int(np.flatnonzero(free.ids == stop)[0]) + 1
    assert (free.finish_reason, stopped.finish_reason) == ("length", "stop")
    np.testing.assert_array_equal(stopped.ids, free.ids[:end])


async def test_the_model_directory_s_eos_does_not_end_a_turn_that_did_not_ask_for_it(world: World) -> None:
    flat = Sampling(temperature=2.0)
    eos_runs = await asyncio.gather(
        *(generate(world.engines[0], seed=s, max_tokens=240, sampling=flat) for s in range(32))
    )
    assert any(publishing.STOP in run.ids[:-1] for run in eos_runs)
    assert {run.finish_reason for run in eos_runs} == {"length"}


async def test_a_request_longer_than_the_context_is_refused_and_the_engine_lives(world: World) -> None:
    with pytest.raises(ValueError, match="1024"):
        await generate(world.engines[0], np.full(1100, 5, np.int32))
    assert await world.engines[0].probe()


async def test_more_requests_than_seats_all_come_back(world: World) -> None:
    runs = await asyncio.gather(*(generate(world.engines[0], seed=s, max_tokens=16) for s in range(24)))
    assert [len(run.ids) for run in runs] == [16] * 24


async def test_an_episode_runs_in_the_actor(world: World) -> None:
    trajectory = await world.engines[1].run(task())
    assert trajectory.cause in (Cause.ANSWERED, Cause.MAX_TOKENS)
    assert trajectory.engine == "engine-1"
    assert trajectory.mask.all()
    assert (trajectory.versions == 0).all()
    whole = np.concatenate([trajectory.prompt_ids, trajectory.ids])
    expected = publishing.log_probs(world.model, whole)[len(trajectory.prompt_ids) - 1 :]
    np.testing.assert_allclose(trajectory.behaviour_logprobs, expected, atol=1e-4)


async def test_cancelled_episodes_come_home_cancelled(world: World) -> None:
    long = replace(task().budget, max_response_tokens=880)
    running = [asyncio.ensure_future(world.engines[1].run(task(budget=long, seed=s))) for s in range(48)]
    await generating(world.engines[1], 8)
    await world.engines[1].cancel_all()
    trajectories = await asyncio.wait_for(asyncio.gather(*running), 60)
    causes = {t.cause for t in trajectories}  # a random model may have ended some by itself
    assert Cause.CANCELLED in causes
    assert all(cause is Cause.CANCELLED or not cause.is_ours for cause in causes)


async def test_after_each_publication_both_engines_compute_the_new_policy(world: World) -> None:
    sync = world.sync()
    for _ in range(2):
        before = await engine_log_probs(world.engines[0])
        report = await sync.publish(world.source, world.train())
        assert (report.version, report.engines) == (world.version, 2)
        assert report.bytes == 4 * sum(p.numel() for p in world.model.parameters())
        assert report.canary_max_diff is not None
        assert report.canary_max_diff < 1e-4
        new = publishing.log_probs(world.model, PROMPT)
        for engine in world.engines:
            np.testing.assert_allclose(await engine_log_probs(engine), new, atol=1e-4)
            sampled = await generate(engine, max_tokens=8)
            assert (sampled.versions == world.version).all()
        assert np.abs(new - before).max() > 0.1


async def test_an_output_head_that_kept_the_old_embedding_would_be_noticed(world: World) -> None:
    """The bug that `transfer._refresh_packed_head` works around: body new, tied head old."""
    old_head = world.model.lm_head.weight.detach().clone()
    await world.publish()
    stale = publishing.build_model()
    stale.load_state_dict(world.model.state_dict())
    stale.lm_head.weight = type(stale.lm_head.weight)(old_head)
    wrong = publishing.log_probs(stale, PROMPT)
    assert np.abs(wrong - publishing.log_probs(world.model, PROMPT)).max() > 0.1
    assert np.abs(wrong - await engine_log_probs(world.engines[0])).max() > 0.1


async def test_a_request_in_flight_goes_on_under_the_new_weights_and_says_which_token_is_whose(world: World) -> None:
    sync = world.sync()
    await sync.publish(world.source, world.train())
    old = copy_of(world.model)
    flying = asyncio.ensure_future(generate(world.engines[0], max_tokens=800, seed=11))
    publication = await begun_amid(world.engines[0], sync.publish(world.source, world.train()))
    await publication
    out = await flying
    switch = int(np.searchsorted(out.versions, world.version))
    assert 0 < switch < 800, "the publication did not fall into the generation"
    assert set(out.versions.tolist()) == {world.version - 1, world.version}
    ids = np.concatenate([PROMPT, out.ids])
    before = publishing.log_probs(old, ids)[len(PROMPT) - 1 :]
    after = publishing.log_probs(world.model, ids)[len(PROMPT) - 1 :]
    np.testing.assert_allclose(out.logprobs[:switch], before[:switch], atol=1e-4)
    np.testing.assert_allclose(out.logprobs[switch:], after[switch:], atol=1e-4)
    assert np.abs(before[switch:] - after[switch:]).max() > 0.1


async def test_a_damaged_bucket_is_named_and_rolled_back_before_a_token_is_sampled_from_it(world: World) -> None:
    sync = world.sync()
    await sync.publish(world.source, world.train())
    good, old = world.version, copy_of(world.model)
    flying = asyncio.ensure_future(generate(world.engines[0], max_tokens=800, seed=11))
    ray.get(world.learner.damage_bucket.remote(2), timeout=30)
    publication = await begun_amid(world.engines[0], sync.publish(world.source, world.train()))
    tensor = r"model\.layers\.\d\.[a-z_.]+\.weight"
    message = (
        rf"engine-\d: .*bucket 2: {tensor} arrived with another checksum .*; the engines serve version {good} again"
    )
    with pytest.raises(WeightSyncError, match=message) as error:
        await publication
    assert error.value.restored == good
    for engine in world.engines:
        np.testing.assert_allclose(await engine_log_probs(engine), publishing.log_probs(old, PROMPT), atol=1e-4)
        assert ((await generate(engine, max_tokens=8)).versions == good).all()
    out = await flying
    assert (out.versions == good).all()
    ids = np.concatenate([PROMPT, out.ids])
    expected, wrong = (publishing.log_probs(model, ids)[len(PROMPT) - 1 :] for model in (old, world.model))
    np.testing.assert_allclose(out.logprobs, expected, atol=1e-4)
    assert np.abs(wrong - expected).max() > 0.1
    await sync.publish(world.source, world.version)
    for engine in world.engines:
        np.testing.assert_allclose(await engine_log_probs(engine), publishing.log_probs(world.model, PROMPT), atol=1e-4)


async def test_engines_that_have_nothing_to_go_back_to_stay_shut_until_a_good_publication(world: World) -> None:
    sync = world.sync()
    ray.get(world.learner.damage_bucket.remote(2), timeout=30)
    with pytest.raises(
        WeightSyncError, match=r"bucket 2: .*published nothing before, so the engines stay shut"
    ) as error:
        await sync.publish(world.source, world.train())
    assert error.value.restored is None
    waiting = [asyncio.ensure_future(generate(engine, max_tokens=4)) for engine in world.engines]
    done, _ = await asyncio.wait(waiting, timeout=1)
    assert not done, "an engine served weights that had not verified"
    await sync.publish(world.source, world.version)
    for answer in await asyncio.gather(*waiting):
        assert (answer.versions == world.version).all()
    np.testing.assert_allclose(
        await engine_log_probs(world.engines[1]), publishing.log_probs(world.model, PROMPT), atol=1e-4
    )


@pytest.mark.parametrize(
    ("forgotten", "message"),
    [
        ("input_layernorm", r"no tensor that the learner sent fills model\.layers\.1\.input_layernorm\.weight"),
        ("self_attn.k_proj", r"after the load model\.layers\.1\.self_attn\.qkv_proj\.weight holds NaN"),  # one of three
    ],
)
async def test_a_tensor_that_the_learner_forgot_is_named(world: World, forgotten: str, message: str) -> None:
    ray.get(world.learner.forget.remote(f"model.layers.1.{forgotten}.weight"), timeout=30)
    forgetful = RayWeightSource(world.source.ranks, timeout_s=60)
    with pytest.raises(WeightSyncError, match=message):
        await world.sync().publish(forgetful, world.train())
    ray.get(world.learner.forget.remote(""), timeout=30)
    await world.publish()


async def test_what_ran_under_weights_that_the_canary_refused_is_lost(world: World) -> None:
    sync = world.sync()
    await sync.publish(world.source, world.train())
    good, old = world.version, publishing.log_probs(world.model, PROMPT)
    flying = asyncio.ensure_future(generate(world.engines[0], max_tokens=900))
    ray.get(world.learner.disagree.remote(0.01), timeout=30)
    publication = await begun_amid(world.engines[0], sync.publish(world.source, world.train()))
    with pytest.raises(WeightSyncError, match=r"does not verify on engine-0: canary token \d+ of 15") as error:
        await publication
    assert error.value.restored == good
    with pytest.raises(EngineLost, match="did not verify"):
        await flying
    np.testing.assert_allclose(await engine_log_probs(world.engines[0]), old, atol=1e-4)
    ray.get(world.learner.disagree.remote(0.0), timeout=30)
    await sync.publish(world.source, world.version)
    assert ((await generate(world.engines[0], max_tokens=4)).versions == world.version).all()


async def test_a_full_engine_still_answers_the_canary(world: World) -> None:
    sync = world.sync()
    await sync.publish(world.source, world.train())
    flying = [asyncio.ensure_future(generate(world.engines[0], max_tokens=600, seed=s)) for s in range(12)]
    publication = await begun_amid(world.engines[0], sync.publish(world.source, world.train()), 8)
    await publication
    assert not all(run.done() for run in flying), "the canary waited for all of them"
    assert {len((await run).ids) for run in flying} == {600}


async def test_a_learner_that_dies_while_sending_fails_the_gang_and_its_successor_can_publish(world: World) -> None:
    sync = world.sync()
    doomed = ray.remote(publishing.ToyLearner).remote()
    await sync.publish(RayWeightSource([doomed], timeout_s=60), 0)
    ray.get(doomed.die_at_bucket.remote(1), timeout=30)
    began = time.monotonic()
    with pytest.raises(GangFailure, match="learner rank 0"):
        await sync.publish(RayWeightSource([doomed], timeout_s=60), 0)
    assert time.monotonic() - began < 20, "someone sat out a timeout"
    await sync.publish(world.source, world.train())
    np.testing.assert_allclose(
        await engine_log_probs(world.engines[0]), publishing.log_probs(world.model, PROMPT), atol=1e-4
    )


async def test_an_engine_killed_between_two_buckets_loses_its_requests_and_the_others_get_the_weights(
    world: World, tmp_path: Path
) -> None:
    """Last: it kills engine 0's core process."""
    survivor, victim = world.engines[1], world.engines[0]
    sync = world.sync()
    await sync.publish(world.source, world.train())  # a group with both is open
    crowd = asyncio.gather(*(generate(victim, max_tokens=900) for _ in range(32)), return_exceptions=True)
    long = task(budget=replace(task().budget, max_response_tokens=880))
    episodes = asyncio.gather(*(victim.run(replace(long, sample=i)) for i in range(8)))
    ray.get(world.learner.stall_at_bucket.remote(2, tmp_path), timeout=30)
    publication = await begun_amid(victim, sync.publish(world.source, world.train()), 24)
    await until((tmp_path / publishing.STALLED).exists, seconds=25)
    for process in psutil.Process(victim.pid).children():
        process.kill()
    (tmp_path / publishing.GO_ON).touch()
    began = time.monotonic()
    for outcome in await crowd:
        assert isinstance(outcome, EngineLost), outcome
        assert "engine-0" in str(outcome)
    causes = {trajectory.cause for trajectory in await episodes}  # a random model may have ended some by then
    assert Cause.ENGINE_LOST in causes
    assert all(cause is Cause.ENGINE_LOST or not cause.is_ours for cause in causes)
    assert time.monotonic() - began < 20
    assert (await victim.run(task())).cause is Cause.ENGINE_LOST
    report = await publication
    assert time.monotonic() - began < 20, "someone sat out a timeout"
    assert report.engines == 1
    np.testing.assert_allclose(await engine_log_probs(survivor), publishing.log_probs(world.model, PROMPT), atol=1e-4)


async def test_a_dead_engine_is_replaced_and_brought_to_the_current_version_while_the_others_go_on(
    world: World,
) -> None:
    """After the one above, which killed engine 0's core: its actor still lives, and must go."""
    dead, other = world.engines
    sync = WeightSync([other], bucket_bytes=BUCKET, timeout_s=30)
    await sync.publish(world.source, world.train())
    flying = asyncio.ensure_future(generate(other, max_tokens=900))
    fresh = await world.maker.replace(dead)
    assert (fresh.name, fresh.pid != dead.pid, dead.lost != "") == ("engine-0.1", True, True)
    assert fresh.kv_tokens >= world.maker._recipe.max_model_len
    assert await sync.admit(fresh)
    assert (await flying).finish_reason == "length"
    new = publishing.log_probs(world.model, PROMPT)
    np.testing.assert_allclose(await engine_log_probs(fresh), new, atol=1e-4)
    assert ((await generate(fresh, max_tokens=8)).versions == world.version).all()
    report = await sync.publish(world.source, world.train())
    assert report.engines == 2
    for engine in (fresh, other):
        np.testing.assert_allclose(await engine_log_probs(engine), publishing.log_probs(world.model, PROMPT), atol=1e-4)
    world.engines[0] = fresh


async def test_a_dead_actor_is_a_lost_trajectory_and_no_engine_left_is_said_so(world: World) -> None:
    running = asyncio.gather(*(engine.run(task()) for engine in world.engines))
    for engine in world.engines:
        os.kill(engine.pid, 9)
    for lost in await running:
        assert lost.cause is Cause.ENGINE_LOST
        assert (lost.uid, len(lost.ids), lost.reward) == ("run/train/0/row/0", 0, None)
    with pytest.raises(EngineLost, match=r"no engine is left .* engine-1 is dead"):
        await world.publish()


def test_engines_that_the_cluster_cannot_hold_are_refused_with_the_arithmetic(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"engines=50 x rollout.tensor_parallel=1 need 50 CPU, the cluster has 4"):
        spawn_engines(publishing.recipe(tmp_path, engines=50), model_path=str(tmp_path), sandboxes=None)
    with pytest.raises(ConfigError, match="kv_cache_bytes"):
        spawn_engines(publishing.recipe(tmp_path, kv_cache_bytes=None), model_path=str(tmp_path), sandboxes=None)
    with pytest.raises(ConfigError, match="weight_backend=nccl needs GPUs"):
        spawn_engines(publishing.recipe(tmp_path, weight_backend="nccl"), model_path=str(tmp_path), sandboxes=None)
