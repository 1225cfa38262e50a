"""The order of a publication: who is asked what, and what happens when somebody fails. The handles take notes."""

from __future__ import annotations

import asyncio
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayActorError, RayTaskError
from tensors import metas

from actors import group, weight_sync
from actors.weight_sync import RayWeightSource, WeightSync
from aster.errors import EngineLost, GangFailure, WeightSyncError
from aster.types import MicroBatch, TokenScores


class NotingEngine:
    """A `RayEngine` that answers at once and writes down what it was asked."""

    weight_backend, exact, vocab_size, max_model_len = "gloo", True, 100, 64

    def __init__(self, events: list[str], name: str, *, workers: int = 1, canary: float = -1.0) -> None:
        self.events, self.name, self.workers, self.canary = events, name, workers, canary
        self.lost = ""
        self.infos: list[dict[str, Any]] = []
        self.versions: list[int] = []
        self.fail: dict[str, Exception] = {}
        self.delay: dict[str, float] = {}

    async def call(self, method: str, *args: Any, deadline_s: float, timeout_s: float) -> Any:
        assert deadline_s > timeout_s > 0
        await asyncio.sleep(self.delay.get(method, 0.0))
        self.events.append(f"{self.name} {method}")
        if method in self.fail:
            raise self.fail.pop(method)
        if method == "weight_open":
            self.infos.append(args[0])
        if method == "weight_commit":
            self.versions.append(args[0])
        return np.full(len(args[0]) - 1, self.canary, np.float32) if method == "weight_verify" else None

    async def probe(self) -> bool:
        return not self.lost


class NotingRank:
    """A learner actor handle: `rank.method.remote(...)` is awaitable."""

    def __init__(self, events: list[str], rank: int) -> None:
        self.events, self.rank = events, rank
        self.rows: list[MicroBatch] = []
        self.logprob = -1.0

    def __getattr__(self, method: str) -> Any:
        async def remote(*args: Any, **kwargs: Any) -> Any:
            self.events.append(f"rank{self.rank} {method}")
            if method == "log_probs":
                self.rows.append(args[0])
                logprobs = np.where(args[0].loss_mask, self.logprob, 0.0).astype(np.float32)
                return TokenScores(logprobs, np.zeros_like(logprobs))
            return {"weight_metadata": metas(), "weight_address": ("10.0.0.1", 7), "weight_send": ["ab"]}.get(method)

        return SimpleNamespace(remote=remote)


@pytest.fixture
def events() -> list[str]:
    return []


def source_of(events: list[str], ranks: int = 2) -> RayWeightSource:
    return RayWeightSource([NotingRank(events, r) for r in range(ranks)])


def engines_of(events: list[str], *workers: int) -> list[Any]:
    return [NotingEngine(events, f"e{i}", workers=w) for i, w in enumerate(workers)]


async def test_a_publication_goes_open_begin_transfer_commit_verify_accept(events: list[str]) -> None:
    report = await WeightSync(engines_of(events, 1), timeout_s=5).publish(source_of(events), 3)
    engine = [event.removeprefix("e0 weight_") for event in events if event.startswith("e0")]
    rank = [event.removeprefix("rank0 ") for event in events if event.startswith("rank0")]
    assert engine == ["open", "begin", "receive", "commit", "verify", "accept"]
    assert rank[:3] == ["weight_metadata", "weight_address", "weight_open"]
    assert rank[3:] == ["weight_send", "log_probs", "weight_keep"]
    assert events.index("e0 weight_commit") < events.index("e0 weight_verify")
    assert {e for e in events if e.startswith("rank1")} == {"rank1 weight_open", "rank1 weight_send", "rank1 log_probs"}
    assert (report.version, report.engines, report.canary_max_diff) == (3, 1, 0.0)
    assert report.bytes == 4 * (400 + 64 + 192 + 7 + 3)
    assert {"begin", "receive", "commit", "send", "canary", "verify", "accept"} <= set(report.phases)


async def test_no_engine_runs_again_before_all_of_them_have_loaded(events: list[str]) -> None:
    engines = engines_of(events, 1, 1)
    engines[1].delay["weight_commit"] = 0.05
    await WeightSync(engines, timeout_s=5).publish(source_of(events), 1)
    assert max(events.index(f"e{i} weight_commit") for i in (0, 1)) < min(
        events.index(f"e{i} weight_verify") for i in (0, 1)
    )


async def test_a_failure_sends_the_kept_copy_under_its_old_version_and_canary(events: list[str]) -> None:
    """The learner's own log-probs have moved on to -3 by then; the engines must agree with those of version 1: -1."""
    engines, source = engines_of(events, 1, 1), source_of(events)
    sync = WeightSync(engines, timeout_s=5)
    await sync.publish(source, 1)
    for rank in source.ranks:
        rank.logprob = -3.0
    engines[1].fail["weight_receive"] = WeightSyncError("bucket 2 (a .. b): checksum")
    before = len(events)
    with pytest.raises(
        WeightSyncError, match=r"bucket 2 \(a .. b\): checksum; the engines serve version 1 again"
    ) as error:
        await sync.publish(source, 2)
    assert error.value.restored == 1
    after = events[before:]
    assert [e for e in after if e.startswith("rank0")] == [
        *("rank0 weight_send", "rank0 log_probs", "rank0 weight_close"),
        *("rank0 weight_address", "rank0 weight_open", "rank0 weight_resend"),
    ]
    for engine in engines:
        assert engine.versions[-1] == 1
        again = [e.split()[1] for e in after[after.index("rank0 weight_resend") :] if e.startswith(engine.name)]
        assert again[-3:] == ["weight_commit", "weight_verify", "weight_accept"]
    for rank in source.ranks:
        rank.logprob = -1.0
    assert (await sync.publish(source, 2)).version == 2


async def test_an_engine_that_accepts_late_is_rolled_back_to_the_version_that_the_kept_copy_has(
    events: list[str],
) -> None:
    """All of them verified version 2 and it was kept: it is what goes out again, under its own number and canary."""
    engines, source = engines_of(events, 1, 1), source_of(events)
    sync = WeightSync(engines, timeout_s=5)
    await sync.publish(source, 1)
    for member in (*source.ranks, *engines):
        vars(member)["logprob" if isinstance(member, NotingRank) else "canary"] = -3.0
    engines[1].fail["weight_accept"] = EngineLost("did not answer")
    before = len(events)
    with pytest.raises(WeightSyncError, match="did not answer; the engines serve version 2 again") as error:
        await sync.publish(source, 2)
    assert error.value.restored == 2
    after = events[before:]
    assert after.index("rank0 weight_keep") < after.index("e0 weight_accept")
    assert "rank0 weight_resend" in after
    assert [engine.versions for engine in engines] == [[1, 2, 2]] * 2


async def test_a_roll_back_that_fails_too_leaves_the_engines_shut_and_says_both(events: list[str]) -> None:
    engines, source = engines_of(events, 1), source_of(events)
    sync = WeightSync(engines, timeout_s=5)
    await sync.publish(source, 1)
    engines[0].canary = -1.5
    before = len(events)
    message = r"version 2 does not verify on e0.*; the roll-back to version 1 failed too.*: version 1 does not verify"
    with pytest.raises(WeightSyncError, match=message) as error:
        await sync.publish(source, 2)
    assert error.value.restored is None
    assert "e0 weight_accept" not in events[before:]


@pytest.mark.parametrize(
    ("rollback", "backend", "other_gang", "message"),
    [
        (True, "gloo", True, "this learner published nothing before, so the engines stay shut"),
        (False, "gloo", False, "no copy of the last version is held, so the engines stay shut"),
        (True, "vllm_nccl", False, "no copy of the last version is held, so the engines stay shut"),
    ],
)
async def test_without_a_copy_nothing_is_rolled_back(
    events: list[str], rollback: bool, backend: str, other_gang: bool, message: str
) -> None:
    engines, source = engines_of(events, 1), source_of(events)
    engines[0].weight_backend = backend
    sync = WeightSync(engines, backend=backend, rollback=rollback, timeout_s=5)
    await sync.publish(source, 1)
    engines[0].fail["weight_receive"] = WeightSyncError("bucket 2")
    with pytest.raises(WeightSyncError, match=f"bucket 2; {message}") as error:
        await sync.publish(source_of(events) if other_gang else source, 2)
    assert error.value.restored is None
    assert "rank0 weight_resend" not in events
    assert ("rank0 weight_keep" in events) == (rollback and backend == "gloo")


async def test_what_ran_behind_the_gate_is_lost_when_a_canary_does_not_come_back(events: list[str]) -> None:
    engines = engines_of(events, 1, 1)
    engines[0].fail["weight_verify"] = WeightSyncError("no answer")
    with pytest.raises(WeightSyncError, match="no answer"):
        await WeightSync(engines, timeout_s=5).publish(source_of(events), 1)
    assert {"e0 weight_reject", "e1 weight_reject"} <= set(events)


def test_the_error_of_a_publication_crosses_processes_with_what_was_restored() -> None:
    error = pickle.loads(pickle.dumps(WeightSyncError("bucket 3", 7)))
    assert (str(error), error.restored) == ("bucket 3", 7)


async def test_each_engine_gets_a_rank_of_its_own_and_the_group_is_opened_once(events: list[str]) -> None:
    engines = engines_of(events, 2, 1, 4)
    sync, source = WeightSync(engines, timeout_s=5), source_of(events)
    await sync.publish(source, 1)
    await sync.publish(source, 2)
    assert [engine.infos for engine in engines] == [
        [{**engines[0].infos[0], "rank_offset": offset, "world_size": 8}] for offset in (1, 3, 4)
    ]
    assert events.count("rank0 weight_open") == 1


async def test_the_stock_engine_is_told_the_same_ranks_in_vllm_s_words(events: list[str]) -> None:
    engines = engines_of(events, 2, 2)
    for engine in engines:
        engine.weight_backend = "vllm_nccl"
    await WeightSync(engines, backend="vllm_nccl", timeout_s=5).publish(source_of(events), 1)
    shared = {"master_address": "10.0.0.1", "master_port": 7, "world_size": 5, "packed": True}
    assert [e.infos[0] for e in engines] == [{**shared, "rank_offset": 1}, {**shared, "rank_offset": 3}]


async def test_a_canary_that_disagrees_rejects_on_every_engine_and_accepts_on_none(events: list[str]) -> None:
    engines = engines_of(events, 1, 1)
    engines[1].canary = -1.5
    with pytest.raises(WeightSyncError, match=r"version 9 does not verify on e1: canary token 1 of 15 .* -1\.5 there"):
        await WeightSync(engines, timeout_s=5).publish(source_of(events), 9)
    assert events.count("e0 weight_reject") == events.count("e1 weight_reject") == 1
    assert not [event for event in events if "accept" in event]


async def test_a_canary_that_is_not_a_number_is_refused(events: list[str]) -> None:
    engines = engines_of(events, 1)
    engines[0].canary = float("nan")
    with pytest.raises(WeightSyncError, match="log-prob nan there"):
        await WeightSync(engines, timeout_s=5).publish(source_of(events), 9)


async def test_in_bf16_the_mean_decides_and_in_fp32_the_largest(events: list[str]) -> None:
    engines = engines_of(events, 1)
    engines[0].canary = -1.15
    engines[0].exact = False
    report = await WeightSync(engines, timeout_s=5).publish(source_of(events), 1)
    assert report.canary_max_diff == pytest.approx(0.15, abs=1e-6)
    engines[0].exact = True
    with pytest.raises(WeightSyncError, match=r"allowed 0\.0001 at most"):
        await WeightSync(engines, timeout_s=5).publish(source_of(events), 2)


async def test_an_engine_that_dies_is_left_out_and_the_group_is_built_again(events: list[str]) -> None:
    engines = engines_of(events, 2, 1)
    sync, source = WeightSync(engines, timeout_s=5), source_of(events)
    await sync.publish(source, 1)
    engines[0].fail["weight_receive"] = EngineLost("gone")

    async def probe() -> bool:
        engines[0].lost = "gone"
        return False

    engines[0].probe = probe
    report = await sync.publish(source, 2)
    assert report.engines == 1
    assert [info["rank_offset"] for info in engines[1].infos] == [3, 1]
    assert [info["world_size"] for info in engines[1].infos] == [4, 2]


async def test_an_engine_that_is_late_but_alive_fails_the_publication(events: list[str]) -> None:
    engines = engines_of(events, 1)
    engines[0].fail["weight_commit"] = EngineLost("did not answer")
    with pytest.raises(WeightSyncError, match="version 4 was not published: did not answer"):
        await WeightSync(engines, timeout_s=5).publish(source_of(events), 4)


async def test_a_rank_that_dies_in_a_publication_ends_the_gang_at_once(
    events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 hangs in the gathering and the engine waits for its next bucket, until rank 0 is killed."""
    killed = asyncio.Event()

    class Dying(NotingRank):
        def __getattr__(self, method: str) -> Any:
            plain = super().__getattr__(method)

            async def send(**_: Any) -> list[str]:
                if self.rank == 0:
                    await killed.wait()
                raise RayActorError(error_msg=f"rank {self.rank} died")

            return SimpleNamespace(remote=send) if method == "weight_send" else plain

    def kill(actor: NotingRank, *, no_restart: bool) -> None:
        events.append(f"kill {actor.rank}")
        killed.set()

    monkeypatch.setattr(group.ray, "kill", kill)
    (engine,) = engines_of(events, 1)
    call = engine.call

    async def until_the_sender_is_gone(method: str, *args: Any, **kwargs: Any) -> Any:
        if method == "weight_receive":
            await killed.wait()
            raise WeightSyncError("connection closed by peer")
        return await call(method, *args, **kwargs)

    engine.call = until_the_sender_is_gone
    gang = group.RayLearnerGroup([Dying(events, rank) for rank in range(2)], placement=None, timeout_s=60)
    with pytest.raises(GangFailure, match="rank 1 died"):
        await asyncio.wait_for(WeightSync([engine], timeout_s=60).publish(gang.weight_source(), 1), 30)
    assert [event for event in events if event.startswith("kill")] == ["kill 0", "kill 1"]
    with pytest.raises(GangFailure, match="rank 1 died"):
        await gang.optim_step()


class LateSender(NotingRank):
    """Its `weight_send` raises what `fails` says after so many seconds."""

    late_s = 0.1
    fails: Exception = WeightSyncError("bucket 2: no broadcast within 0.05 s")

    def __getattr__(self, method: str) -> Any:
        plain = super().__getattr__(method)

        async def send(**_: Any) -> list[str]:
            await asyncio.sleep(self.late_s)
            raise RayTaskError("weight_send", "", self.fails)

        return SimpleNamespace(remote=send) if method == "weight_send" else plain


async def test_a_learner_that_waited_for_a_dead_engine_says_so_before_its_caller_gives_up(events: list[str]) -> None:
    sync = WeightSync(engines_of(events, 1), timeout_s=5)
    with pytest.raises(WeightSyncError, match="bucket 2: no broadcast within"):
        await sync.publish(RayWeightSource([LateSender(events, 0)], timeout_s=0.05), 1)


async def test_a_learner_that_hangs_in_a_publication_is_given_the_time_of_a_publication_not_of_a_step(
    events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_sync, "_MARGIN_S", 0.05)
    rank = LateSender(events, 0)
    rank.late_s = 3600
    gang = group.RayLearnerGroup([rank], placement=None, timeout_s=3600, publish_timeout_s=0.05)
    publication = WeightSync(engines_of(events, 1), timeout_s=0.05).publish(gang.weight_source(), 1)
    with pytest.raises(WeightSyncError, match=r"learner rank 0: weight_send did not return within 0\.1 s"):
        await asyncio.wait_for(publication, 60)


async def test_the_failure_that_explains_the_others_is_the_one_that_is_raised() -> None:
    async def fail(error: Exception) -> None:
        raise error

    for first in (
        [GangFailure(0, "died"), EngineLost("x")],
        [EngineLost("died"), WeightSyncError("peer closed")],
        [WeightSyncError("bucket 3"), RuntimeError("connection closed")],
    ):
        with pytest.raises(type(first[0])):
            await weight_sync._together([fail(first[1]), fail(first[0])])


async def test_the_canary_row_asks_the_learner_for_every_prediction(events: list[str]) -> None:
    source = source_of(events, ranks=2)
    out = await source.log_probs(np.array([5, 6, 7, 8], np.int32))
    row = source.ranks[1].rows[0]
    np.testing.assert_array_equal(row.labels, [6, 7, 8, 0])
    np.testing.assert_array_equal(row.loss_mask, [True, True, True, False])
    np.testing.assert_array_equal(row.cu_seqlens, [0, 4])
    np.testing.assert_array_equal(out, [-1, -1, -1])


def test_a_backend_that_the_engines_do_not_have_is_refused(events: list[str]) -> None:
    with pytest.raises(ValueError, match="'nccl' was asked for, but the engines were started with 'gloo'"):
        WeightSync(engines_of(events, 1), backend="nccl")
