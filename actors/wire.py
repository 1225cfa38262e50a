"""The wire of a weight publication: how tensors become buckets, how a bucket proves itself, who is in the group.

Imported by both ends, the learner (sends) and the vLLM worker (receives), so it knows neither. One control flow for
gloo and NCCL. Both ends derive the same plan from the same metadata; nothing but bytes travels:

    bucket = | tensor | pad | tensor | pad | ... | a checksum of 8 bytes for each tensor |     one broadcast each

The group is a process group of its own over a `TCPStore` of its own: no global state, so it lives beside the learner's
FSDP group and vLLM's tensor-parallel group, and can be torn down and rebuilt when a peer died. Without NCCL the ranks
on rank 0's own machine read its memory (`near.py`), and gloo serves the others.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import Any, Protocol

import torch
import torch.distributed as dist

from actors.near import Memory, NearReceiver, NearSender
from aster.types import TensorMeta

_ALIGN = 16  # bytes; a view of any dtype must start at a multiple of its item size, and NCCL likes 16
_SEAL = 8  # bytes of one tensor's checksum
_CHUNK = 1 << 18  # words of 8 bytes: the products of one chunk stay in the cache, 9 GB/s on one core instead of 0.5


@dataclass(frozen=True)
class Slot:
    """One tensor inside a bucket."""

    meta: TensorMeta
    start: int  # byte offset in the bucket
    size: int  # bytes


@dataclass(frozen=True)
class Bucket:
    """A run of tensors that travel in one broadcast."""

    index: int
    slots: tuple[Slot, ...]
    size: int  # bytes on the wire, padding and checksums included

    @property
    def seal(self) -> int:
        """Byte offset of the checksums, which lie behind the tensors in their order."""
        return self.size - _SEAL * len(self.slots)

    @property
    def label(self) -> str:
        """For messages: `bucket 3 (model.layers.1.mlp.down_proj.weight .. model.norm.weight)`."""
        first, last = self.slots[0].meta.name, self.slots[-1].meta.name
        return f"bucket {self.index} ({first if first == last else f'{first} .. {last}'})"


def plan_buckets(tensors: Sequence[TensorMeta], *, bucket_bytes: int) -> list[Bucket]:
    """Cut `tensors`, in order, into buckets of at most `bucket_bytes`; a larger tensor gets a bucket of its own.

    >>> a, b = TensorMeta("a", "float32", (4,)), TensorMeta("b", "bfloat16", (3,))
    >>> [(x.size, [(s.start, s.size) for s in x.slots]) for x in plan_buckets([a, b], bucket_bytes=64)]
    [(48, [(0, 16), (16, 6)])]
    """
    buckets: list[Bucket] = []
    slots: list[Slot] = []
    end = 0

    def close() -> None:
        buckets.append(Bucket(len(buckets), tuple(slots), end + _SEAL * len(slots)))

    for meta in tensors:
        size = prod(meta.shape) * dtype_of(meta).itemsize
        if slots and end + size + _SEAL * (len(slots) + 1) > bucket_bytes:
            close()
            slots, end = [], 0
        slots.append(Slot(meta, end, size))
        end += -(-size // _ALIGN) * _ALIGN
    if slots:
        close()
    return buckets


def dtype_of(meta: TensorMeta) -> torch.dtype:
    dtype = getattr(torch, meta.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{meta.name}: {meta.dtype!r} is no torch dtype; use 'bfloat16' or 'float32'")
    return dtype


def view(buffer: torch.Tensor, slot: Slot) -> torch.Tensor:
    """The tensor of `slot` inside its bucket's uint8 `buffer`; shares memory."""
    return buffer[slot.start : slot.start + slot.size].view(dtype_of(slot.meta)).view(slot.meta.shape)


def seal(buffer: torch.Tensor, bucket: Bucket) -> None:
    """Zero the padding and write the checksum of each tensor behind them all. Stays on the device.

    Zeroed, so that equal weights have equal checksums, whatever the memory held before.
    """
    ends = [slot.start + slot.size for slot in bucket.slots]
    starts = [slot.start for slot in bucket.slots[1:]] + [bucket.seal]
    for end, start in zip(ends, starts, strict=True):
        if end < start:
            buffer[end:start].zero_()
    buffer[bucket.seal :].view(torch.int64).copy_(_checksums(buffer, bucket))


def damaged(buffer: torch.Tensor, bucket: Bucket) -> list[str]:
    """Names of the tensors whose bytes do not have the checksum that the sender wrote; [] = all as sent."""
    wrong = _checksums(buffer, bucket) != buffer[bucket.seal :].view(torch.int64)
    return [slot.meta.name for slot, bad in zip(bucket.slots, wrong.tolist(), strict=True) if bad]


def fingerprint(buffer: torch.Tensor, bucket: Bucket) -> str:
    """All checksums of a sealed bucket as one, 16 hex digits: equal for equal weights."""
    return f"{int(_digest(buffer[bucket.seal :])) & 0xFFFF_FFFF_FFFF_FFFF:016x}"


def _checksums(buffer: torch.Tensor, bucket: Bucket) -> torch.Tensor:
    """int64 [tensors] of what the bytes are now, padding included."""
    bounds = [slot.start for slot in bucket.slots] + [bucket.seal]
    return torch.stack([_digest(buffer[start:end]) for start, end in pairwise(bounds)])


def _digest(payload: torch.Tensor) -> torch.Tensor:
    """Sum over words w at position p of w * (2p + 1), modulo 2^64.

    The weights are odd, hence invertible: no change of a single word can go unseen. A swap of two different words is
    seen unless their difference times their distance is a multiple of 2^63, as it is when only their top bits differ.
    Guards against transport and packing faults, not against an adversary; one pass of
    plain tensor arithmetic, so that it runs where the bytes are, CPU or GPU.
    """
    total = torch.zeros((), dtype=torch.int64, device=payload.device)
    weights = _weights(payload.device)
    for i, chunk in enumerate(payload.view(torch.int64).split(_CHUNK)):
        total += (chunk * weights[: len(chunk)]).sum() + chunk.sum() * (2 * i * _CHUNK)
    return total


@lru_cache(maxsize=2)
def _weights(device: torch.device) -> torch.Tensor:
    return torch.arange(_CHUNK, dtype=torch.int64, device=device).mul_(2).add_(1)


def _huge(size: int) -> torch.Tensor:
    """Host memory in huge pages where the kernel has them.

    A bucket is written once: in pages of 4 KiB the faults take four times as long as the writing, in huge ones as long.
    Private: the kernel counts shared anonymous memory as shared memory, which seldom is allowed huge pages.
    """
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):  # a kernel or a system without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


class WireGroup:
    """One rank's end of the broadcast group. Rank 0 is the learner's rank 0, engine workers follow."""

    def __init__(
        self,
        *,
        backend: str,
        store: dist.Store,
        rank: int,
        world_size: int,
        timeout_s: float,
        device: torch.device,
        ip: str,
        memory: Memory | None = None,
    ) -> None:
        """With gloo it blocks until all `world_size` ranks are here, RuntimeError after `timeout_s`. With NCCL it
        returns at once, and the first broadcast waits for all of them.

        `ip` is this machine's address towards the others. `memory`: of rank 0 over gloo, so that ranks on its machine
        can read it in place.
        """
        self.device = torch.device("cpu") if backend == "gloo" else device
        self._store: dist.Store | None = dist.PrefixStore("aster/weights", store)  # the group only borrows it
        self._memory = memory if backend == "gloo" else None
        self._buffers: dict[int, torch.Tensor] = {}
        self._works: dict[int, dist.Work] = {}
        self._started = 0
        timeout = timedelta(seconds=timeout_s)
        self._near: NearSender | NearReceiver | None = None
        far = self._far(rank, world_size, timeout) if backend == "gloo" else list(range(1, world_size))
        self._pg: Any = None
        if not isinstance(self._near, NearReceiver) and (far or self._near is None):
            self._pg = process_group(backend, self._store, ([0, *far]).index(rank), 1 + len(far), timeout, ip)

    def _far(self, rank: int, world_size: int, timeout: timedelta) -> list[int]:
        """Ranks that gloo must serve, because they are not on rank 0's machine; the others are connected here."""
        assert self._store is not None
        others = range(1, world_size)
        if rank == 0:
            self._near = NearSender() if self._memory is not None else None
            self._store.set("near", self._near.name if self._near else "")
        else:
            self._store.wait(["near"], timeout)
            name = self._store.get("near").decode()
            self._near = NearReceiver.connect(name, rank, timeout_s=timeout.total_seconds()) if name else None
            self._store.set(f"near/{rank}", "yes" if self._near else "no")
        if others:
            self._store.wait([f"near/{other}" for other in others], timeout)
        far = [other for other in others if self._store.get(f"near/{other}") == b"no"]
        if isinstance(self._near, NearSender):
            self._near.accept(set(others) - set(far), timeout_s=timeout.total_seconds())
        return far

    def send(self, buffer: torch.Tensor) -> Pending:
        """Rank 0 starts handing `buffer` (uint8, from `empty`) to all others, in order of the calls."""
        if isinstance(self._near, NearSender):
            assert self._memory is not None
            self._near.post(self._memory, buffer)
        return self._start(buffer)

    def receive(self, size: int) -> Pending:
        """The others start receiving what rank 0 sends next: `size` bytes."""
        if isinstance(self._near, NearReceiver):
            self._started += 1
            return Pending(self, self._started)
        return self._start(_huge(size) if self.device.type == "cpu" else self.empty(size))

    def _start(self, buffer: torch.Tensor) -> Pending:
        self._started += 1
        self._buffers[self._started] = buffer
        if self._pg is not None:
            options = dist.BroadcastOptions()
            options.rootRank = 0
            options.rootTensor = 0
            self._works[self._started] = self._pg.broadcast([buffer], options)
        return Pending(self, self._started)

    def wait(self, ticket: int) -> torch.Tensor:
        """The bytes, complete. Raises RuntimeError when a peer is gone or the timeout passed."""
        if isinstance(self._near, NearReceiver):
            return self._near.take()
        if ticket in self._works:
            self._works.pop(ticket).wait()
        return self._buffers.pop(ticket)

    def empty(self, size: int) -> torch.Tensor:
        """uint8 [size] on the group's device for `send`, contents undefined."""
        if self._memory is not None:
            return self._memory.take(size)
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def close(self) -> None:
        """Drops the connections now. With gloo a peer that waits for us fails at once instead of at its timeout; with
        NCCL our own operations end, and the peer may still wait until its timeout.

        Gloo does that only when the last reference to the group is gone, and a started operation is one; hence the
        table of works here, instead of works in the hands (and tracebacks) of the callers.
        """
        if self.device.type == "cuda":
            self._pg.abort()
        if self._near is not None:
            self._near.close()
        self._works.clear()
        self._buffers.clear()
        self._pg = self._store = None


class Wire(Protocol):
    """One end of a group, whatever moves the bytes: `WireGroup`, or `ipc.IpcGroup` between processes of one device."""

    device: torch.device

    def send(self, buffer: torch.Tensor) -> Pending: ...
    def receive(self, size: int) -> Pending: ...
    def wait(self, ticket: int) -> torch.Tensor: ...
    def empty(self, size: int) -> torch.Tensor: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Pending:
    """A bucket under way. To be waited for in order."""

    group: Wire
    ticket: int

    def wait(self) -> torch.Tensor:
        """The bytes, complete."""
        return self.group.wait(self.ticket)


def serve_store(*, timeout_s: float) -> dist.TCPStore:
    """The rendezvous of a group, on a port that the system picks (`.port`); does not wait for anyone."""
    return dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))


def join_store(host: str, port: int, *, timeout_s: float) -> dist.TCPStore:
    return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s))


def address_towards(host: str, port: int) -> str:
    """This machine's IP on the route to `host`. Sends nothing: connecting a datagram socket only asks the kernel."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return str(probe.getsockname()[0])


def process_group(backend: str, store: dist.Store, rank: int, world_size: int, timeout: timedelta, ip: str) -> Any:
    """A gloo or NCCL group beside torch's default one. Gloo's blocks until all ranks are here."""
    if backend == "gloo":
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        # The default device is found by resolving the host name, which on a cluster may give a loopback address.
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=ip)]
        options._timeout = timeout
        options._threads = 2
        return dist.ProcessGroupGloo(store, rank, world_size, options)
    if backend == "nccl":
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = timeout
        with _blocking_wait():
            return dist.ProcessGroupNCCL(store, rank, world_size, nccl)
    raise ValueError(f"weight backend {backend!r} is unknown: use 'gloo' or 'nccl'")


@contextlib.contextmanager
def _blocking_wait() -> Iterator[None]:
    """NCCL groups made inside raise from `wait()` after their timeout.

    Otherwise NCCL's watchdog ends the whole process, and a dead engine would take the learner gang with it. Read once,
    by the constructor.
    """
    name = "TORCH_NCCL_BLOCKING_WAIT"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
