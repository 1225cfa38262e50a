"""Buckets lent from one process to another on the same device; here the device is host memory."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing import get_context
from typing import Any

import pytest
import torch
import torch.distributed as dist

from actors import ipc
from actors.ipc import HostLender, IpcGroup
from actors.wire import Bucket, damaged, fingerprint, join_store, plan_buckets, seal, serve_store
from aster.types import TensorMeta

SIZES = [24, 1 << 16, 8 << 10]  # bytes
BUCKETS: list[Bucket] = [plan_buckets([TensorMeta("t", "uint8", (n,))], bucket_bytes=1 << 20)[0] for n in SIZES]


def filled(number: int, bucket: Bucket) -> torch.Tensor:
    buffer = torch.arange(bucket.size, dtype=torch.int64).mul_(number + 7).to(torch.uint8)
    seal(buffer, bucket)
    return buffer


def group(store: dist.Store, rank: int, *, senders: int = 1, world_size: int = 2, place: str = "host", timeout_s=60.0):
    lender = HostLender()
    lender.place = place
    return IpcGroup(
        store=store, rank=rank, senders=senders, world_size=world_size, timeout_s=timeout_s, lender=lender,
        device=torch.device("cpu"),
    )  # fmt: skip


def imported() -> None:
    """Who can call this has imported this file, and torch with it."""


def receive(port: int, rank: int, *, place: str = "host", **more: Any) -> list[str]:
    """Fingerprints of what arrived; every tensor's checksum holds."""
    mine = group(join_store("127.0.0.1", port, timeout_s=60), rank, place=place, **more)
    out = []
    for bucket in BUCKETS:
        got = mine.receive(bucket.size).wait()
        assert damaged(got, bucket) == []
        out.append(fingerprint(got, bucket))
    mine.close()
    return out


def send(store: dist.Store, rank: int, offset: int = 0, *, place: str = "host", **more: Any) -> list[str]:
    mine = group(store, rank, place=place, **more)
    buffers = [filled(offset + number, bucket) for number, bucket in enumerate(BUCKETS)]
    for pending in [mine.send(buffer) for buffer in buffers]:
        pending.wait()
    assert not mine._lent, "what everybody has copied is still held"
    mine.close()
    return [fingerprint(buffer, bucket) for buffer, bucket in zip(buffers, BUCKETS, strict=True)]


def test_another_process_reads_exactly_what_was_lent() -> None:
    store = serve_store(timeout_s=60)
    with get_context("spawn").Pool(1) as pool:
        pool.apply(imported)  # that takes long on a busy machine, and is no part of the 60 s of the group
        arrived = pool.apply_async(receive, (store.port, 1))
        assert send(store, 0) == arrived.get(90)


def test_every_device_gets_its_own_ranks_bytes_and_several_workers_of_one_device_share_them() -> None:
    store = serve_store(timeout_s=60)
    shape = {"senders": 2, "world_size": 5}
    with ThreadPoolExecutor(5) as threads:
        stores = [join_store("127.0.0.1", store.port, timeout_s=60) for _ in range(2)]
        sent = [threads.submit(send, stores[r], r, 50 * r, place=f"gpu-{r}", **shape) for r in range(2)]
        got = [
            threads.submit(receive, store.port, rank, place=place, **shape)
            for rank, place in ((2, "gpu-0"), (3, "gpu-1"), (4, "gpu-1"))
        ]
        first, second = [s.result(90) for s in sent]
        assert [g.result(90) for g in got] == [first, second, second]
        assert first != second


def test_an_engine_on_a_device_without_a_learner_is_told_so() -> None:
    store = serve_store(timeout_s=60)
    with ThreadPoolExecutor(2) as threads:
        sender = threads.submit(group, store, 0, place="gpu-0")
        with pytest.raises(RuntimeError, match="no learner rank runs on device gpu-5"):
            group(join_store("127.0.0.1", store.port, timeout_s=60), 1, place="gpu-5")
        sender.result(60)


def test_a_worker_that_leaves_is_not_waited_for_but_what_it_copied_before_counts(monkeypatch) -> None:
    """Two workers on one device: the one leaves after the first bucket, the other reads both."""
    monkeypatch.setattr(ipc, "_LOOK_S", 0.1)
    store = serve_store(timeout_s=60)
    both = threading.Barrier(2)

    def borrow(rank: int, buckets: list[Bucket]) -> None:
        mine = group(join_store("127.0.0.1", store.port, timeout_s=60), rank, world_size=3)
        for number, bucket in enumerate(buckets):
            if number == 0 and len(buckets) == 2:
                both.wait(60)  # the other has gone by now, having copied its own
            mine.receive(bucket.size).wait()
        mine.close()
        if len(buckets) == 1:
            both.wait(60)

    with ThreadPoolExecutor(2) as threads:
        jobs = [threads.submit(borrow, 1, BUCKETS[:1]), threads.submit(borrow, 2, BUCKETS[:2])]
        mine = group(store, 0, world_size=3)
        lent = [mine.send(filled(number, bucket)) for number, bucket in enumerate(BUCKETS[:2])]
        lent[0].wait()
        began = time.monotonic()
        with pytest.raises(RuntimeError, match=r"engine worker \d on device host left before it had copied"):
            lent[1].wait()
        assert time.monotonic() - began < 30, "the sender sat out its timeout of 60 s"
        for job in jobs:
            job.result(60)
    mine.close()


def test_nobody_waits_longer_than_the_timeout_for_a_peer_that_never_copies() -> None:
    store = serve_store(timeout_s=60)
    joined = threading.Thread(target=group, args=(join_store("127.0.0.1", store.port, timeout_s=60), 1))
    joined.start()
    mine = group(store, 0, timeout_s=60)
    joined.join(60)
    assert timedelta(seconds=60) == mine._timeout
    mine._timeout = timedelta(seconds=0.5)  # not before: that the peer is there may take longer
    began = time.monotonic()
    with pytest.raises(RuntimeError):
        mine.send(filled(0, BUCKETS[0])).wait()
    assert time.monotonic() - began < 30
    mine.close()
