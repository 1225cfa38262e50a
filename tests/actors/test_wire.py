"""The wire of the weights, without vLLM: buckets, seals, and a sender and receivers over real gloo between threads."""

from __future__ import annotations

import concurrent.futures
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gang import run_gang
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import SHAPES, metas, weights

from actors.near import Memory, NearReceiver
from actors.weight_sync import WeightSender
from actors.wire import Bucket, WireGroup, damaged, fingerprint, join_store, plan_buckets, seal, view
from aster.errors import WeightSyncError
from aster.types import TensorMeta

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


@settings(max_examples=30)
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
    timeout_s: float = 60,
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
        concurrent.futures.wait(jobs, timeout=120)
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
    first, other = run_gang(2, _send_over_a_broken_wire, str(tmp_path / "store"), folder=tmp_path)
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
    assert time.monotonic() - began < 40, "a receiver sat out its timeout"


def test_a_receiver_that_never_comes_ends_the_opening_at_its_timeout() -> None:
    sending = sender()
    host, port = sending.address()
    began = time.monotonic()
    with pytest.raises(RuntimeError):
        sending.open(backend="gloo", host=host, port=port, world_size=2, timeout_s=1)
    assert time.monotonic() - began < 40
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
store = join_store(host, port, timeout_s=120)
cpu = torch.device("cpu")
group = WireGroup(backend="gloo", store=store, rank=rank, world_size=3, timeout_s=120, device=cpu, ip=host)
group.receive(int(sys.argv[4])).wait()
print("one bucket came", flush=True)
time.sleep(600)
"""


def test_a_receiver_killed_between_two_buckets_ends_the_round_for_all_and_the_rest_can_go_on() -> None:
    """A process, killed for real; the others have 120 s of timeout, for it to import torch, and use none of it."""
    size = plan_buckets(metas(), bucket_bytes=500)[0].size
    sending = sender()
    host, port = address = sending.address()
    doomed = subprocess.Popen(
        [sys.executable, "-c", _DOOMED, host, str(port), "2", str(size)], stdout=subprocess.PIPE, text=True
    )
    try:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            surviving = pool.submit(receive, sending, address, 1, 3, "float32", 120)
            sending.open(backend="gloo", host=host, port=port, world_size=3, timeout_s=120)
            killed = threading.Event()
            pairs = sending._tensors

            def tensors() -> Iterator[Any]:
                for name, tensor in pairs():
                    if name == "norm":  # in the last bucket
                        assert killed.wait(60)
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
                round_.result(100)
            left = surviving.exception(100)  # None: it had everything by then
            assert left is None or isinstance(left, RuntimeError)
            assert time.monotonic() - began < 60, "someone sat out the timeout"
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
