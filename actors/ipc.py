"""The wire of a publication where learners and engines share their devices: memory is lent, nothing travels.

The same calls as `wire.WireGroup`, so senders, checksums and receivers do not know the difference. Each learner rank
fills a bucket on its device and puts a handle of that memory into the store, under its device's name; every engine
worker on that device opens it, copies the bytes into memory of its own, closes it and says so. Only then may the sender
forget the bucket. NCCL could not do this: it refuses two ranks on one device.

    sender     send(buffer): store["3/GPU-a"] = handle     wait(): until store["3/GPU-a/0"] .. are set
    receiver   receive(size): makes room                   wait(): open store["3/GPU-a"], copy, set ".../0"
               close(): store["gone/GPU-a/0"] = 1, so that no sender waits for it

Handles of CUDA memory are CUDA IPC's and have not been run on a GPU; those of host memory (POSIX shared memory) serve
the tests of this file.
"""

from __future__ import annotations

import contextlib
import pickle
import time
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing import shared_memory
from typing import Any, Protocol

import torch
import torch.distributed as dist

from actors.wire import Pending

_LOOK_S = 1.0  # how often a sender that waits looks whether who it waits for has gone


class Lender(Protocol):
    """How memory of one device is lent to another process."""

    place: str  # names the device; the same in every process that sees it

    def lend(self, buffer: torch.Tensor) -> tuple[bytes, Any]:
        """(a handle, what must stay alive until everybody has closed it)."""
        ...

    def borrow(self, handle: bytes) -> contextlib.AbstractContextManager[torch.Tensor]:
        """The lent bytes, uint8, while the context is open."""
        ...


class CudaLender:
    """CUDA IPC. The process must not use expandable segments, and sees the device under whatever index it has."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.place = str(torch.cuda.get_device_properties(device).uuid)

    def lend(self, buffer: torch.Tensor) -> tuple[bytes, Any]:
        from torch.multiprocessing.reductions import reduce_tensor

        torch.cuda.current_stream(self._device).synchronize()  # the reader has a stream of its own
        _, arguments = reduce_tensor(buffer)
        return pickle.dumps(arguments), buffer

    @contextlib.contextmanager
    def borrow(self, handle: bytes) -> Iterator[torch.Tensor]:
        from torch.multiprocessing.reductions import rebuild_cuda_tensor

        arguments = list(pickle.loads(handle))
        arguments[6] = self._device.index or 0  # the sender's index of the device, not ours
        yield rebuild_cuda_tensor(*arguments)
        torch.cuda.current_stream(self._device).synchronize()  # the copy out of it is complete
        torch.cuda.ipc_collect()


class HostLender:
    """POSIX shared memory, for two processes of one machine."""

    place = "host"

    def lend(self, buffer: torch.Tensor) -> tuple[bytes, Any]:
        memory = shared_memory.SharedMemory(create=True, size=max(len(buffer), 1))
        torch.frombuffer(memory.buf, dtype=torch.uint8)[: len(buffer)].copy_(buffer)
        return pickle.dumps((memory.name, len(buffer))), _Unlinked(memory)

    @contextlib.contextmanager
    def borrow(self, handle: bytes) -> Iterator[torch.Tensor]:
        name, size = pickle.loads(handle)
        memory = shared_memory.SharedMemory(name=name)
        try:
            assert memory.buf is not None
            yield torch.frombuffer(bytearray(memory.buf[:size]), dtype=torch.uint8)
        finally:
            memory.close()


class _Unlinked:
    """Removes the name when the sender lets go; a view of it may still hold the mapping."""

    def __init__(self, memory: shared_memory.SharedMemory) -> None:
        self._memory = memory

    def __del__(self) -> None:
        self._memory.unlink()
        with contextlib.suppress(BufferError):
            self._memory.close()


class IpcGroup:
    """One end of the lending. `senders` learner ranks come first, engine workers follow; any number per device."""

    def __init__(
        self,
        *,
        store: dist.Store,
        rank: int,
        senders: int,
        world_size: int,
        timeout_s: float,
        device: torch.device,
        lender: Lender | None = None,
    ) -> None:
        """Blocks until all `world_size` ranks are here; RuntimeError (torch's own) after `timeout_s`.

        Raises RuntimeError where an engine's device carries no learner: nobody could lend it anything.
        """
        self.device = device
        self._store: dist.Store | None = dist.PrefixStore("aster/ipc", store)
        self._timeout = timedelta(seconds=timeout_s)
        self._lender = lender or CudaLender(device)
        self._sends = rank < senders
        self._lent: dict[int, tuple[torch.Tensor, Any]] = {}
        self._empty: dict[int, torch.Tensor] = {}  # to be filled
        self._started = 0
        place = self._lender.place
        self._seat = self._store.add(f"{'lenders' if self._sends else 'borrowers'}/{place}", 1) - 1
        if self._store.add("here", 1) == world_size:
            self._store.set("complete", "1")
        self._store.wait(["complete"], self._timeout)
        self._borrowers = self._store.add(f"borrowers/{place}", 0)
        if not self._sends and not self._store.add(f"lenders/{place}", 0):
            raise RuntimeError(f"no learner rank runs on device {place}, where this engine does")

    def send(self, buffer: torch.Tensor) -> Pending:
        """Lend `buffer`, in order of the calls."""
        assert self._store is not None
        assert self._sends
        self._started += 1
        handle, held = self._lender.lend(buffer)
        self._lent[self._started] = buffer, held
        self._store.set(self._key(self._started), handle.hex())
        return Pending(self, self._started)

    def receive(self, size: int) -> Pending:
        """What the learner on this device lends next, `size` bytes, will be copied into memory of our own."""
        assert not self._sends
        self._started += 1
        self._empty[self._started] = self.empty(size)
        return Pending(self, self._started)

    def wait(self, ticket: int) -> torch.Tensor:
        """Until everybody on this device has copied that bucket; RuntimeError when a peer is late or gone."""
        assert self._store is not None
        key = self._key(ticket)
        if self._sends:
            self._wait_for_borrowers(key)
            buffer: torch.Tensor = self._lent.pop(ticket)[0]
            return buffer
        self._store.wait([key], self._timeout)
        buffer = self._empty.pop(ticket)
        with self._lender.borrow(bytes.fromhex(self._store.get(key).decode())) as lent:
            buffer.copy_(lent)
        self._store.set(f"{key}/{self._seat}", "1")
        return buffer

    def _wait_for_borrowers(self, key: str) -> None:
        """One that has gone is noticed within `_LOOK_S`; what it copied before counts."""
        assert self._store is not None
        copied = [f"{key}/{seat}" for seat in range(self._borrowers)]
        deadline = time.monotonic() + self._timeout.total_seconds()
        while True:
            left = deadline - time.monotonic()
            try:
                return self._store.wait(copied, timedelta(seconds=max(min(_LOOK_S, left), 0.01)))
            except dist.DistStoreError:
                if left <= _LOOK_S:
                    raise
            for seat, done in enumerate(copied):
                gone = self._store.check([self._gone(seat)])  # first, since it copies first and goes then
                if gone and not self._store.check([done]):
                    raise RuntimeError(f"engine worker {seat} on device {self._lender.place} left before it had copied")

    def empty(self, size: int) -> torch.Tensor:
        """uint8 [size] on the device, contents undefined."""
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def close(self) -> None:
        """Idempotent. A sender that waits for us is told; a receiver fails when rank 0's process, which serves the
        store, lets go of it."""
        if self._store is not None and not self._sends:
            with contextlib.suppress(RuntimeError):  # it is gone already, and who served it
                self._store.set(self._gone(self._seat), "1")
        self._lent.clear()
        self._empty.clear()
        self._store = None

    def _gone(self, seat: int) -> str:
        return f"gone/{self._lender.place}/{seat}"

    def _key(self, ticket: int) -> str:
        return f"{ticket}/{self._lender.place}"
