"""The wire and the order of a publication, without vLLM: real gloo between threads, and handles that take notes."""

from __future__ import annotations

import asyncio
import concurrent.futures
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from gang import run_gang
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.exceptions import RayActorError, RayTaskError

from actors import group, weight_sync
from actors.near import Memory, NearReceiver
from actors.weight_sync import RayWeightSource, WeightSender, WeightSync
from actors.wire import Bucket, WireGroup, damaged, fingerprint, join_store, plan_buckets, seal, view
from aster.errors import EngineLost, GangFailure, WeightSyncError
from aster.types import MicroBatch, TensorMeta, TokenScores

SHAPES = {"embed": (50, 8), "layer.0": (8, 8), "layer.1": (8, 24), "norm": (7,), "head.bias": (3,)}


def metas(dtype: str = "float32") -> list[TensorMeta]:
    return [TensorMeta(name, dtype, shape) for name, shape in SHAPES.items()]


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


# the plan ------------------------------------------------------------------------------------------------------------

tensor_lists = st.lists(
    st.tuples(st.sampled_from(["float32", "bfloat16"]), st.lists(st.integers(1, 40), max_size=2)),
    min_size=1,
    max_size=30,
)


@given(tensor_lists, st.integers(16, 4000))
def test_every_tensor_travels_once_in_order_aligned_and_within_the_limit(shapes: Any, limit: int) -> None:
    tensors = [TensorMeta(f"t{i}", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(shapes)]
    buckets = plan_buckets(tensors, bucket_bytes=limit)
    assert [s.meta for b in buckets for s in b.slots] == tensors
    assert [b.index for b in buckets] == list(range(len(buckets)))
    for bucket in buckets:
        end = 0
        for slot in bucket.slots:
            assert slot.start >= end
            assert slot.start % 16 == 0
            end = slot.start + slot.size
        assert end <= bucket.seal == bucket.size - 8 * len(bucket.slots)
        assert bucket.size % 8 == 0
        assert bucket.size <= limit + 24 or len(bucket.slots) == 1


def test_a_dtype_that_torch_lacks_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="embed: 'float33' is no torch dtype"):
        plan_buckets(metas("float33"), bucket_bytes=100)


# the seal ------------------------------------------------------------------------------------------------------------


def words_of(*counts: int) -> Bucket:
    """One bucket of tensors `t0`, `t1`, ... of so many words of 8 bytes."""
    (bucket,) = plan_buckets([TensorMeta(f"t{i}", "int64", (n,)) for i, n in enumerate(counts)], bucket_bytes=1 << 40)
    return bucket


def test_the_checksum_of_two_words_is_what_one_gets_by_hand() -> None:
    bucket = words_of(2, 2)
    buffer = torch.zeros(bucket.size, dtype=torch.uint8)
    buffer[:32].view(torch.int64).copy_(torch.tensor([10, 7, 0, 4]))
    seal(buffer, bucket)
    assert buffer[bucket.seal :].view(torch.int64).tolist() == [10 * 1 + 7 * 3, 0 * 1 + 4 * 3]
    assert fingerprint(buffer, bucket) == f"{31 * 1 + 12 * 3:016x}"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=4), st.data())
def test_no_flipped_bit_and_no_two_swapped_words_go_unseen_and_their_tensor_is_named(
    counts: list[int], data: st.DataObject
) -> None:
    bucket = words_of(*counts)
    sealed = torch.randint(0, 256, (bucket.size,), dtype=torch.uint8)
    seal(sealed, bucket)
    assert damaged(sealed, bucket) == []
    slot = data.draw(st.sampled_from(bucket.slots))
    flipped = sealed.clone()
    flipped[slot.start + data.draw(st.integers(0, slot.size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert damaged(flipped, bucket) == [slot.meta.name]
    a, b = (slot.start // 8 + data.draw(st.integers(0, slot.size // 8 - 1)) for _ in range(2))
    swapped, before = sealed.clone(), sealed.view(torch.int64)
    swapped.view(torch.int64)[[a, b]] = before[[b, a]]
    assert damaged(swapped, bucket) == ([] if before[a] == before[b] else [slot.meta.name])


def test_words_swapped_across_chunks_are_seen() -> None:
    bucket = words_of(3 << 18)  # three chunks
    buffer = torch.zeros(bucket.size, dtype=torch.uint8)
    words = buffer.view(torch.int64)
    words[5], words[(1 << 18) + 5] = 1, 2
    seal(buffer, bucket)
    words[5], words[(1 << 18) + 5] = 2, 1
    assert damaged(buffer, bucket) == ["t0"]


def test_a_damaged_checksum_names_its_own_tensor() -> None:
    bucket = words_of(4, 4, 4)
    buffer = torch.zeros(bucket.size, dtype=torch.uint8)
    seal(buffer, bucket)
    buffer[bucket.seal + 8] ^= 1
    assert damaged(buffer, bucket) == ["t1"]


# sender and receivers over gloo --------------------------------------------------------------------------------------


def receive(
    sender: WeightSender, address: tuple[str, int], rank: int, world: int, dtype: str, timeout_s: float = 20
) -> dict[str, torch.Tensor]:
    """What an engine worker does with the wire, less vLLM."""
    store = join_store(*address, timeout_s=timeout_s)
    group = WireGroup(
        backend="gloo",
        store=store,
        rank=rank,
        world_size=world,
        timeout_s=timeout_s,
        device=torch.device("cpu"),
        ip=address[0],
    )
    out: dict[str, torch.Tensor] = {}
    try:
        for bucket in plan_buckets(metas(dtype), bucket_bytes=500):
            buffer = group.receive(bucket.size).wait()
            assert damaged(buffer, bucket) == []
            out |= {slot.meta.name: view(buffer, slot) for slot in bucket.slots}
    finally:
        group.close()
    return out


def sender(dtype: str = "float32", tensors: Callable[[], Iterator[Any]] | None = None, rank: int = 0) -> WeightSender:
    source = tensors or (lambda: iter(weights().items()))
    return WeightSender(tensors=source, metadata=metas(dtype), rank=rank, device="cpu")


def serve(
    sending: WeightSender,
    *,
    receivers: int,
    dtype: str = "float32",
    timeout_s: float = 20,
    hold: bool = False,
    resend: bool = False,
) -> Any:
    """One round: (the sender's checksums or its exception, the receivers' tensors or exceptions)."""
    address = sending.address()
    world = receivers + 1
    with concurrent.futures.ThreadPoolExecutor(world) as pool:

        def send() -> list[str]:
            sending.open(backend="gloo", host=address[0], port=address[1], world_size=world, timeout_s=timeout_s)
            return sending.resend(bucket_bytes=500) if resend else sending.send(bucket_bytes=500, hold=hold)

        jobs = [pool.submit(send)]
        jobs += [pool.submit(receive, sending, address, r, world, dtype, timeout_s) for r in range(1, world)]
        concurrent.futures.wait(jobs, timeout=60)
    return [job.exception() or job.result() for job in jobs]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_receiver_gets_the_tensors_in_the_wire_s_dtype(dtype: str) -> None:
    sending = sender(dtype)
    checksums, *received = serve(sending, receivers=2, dtype=dtype)
    sending.close()
    assert len(checksums) == len(plan_buckets(metas(dtype), bucket_bytes=500)) > 2
    assert len(set(checksums)) == len(checksums)
    for tensors in received:
        assert list(tensors) == list(SHAPES)
        for name, tensor in weights().items():
            torch.testing.assert_close(tensors[name], tensor.to(getattr(torch, dtype)), rtol=0, atol=0)


def test_ranks_on_this_machine_read_the_sender_s_memory_and_others_get_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three receivers; the one that is not let into the Unix socket stands for another machine."""
    connect = NearReceiver.connect
    monkeypatch.setattr(
        NearReceiver, "connect", lambda name, rank, timeout_s: None if rank == 2 else connect(name, rank, timeout_s=20)
    )
    taken: list[int] = []
    take = NearReceiver.take
    monkeypatch.setattr(NearReceiver, "take", lambda self: taken.append(1) or take(self))
    sending = sender()
    for seed in range(3):  # the memory of the first round serves the third
        sending._tensors = lambda seed=seed: iter(weights(seed).items())
        _, *received = serve(sending, receivers=3, hold=True)
        sending.keep()
        for tensors in received:
            for name, tensor in weights(seed).items():
                torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=0)
    buckets = len(plan_buckets(metas(), bucket_bytes=500))
    assert len(taken) == 3 * 2 * buckets
    assert len(sending._memory._files) == 2 * buckets, "one copy is kept, one is under way: no third"
    sending.close()


def test_writing_to_what_was_received_changes_nothing_for_the_others() -> None:
    sending = sender()
    _, first, second = serve(sending, receivers=2)
    first["embed"].zero_()
    torch.testing.assert_close(second["embed"], weights()["embed"], rtol=0, atol=0)
    sending.close()


def test_a_second_round_after_a_new_rendezvous_works() -> None:
    sending = sender()
    first, _ = serve(sending, receivers=1)
    second, _ = serve(sending, receivers=1)
    sending.close()
    sending.close()
    assert first == second


def test_a_rank_above_zero_takes_part_in_the_gathering_and_sends_nothing() -> None:
    seen: list[str] = []

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights().items():
            seen.append(name)
            yield name, tensor

    other = sender(tensors=tensors, rank=1)
    other.open(backend="gloo", host="nowhere.invalid", port=1, world_size=2, timeout_s=1)
    assert other.send(bucket_bytes=500) == []
    assert seen == list(SHAPES)
    other.close()


class BrokenWire(WeightSender):
    """An engine dies at the second bucket."""

    def _post(self, bucket: Any, buffer: torch.Tensor) -> Any:
        if bucket.index == 1:
            raise RuntimeError("connection closed by peer")
        return super()._post(bucket, buffer)


def _send_over_a_broken_wire(rank: int, world_size: int, port: int, store: str) -> tuple[list[str], str, float, bool]:
    """(what this rank gathered, its exception, the sum of both ranks' ones after it, group left before the last)."""
    dist.init_process_group("cpu:gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    gathered, error, left = [], "", False

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal left
        for name, tensor in weights().items():
            dist.all_reduce(tensor)
            gathered.append(name)
            left = sending._group is None
            yield name, tensor

    sending = BrokenWire(tensors=tensors, metadata=metas(), rank=rank, device="cpu")
    if rank == 0:
        host, port = sending.address()
        sending.open(backend="gloo", host=host, port=port, world_size=1, timeout_s=20)
    try:
        sending.send(bucket_bytes=500)
    except RuntimeError as failure:
        error = str(failure)
    one = torch.ones(1)
    dist.all_reduce(one)
    dist.destroy_process_group()
    return gathered, error, float(one), left


def test_a_send_that_fails_midway_gathers_to_the_end_so_that_the_other_ranks_do_not_hang(tmp_path: Path) -> None:
    first, other = run_gang(2, _send_over_a_broken_wire, str(tmp_path / "store"), folder=tmp_path, timeout_s=60)
    assert first == (list(SHAPES), "connection closed by peer", 2.0, True)
    assert other[:3] == (list(SHAPES), "", 2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("head.bias"), "announced 'head.bias' and did not send it"),
        (lambda w: w.update(extra=torch.zeros(1)), "'extra' that its metadata does not announce"),
        (lambda w: w.update({"layer.0": torch.zeros(4, 4)}), r"sends 'layer.0' \(4, 4\) where it announced"),
    ],
)
def test_a_learner_that_sends_something_else_than_it_announced_is_named_and_nobody_waits(
    change: Callable[[dict[str, torch.Tensor]], Any], message: str
) -> None:
    changed = weights()
    change(changed)
    began = time.monotonic()
    failure, *received = serve(sender(tensors=lambda: iter(changed.items())), receivers=2)
    assert isinstance(failure, WeightSyncError)
    with pytest.raises(WeightSyncError, match=message):
        raise failure
    if "extra" not in changed:  # an extra tensor is noticed after the last bucket
        assert all(isinstance(r, RuntimeError) for r in received)
    assert time.monotonic() - began < 10, "a receiver sat out its timeout"


def test_a_receiver_that_never_comes_ends_the_opening_at_its_timeout() -> None:
    sending = sender()
    host, port = sending.address()
    began = time.monotonic()
    with pytest.raises(RuntimeError):
        sending.open(backend="gloo", host=host, port=port, world_size=2, timeout_s=1)
    assert time.monotonic() - began < 10
    sending.close()


def test_the_kept_copy_goes_out_again_byte_for_byte_whatever_was_sent_since() -> None:
    current = weights(0)
    sending = sender(tensors=lambda: iter(current.items()))
    first, received = serve(sending, receivers=1, hold=True)
    sending.keep()
    current.update(weights(1))
    second, _ = serve(sending, receivers=1, hold=True)  # failed its canary, say: never kept
    again, restored = serve(sending, receivers=1, resend=True)
    sending.close()
    assert again == first != second
    for name, tensor in weights(0).items():
        torch.testing.assert_close(restored[name], tensor, rtol=0, atol=0)
    assert received.keys() == restored.keys()


def test_a_copy_that_is_not_there_or_was_cut_differently_is_not_sent() -> None:
    sending = sender()
    with pytest.raises(WeightSyncError, match="holds no published weights"):
        sending.resend(bucket_bytes=500)
    serve(sending, receivers=1, hold=True)
    sending.keep()
    with pytest.raises(WeightSyncError, match="holds buckets of 500 bytes, the engines wait for 600"):
        sending.resend(bucket_bytes=600)
    sending.close()
    assert sender(rank=1).resend(bucket_bytes=500) == []


def test_what_the_memory_held_before_does_not_change_a_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    sending = sender()
    clean, _ = serve(sending, receivers=1)
    take = Memory.take
    monkeypatch.setattr(Memory, "take", lambda self, size: take(self, size).fill_(0xAB))
    dirty, _ = serve(sending, receivers=1)
    sending.close()
    assert clean == dirty


def test_the_next_bucket_is_packed_while_the_last_one_is_on_the_wire() -> None:
    order: list[str] = []

    class Noting(WeightSender):
        def _post(self, bucket: Any, buffer: torch.Tensor) -> Any:
            pending = super()._post(bucket, buffer)
            order.append(f"post {bucket.index}")

            class Waited:
                def wait(self) -> torch.Tensor:
                    order.append(f"wait {bucket.index}")
                    return pending.wait()

            return Waited()

    serve(Noting(tensors=lambda: iter(weights().items()), metadata=metas(), rank=0, device="cpu"), receivers=1)
    assert order[:5] == ["post 0", "post 1", "wait 0", "post 2", "wait 1"]


_DOOMED = """
import sys, time
from actors.wire import WireGroup, join_store
import torch
host, port, rank = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
store = join_store(host, port, timeout_s=60)
cpu = torch.device("cpu")
group = WireGroup(backend="gloo", store=store, rank=rank, world_size=3, timeout_s=60, device=cpu, ip=host)
group.receive(int(sys.argv[4])).wait()
print("one bucket came", flush=True)
time.sleep(120)
"""


def test_a_receiver_killed_between_two_buckets_ends_the_round_for_all_and_the_rest_can_go_on() -> None:
    """A process, killed for real; the others have 60 s of timeout and use none of it."""
    size = plan_buckets(metas(), bucket_bytes=500)[0].size
    sending = sender()
    host, port = address = sending.address()
    doomed = subprocess.Popen(
        [sys.executable, "-c", _DOOMED, host, str(port), "2", str(size)], stdout=subprocess.PIPE, text=True
    )
    try:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            surviving = pool.submit(receive, sending, address, 1, 3, "float32", 60)
            sending.open(backend="gloo", host=host, port=port, world_size=3, timeout_s=60)
            killed = threading.Event()
            pairs = sending._tensors

            def tensors() -> Iterator[Any]:
                for name, tensor in pairs():
                    if name == "norm":  # in the last bucket
                        assert killed.wait(30)
                    yield name, tensor

            sending._tensors = tensors
            round_ = pool.submit(sending.send, bucket_bytes=500)
            assert doomed.stdout is not None
            assert doomed.stdout.readline() == "one bucket came\n"
            doomed.send_signal(signal.SIGKILL)
            doomed.wait(10)
            began = time.monotonic()
            killed.set()
            with pytest.raises(RuntimeError):
                round_.result(30)
            left = surviving.exception(30)  # None: it had everything by then
            assert left is None or isinstance(left, RuntimeError)
            assert time.monotonic() - began < 20, "someone sat out the timeout"
        checksums, received = serve(sending, receivers=1)
        assert len(checksums) == len(plan_buckets(metas(), bucket_bytes=500))
        assert list(received) == list(SHAPES)
    finally:
        doomed.kill()
        doomed.wait(10)
        sending.close()


def test_an_unknown_backend_is_refused() -> None:
    sending = sender()
    host, port = sending.address()
    with pytest.raises(ValueError, match="weight backend 'mpi' is unknown"):
        sending.open(backend="mpi", host=host, port=port, world_size=1, timeout_s=1)


# the order of a publication ------------------------------------------------------------------------------------------


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
        await asyncio.wait_for(WeightSync([engine], timeout_s=60).publish(gang.weight_source(), 1), 10)
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
        await asyncio.wait_for(publication, 10)


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
