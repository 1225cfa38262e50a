"""Two ranks as real Ray actors against one rank in this process; death of a rank; a cluster that is too small."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
import torch.distributed.checkpoint as dcp
from learners import accumulate, learner_on, one_row, recipe, some_samples, train, weights, write_model
from ray.exceptions import ActorDiedError, RayTaskError
from safetensors.torch import load_file
from waiting import until

from actors.group import RayLearnerGroup, _blame
from actors.placement import learner_bundles, reserve
from aster.algo.packing import denominators, pack
from aster.errors import AsterError, ConfigError, DataError, GangFailure
from aster.types import OptimStats, StepStats

# what a GPU run uses and one rank on CPU does not: several chunks of log-probs, recomputed layers
TWO = {
    "learner": {"world_size": 2, "step_timeout_s": 60, "logprob_chunk_tokens": 16},
    "model": {"gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    os.environ["RAY_AUTH_MODE"] = "disabled"
    with tempfile.TemporaryDirectory(prefix="ag", dir="/tmp", ignore_cleanup_errors=True) as directory:
        ray.init(num_cpus=2, include_dashboard=False, _temp_dir=directory, log_to_driver=False, logging_level="ERROR")
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    # a vocabulary and a width that two ranks cannot halve evenly
    return write_model(tmp_path_factory.mktemp("group") / "model", intermediate_size=63)


async def _train(group: RayLearnerGroup, samples, *, row_tokens=64) -> tuple[StepStats, OptimStats]:
    tokens, groups = denominators(samples)
    stats = StepStats()
    for ranks in pack(samples, row_tokens=row_tokens, dp_size=group.dp_size):
        stats += await group.forward_backward(ranks, num_loss_tokens=tokens, num_groups=groups)
    return stats, await group.optim_step()


async def _train_for(group: RayLearnerGroup, samples, *, seconds: float) -> None:
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        await _train(group, samples)


def _first_moments(checkpoint: Path, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """exp_avg after one step is (1 - beta1) times the clipped gradient: the gradient, readable from outside."""
    into = {f"optim.{name}.exp_avg": torch.empty_like(tensor) for name, tensor in like.items()}
    dcp.load(into, checkpoint_id=str(checkpoint), no_dist=True)
    return into


@pytest.mark.e2e
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
async def test_two_ranks_train_like_one_and_carry_on_from_its_checkpoint(cluster, model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("actors.group._AFTERMATH_S", 30.0)  # Ray may take its time to say that an actor died
    batches = [some_samples(11, seed=i) for i in range(3)]  # an odd count: one rank gets a row of padding
    one, two = recipe(), recipe(**TWO)
    with learner_on(model_dir, one) as alone:
        row = one_row(batches[0])
        expected_log_probs = alone.log_probs(row).logprobs
        stats, optim = train(alone, batches[0])
        alone.save(str(tmp_path / "one_after_1"))
        masters = weights(alone)
        tail = [train(alone, b) for b in batches[1:]]
        final = weights(alone)

    group = await RayLearnerGroup.spawn(two, model_path=str(model_dir), total_steps=100)
    try:
        for ours in await group.log_probs([row, row]):
            np.testing.assert_allclose(ours.logprobs, expected_log_probs, atol=5e-6)
        stats_two, optim_two = await _train(group, batches[0])
        assert stats_two.loss == pytest.approx(stats.loss, rel=1e-5)
        assert stats_two.tokens == stats.tokens
        assert stats_two.entropy_sum == pytest.approx(stats.entropy_sum, rel=1e-5)
        assert optim_two.grad_norm == pytest.approx(optim.grad_norm, rel=1e-5)
        await group.save(str(tmp_path / "two_after_1"))
        await group.saved()
        ours = _first_moments(tmp_path / "two_after_1", masters)
        theirs = _first_moments(tmp_path / "one_after_1", masters)
        for name in theirs:
            gap = (ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()
            assert gap < 1e-5, name

        # resume at world size 2 what world size 1 saved, and end where it ended
        with pytest.raises(DataError, match="not a learner checkpoint"):
            await group.load(str(tmp_path / "nowhere"))
        assert await group.load(str(tmp_path / "one_after_1")) == 1
        for batch, (stats, optim) in zip(batches[1:], tail, strict=True):
            stats_two, optim_two = await _train(group, batch)
            assert stats_two.loss == pytest.approx(stats.loss, rel=1e-4)
            assert optim_two.grad_norm == pytest.approx(optim.grad_norm, rel=1e-3)
        await group.save_hf(str(tmp_path / "hf"))
        exported = load_file(tmp_path / "hf" / "model.safetensors")
        assert exported.keys() == final.keys()
        for name, tensor in final.items():
            torch.testing.assert_close(exported[name], tensor, rtol=0, atol=2e-3)  # lr 1e-2, two Adam steps

        # and the other way round
        await group.save(str(tmp_path / "two_after_3"))
        await group.saved()
        with learner_on(model_dir, one) as alone:
            assert alone.load(str(tmp_path / "two_after_3")) == 3
            assert all(torch.equal(t, exported[n]) for n, t in weights(alone).items())

        with pytest.raises(ValueError, match="1 micro-batches for 2 ranks"):
            await group.log_probs([row])
        metadata = await group.weight_source().describe()
        assert [m.name for m in metadata] == list(final)

        # a rank dies in the middle of a step
        async def die() -> None:
            await asyncio.sleep(0.2)
            os.kill(group.pids[1], signal.SIGKILL)

        killer = asyncio.create_task(die())
        began = time.monotonic()
        with pytest.raises(GangFailure, match=r"(?s)learner rank 1 died: in .*worker process has died") as caught:
            await _train_for(group, batches[0], seconds=50)
        await killer
        assert caught.value.rank == 1
        assert time.monotonic() - began < 50, "someone sat out the 60 s of a step"
        with pytest.raises(GangFailure, match="rank 1"):
            await group.optim_step()
        for pid in group.pids:
            await _gone(pid)
    finally:
        await group.close()


@pytest.mark.e2e
async def test_the_recipe_picks_deepspeed_and_a_checkpoint_is_written_between_steps(cluster, model_dir, tmp_path):
    batches = [some_samples(11, seed=i) for i in range(3)]
    with learner_on(model_dir, recipe("sft")) as alone:
        expected = [train(alone, batch)[0].loss for batch in batches]
    zero = recipe(
        "sft",
        learner={**TWO["learner"], "backend": "deepspeed_zero3", "step_timeout_s": 120},
        rollout={"start_timeout_s": 300},  # importing DeepSpeed takes 20 s alone, minutes on a busy machine
    )
    group = await RayLearnerGroup.spawn(zero, model_path=str(model_dir), total_steps=100)
    try:
        losses = [(await _train(group, batches[0]))[0].loss]
        await group.save(str(tmp_path / "ck"))
        saved = asyncio.create_task(group.saved())
        losses += [(await _train(group, batch))[0].loss for batch in batches[1:]]
        await saved
        assert losses == pytest.approx(expected, rel=1e-4)
        await group.save(str(tmp_path / "no" / "\0" / "such"))
        with pytest.raises(AsterError, match=r"such was not written: rank 0: ValueError"):
            await group.saved()
        assert await group.load(str(tmp_path / "ck")) == 1, "the gang lives on"
    finally:
        await group.close()


@pytest.mark.e2e
async def test_two_ranks_that_share_each_row_have_the_losses_and_norms_of_one(cluster, model_dir):
    batches = [some_samples(7, seed=i) for i in range(3)]
    with learner_on(model_dir, recipe()) as alone:
        row = one_row(batches[0])
        scores = alone.log_probs(row)
        expected = [train(alone, batch) for batch in batches]
    shared = recipe(learner={**TWO["learner"], "context_parallel": 2})
    group = await RayLearnerGroup.spawn(shared, model_path=str(model_dir), total_steps=100)
    try:
        assert group.dp_size == 1
        [ours] = await group.log_probs([row])
        np.testing.assert_allclose(ours.logprobs, scores.logprobs, atol=5e-6)
        np.testing.assert_allclose(ours.entropies, scores.entropies, atol=5e-6)
        for batch, (stats, optim) in zip(batches, expected, strict=True):
            stats_two, optim_two = await _train(group, batch)
            assert stats_two.loss == pytest.approx(stats.loss, rel=1e-4, abs=1e-6)
            assert (stats_two.tokens, stats_two.entropy_sum) == (
                stats.tokens,
                pytest.approx(stats.entropy_sum, rel=1e-4),
            )
            assert optim_two.grad_norm == pytest.approx(optim.grad_norm, rel=1e-3)
    finally:
        await group.close()


@pytest.mark.e2e
async def test_an_error_of_one_rank_ends_the_gang_with_that_ranks_traceback(cluster, model_dir, monkeypatch):
    monkeypatch.setattr("actors.group._AFTERMATH_S", 1.0)  # rank 0 waits in a collective and has nothing to say
    group = await RayLearnerGroup.spawn(recipe(**TWO), model_path=str(model_dir), total_steps=100)
    try:
        good, bad = one_row(some_samples(2)), one_row(some_samples(2))
        bad.labels[bad.loss_mask] = 10_000  # beyond the vocabulary
        with pytest.raises(GangFailure) as caught:
            await group.forward_backward([good, bad], num_loss_tokens=10, num_groups=1)
        assert caught.value.rank == 1
        assert "forward_backward" in str(caught.value)
        assert 'learner.py", line' in str(caught.value), "the traceback of the rank itself"
        assert "out of bounds" in str(caught.value)
        for pid in group.pids:
            await _gone(pid)
    finally:
        await group.close()


@pytest.mark.e2e
async def test_a_model_directory_that_cannot_be_used_is_a_config_error_and_leaves_nothing(cluster, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')

    def all_free() -> bool:
        return ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]

    await until(all_free, seconds=60)  # the test before gives back its own in a while
    with pytest.raises(ConfigError, match=r"holds no model\.safetensors"):
        await RayLearnerGroup.spawn(recipe(), model_path=str(tmp_path), total_steps=1)
    await until(all_free, seconds=60)


@pytest.mark.e2e
async def test_a_gang_that_does_not_fit_says_what_is_missing(cluster, monkeypatch):
    monkeypatch.setattr("actors.placement._HOPELESS_S", 0.5)
    nine = recipe(learner={"world_size": 9})
    with pytest.raises(ConfigError, match=r"9 bundles of .*'CPU': 1.*CPU: 9 asked, .* of 2 in the cluster.*world_size"):
        await reserve(learner_bundles(nine), name="learner gang", timeout_s=60)


def test_gpus_are_asked_for_when_the_recipe_says_cuda():
    assert learner_bundles(recipe(cluster={"device": "cuda"}, learner={"world_size": 2})) == [
        {"CPU": 1.0, "GPU": 1.0},
        {"CPU": 1.0, "GPU": 1.0},
    ]


def test_blame_goes_to_the_dead_rank_then_to_an_error_of_its_own_then_to_lost_connections():
    dead = ActorDiedError()
    own = RayTaskError("forward_backward", "Traceback ... IndexError", IndexError("target 10000 is out of bounds"))
    peer = RayTaskError("forward_backward", "Traceback ...", RuntimeError("[gloo] Connection closed by peer"))
    assert _blame({0: peer, 1: dead}, [], method="save", timeout_s=1).rank == 1
    assert _blame({0: peer, 1: own}, [], method="save", timeout_s=1).rank == 1
    assert _blame({0: own, 1: dead, 2: peer}, [], method="save", timeout_s=1).rank == 1
    silent = _blame({}, [2, 3], method="save", timeout_s=7)
    assert (silent.rank, "within 7 s" in silent.cause) == (2, True)


async def test_silence_past_the_deadline_is_a_gang_failure():
    class Silent:
        def __getattr__(self, name):
            return self

        def remote(self, *args, **kwargs):
            return asyncio.get_running_loop().create_future()

    group = RayLearnerGroup([Silent()], placement=None, timeout_s=0.05)
    group.kill = lambda: None  # no actors to end
    with pytest.raises(GangFailure, match=r"rank 0 died: optim_step did not return within 0\.05 s"):
        await group.optim_step()
    with pytest.raises(GangFailure):
        await group.save("x")


async def test_ranks_that_share_a_row_are_given_it_and_counted_once():
    class Rank:
        def __init__(self, number):
            self.number = number

        def __getattr__(self, name):
            return self

        def remote(self, *args, **kwargs):
            future = asyncio.get_running_loop().create_future()
            asked.append((self.number, args))
            stats = StepStats(loss=1.0, tokens=10, seconds=self.number)
            future.set_result(stats if kwargs.get("num_groups") else self.number)
            return future

    asked: list[tuple[int, tuple]] = []
    group = RayLearnerGroup([Rank(i) for i in range(4)], placement=None, timeout_s=5, context_parallel=2)
    assert group.dp_size == 2
    rows = pack(some_samples(4), row_tokens=100, dp_size=2)[0]
    assert await group.log_probs(rows) == [0, 2]
    assert asked == [(0, (rows[0],)), (1, (rows[0],)), (2, (rows[1],)), (3, (rows[1],))]
    stats = await group.forward_backward(rows, num_loss_tokens=20, num_groups=1)
    assert (stats.loss, stats.tokens, stats.seconds) == (2.0, 20, 3)
    await group.save("x")
    assert [number for number, _ in asked[-4:]] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="4 micro-batches for 2 ranks"):
        await group.log_probs([*rows, *rows])


async def test_an_error_that_all_ranks_share_passes_through_and_the_gang_lives():
    class Refusing:
        def __getattr__(self, name):
            return self

        def remote(self, *args, **kwargs):
            future = asyncio.get_running_loop().create_future()
            future.set_exception(RayTaskError("load", "Traceback ...", DataError("no such checkpoint")))
            return future

    group = RayLearnerGroup([Refusing(), Refusing()], placement=None, timeout_s=5)
    with pytest.raises(AsterError, match="no such checkpoint") as caught:
        await group.load("x")
    assert type(caught.value) is DataError
    assert group._failure is None


async def _gone(pid: int) -> None:
    await until(lambda: not Path(f"/proc/{pid}").exists(), seconds=60)


def test_the_helper_for_one_rank_agrees_with_itself(model_dir):
    """The two-rank comparison leans on `accumulate`: rows of two ranks through one learner give the same loss."""
    samples = some_samples(5)
    with learner_on(model_dir, recipe()) as learner:
        first = accumulate(learner, samples, row_tokens=64, dp_size=1).loss
        assert accumulate(learner, samples, row_tokens=64, dp_size=2).loss == pytest.approx(first, rel=1e-5)
