"""The sending end of a publication, one in every learner rank (`weight_sync.py` leads it).

Rank 0 packs, seals and broadcasts; the others take part in the gathering and send nothing. While a bucket is on the
wire the next one is gathered, packed and sealed.

Rank 0 also holds what was last published, as it went over the wire, in host memory: a roll-back is the same buckets
sent again. All of it lies in rank 0, not in shards: only rank 0 sends, so a roll-back needs no gathering, and the old
checksums prove the copy too. It takes the wire's bytes once (8 GB for 4B parameters in bf16), and twice from the start
of a publication until it is accepted; without NCCL twice all the time, since that memory is used again (`near.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
import torch
import torch.distributed as dist

from actors.ipc import IpcGroup
from actors.near import Memory
from actors.wire import (
    Bucket,
    Pending,
    Wire,
    WireGroup,
    dtype_of,
    fingerprint,
    join_store,
    plan_buckets,
    seal,
    serve_store,
    view,
)
from aster.errors import WeightSyncError
from aster.types import TensorMeta

_RENDEZVOUS_S = 300.0  # how long the store lets a rank wait for the others; the group's own timeout comes with open()


@dataclass(frozen=True)
class _Copy:
    """One publication as it went over the wire."""

    bucket_bytes: int
    buckets: list[tuple[Bucket, torch.Tensor]]  # sealed, on the host


class WeightSender:
    """The sending end, one per learner rank. Rank 0 packs and broadcasts; the others take part in the gathering."""

    def __init__(
        self,
        *,
        tensors: Callable[[], Iterator[tuple[str, torch.Tensor]]],
        metadata: list[TensorMeta],
        rank: int,
        device: torch.device | str,
    ) -> None:
        """`tensors()` is a collective: every rank iterates it to the end, in the order of `metadata`; rank 0 gets full
        tensors under their Hugging Face names, in any dtype and on any device (the wire's dtype is `metadata`'s)."""
        self.metadata = metadata
        self._tensors = tensors
        self._gathering: Iterator[tuple[str, torch.Tensor]] = iter(())  # the pass under way
        self._rank = rank
        self._device = torch.device(device)
        self._store: dist.TCPStore | None = None
        self._group: Wire | None = None
        self._stock: Any = None
        self._memory = Memory()  # where buckets lie that engines of this machine read in place
        self._used: list[torch.Tensor] = []  # of it: sent and not kept, free when the next publication begins
        self._sent: _Copy | None = None  # what `send` sent last
        self._kept: _Copy | None = None  # what `keep` said is good

    def address(self) -> tuple[str, int]:
        """Rank 0: (host, port) of a fresh rendezvous, bound from now on. Ends a group that was open before."""
        assert self._rank == 0, self._rank
        self.close()
        self._store = serve_store(timeout_s=_RENDEZVOUS_S)
        return ray.util.get_node_ip_address(), self._store.port

    def open(self, *, backend: str, host: str, port: int, world_size: int, timeout_s: float, senders: int = 1) -> None:
        """Rank 0: join the group as its rank 0; blocks until all engine workers joined (`nccl`: not yet). Other ranks:
        nothing, but with `ipc` all `senders` join and lend on their own devices."""
        if backend == "ipc":
            self._group = IpcGroup(
                store=self._store or join_store(host, port, timeout_s=timeout_s),
                rank=self._rank,
                senders=senders,
                world_size=world_size,
                timeout_s=timeout_s,
                device=self._device,
            )
            return
        if self._rank != 0:
            return
        if backend == "vllm_nccl":
            self._store = None  # frees the port: vLLM's rendezvous binds it itself
            self._stock = _open_stock(self, host=host, port=port, world_size=world_size)
            return
        assert self._store is not None, "address() comes before open()"
        self._group = WireGroup(
            backend=backend,
            store=self._store,
            rank=0,
            world_size=world_size,
            timeout_s=timeout_s,
            device=self._device,
            ip=host,
            memory=self._memory,
        )

    def send(self, *, bucket_bytes: int, hold: bool = False) -> list[str]:
        """One pass over the weights. Rank 0 returns a fingerprint of every bucket (none with `vllm_nccl`), others [].

        `hold`: rank 0 holds a copy of what it sends, for `keep`. On any failure the group is dropped first, so that the
        receivers fail now rather than at their timeout (NCCL's may not); then the gathering goes on to its end, for the
        other ranks.
        """
        self._free()
        self._gathering = self._tensors()
        if self._rank != 0 and self._group is None:
            self._gather_the_rest()
            return []
        try:
            if self._stock is not None:
                with self._closing():
                    self._stock.send_weights()
                return []
            copy = _Copy(bucket_bytes, []) if hold else None
            digests = self._broadcast(self._packed(bucket_bytes), copy)
        except Exception:
            with contextlib.suppress(Exception):  # a peer died too: what failed first says more
                self._gather_the_rest()
            raise
        self._sent = copy
        return digests

    def _gather_the_rest(self) -> None:
        """Each tensor is a collective: a rank that stopped here would leave the others in it until their timeout."""
        for _ in self._gathering:
            pass

    def keep(self) -> None:
        """What was sent last verified: from here on `resend` sends it, and the copy before it is dropped."""
        dropped, self._kept, self._sent = self._kept, self._sent, None
        self._used = [buffer for _, buffer in dropped.buckets if buffer in self._memory] if dropped else []

    def _free(self) -> None:
        """A publication begins: no engine reads what earlier ones sent any more, but for the kept copy."""
        self._sent = None
        for buffer in self._used:
            self._memory.give(buffer)
        self._used = []

    def resend(self, *, bucket_bytes: int) -> list[str]:
        """Rank 0: the kept buckets once more, under their old checksums. Other ranks: nothing.

        Raises `WeightSyncError` when there is no copy, or one that was cut into buckets of another size.
        """
        if self._rank != 0:
            return []
        self._free()
        if self._kept is None:
            raise WeightSyncError("the learner holds no published weights to send again")
        if self._kept.bucket_bytes != bucket_bytes:
            raise WeightSyncError(
                f"the learner holds buckets of {self._kept.bucket_bytes} bytes, the engines wait for {bucket_bytes}"
            )
        return self._broadcast(self._kept.buckets)

    def _packed(self, bucket_bytes: int) -> Iterator[tuple[Bucket, torch.Tensor]]:
        """The current weights, bucket by bucket, sealed, where the wire wants them."""
        assert self._group is not None, "open() comes before send()"
        pairs = self.checked()
        for bucket in plan_buckets(self.metadata, bucket_bytes=bucket_bytes):
            buffer = self._group.empty(bucket.size)
            if buffer in self._memory:
                self._used.append(buffer)
            for slot in bucket.slots:
                view(buffer, slot).copy_(next(pairs)[1])
            seal(buffer, bucket)
            yield bucket, buffer
        for name, _ in pairs:
            raise WeightSyncError(f"the learner has tensor {name!r} that its metadata does not announce")

    def _broadcast(self, buckets: Iterable[tuple[Bucket, torch.Tensor]], copy: _Copy | None = None) -> list[str]:
        assert self._group is not None, "open() comes before send()"
        digests: list[str] = []
        in_flight: Pending | None = None
        with self._closing():
            for bucket, held in buckets:
                buffer = held.to(self._group.device)
                digests.append(fingerprint(buffer, bucket))
                posted = self._post(bucket, buffer)
                if copy is not None:
                    copy.buckets.append((bucket, buffer.cpu()))  # over gloo it is the buffer itself
                if in_flight is not None:
                    in_flight.wait()
                in_flight = posted
            if in_flight is not None:
                in_flight.wait()
        return digests

    @contextlib.contextmanager
    def _closing(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _post(self, bucket: Bucket, buffer: torch.Tensor) -> Pending:
        assert self._group is not None
        return self._group.send(buffer)

    def checked(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of the pass under way, each compared with what was announced: a disagreement would cut the stream
        differently on the other side and load garbage."""
        metas = iter(self.metadata)
        for name, tensor in self._gathering:
            meta = next(metas, None)
            if meta is not None and (name, tuple(tensor.shape)) != (meta.name, tuple(meta.shape)):
                raise WeightSyncError(
                    f"the learner sends {name!r} {tuple(tensor.shape)} where it announced {meta.name!r} {meta.shape}"
                )
            yield name, tensor
        missing = next(metas, None)
        if missing is not None:
            raise WeightSyncError(f"the learner announced {missing.name!r} and did not send it")

    def close(self) -> None:
        """Leave the group; idempotent. The kept copy stays."""
        if self._group is not None:
            self._group.close()
        if self._stock is not None:
            self._stock.shutdown()
        self._group = self._stock = self._store = None


class _Led:
    """vLLM's trainer calls the engines through a client; here `WeightSync` leads both sides, so nothing is to do."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...
    def start_weight_update(self) -> None: ...
    def update_weights(self, update_info: Any) -> None: ...
    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


def _open_stock(sender: WeightSender, *, host: str, port: int, world_size: int) -> Any:
    """vLLM's own NCCL sender. Its rendezvous has a timeout of its own (300 s); its broadcasts have none."""
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    class Source(WeightSource):
        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(m.name, dtype_of(m), tuple(m.shape)) for m in sender.metadata]

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            for meta, (name, tensor) in zip(sender.metadata, sender.checked(), strict=True):
                yield name, tensor.to(device=sender._device, dtype=dtype_of(meta))

    info = NCCLTrainerInitInfo(master_address=host, master_port=port, world_size=world_size, rank=0)
    return WeightTransferTrainerFactory.trainer_init(info, client=_Led(), source=Source())
