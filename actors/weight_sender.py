"""The sending end of a publication, one in every learner rank (`weight_sync.py` leads it).

Rank 0 packs, seals and broadcasts; the others take part in the gathering and send nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ray
import torch
import torch.distributed as dist

from actors.wire import Bucket, Pending, WireGroup, dtype_of, plan_buckets, seal, sealed_digest, serve_store, view
from aster.errors import WeightSyncError
from aster.types import TensorMeta

_RENDEZVOUS_S = 300.0  # how long the store lets a rank wait for the others; the group's own timeout comes with open()


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
        self._rank = rank
        self._device = torch.device(device)
        self._store: dist.TCPStore | None = None
        self._group: WireGroup | None = None
        self._stock: Any = None

    def address(self) -> tuple[str, int]:
        """Rank 0: (host, port) of a fresh rendezvous, bound from now on. Ends a group that was open before."""
        assert self._rank == 0, self._rank
        self.close()
        self._store = serve_store(timeout_s=_RENDEZVOUS_S)
        return ray.util.get_node_ip_address(), self._store.port

    def open(self, *, backend: str, host: str, port: int, world_size: int, timeout_s: float) -> None:
        """Rank 0: join the group as its rank 0; blocks until all engine workers joined. Other ranks: nothing."""
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
        )

    def send(self, *, bucket_bytes: int) -> list[str]:
        """One pass over the weights. Rank 0 returns the checksum of every bucket (none with `vllm_nccl`), others [].

        On any failure the group is dropped, so that the receivers fail now rather than at their timeout.
        """
        if self._rank != 0:
            for _ in self._tensors():
                pass
            return []
        try:
            if self._stock is not None:
                self._stock.send_weights()
                return []
            return self._send(bucket_bytes)
        except BaseException:
            self.close()
            raise

    def _send(self, bucket_bytes: int) -> list[str]:
        assert self._group is not None, "open() comes before send()"
        digests: list[str] = []
        pairs = self.checked()
        in_flight: Pending | None = None
        for bucket in plan_buckets(self.metadata, bucket_bytes=bucket_bytes):
            buffer = self._group.empty(bucket.size).zero_()  # equal weights, equal checksums: no garbage between them
            for slot in bucket.slots:
                view(buffer, slot).copy_(next(pairs)[1])
            seal(buffer)
            digests.append(sealed_digest(buffer))
            posted = self._post(bucket, buffer)
            if in_flight is not None:
                in_flight.wait()
            in_flight = posted
        for name, _ in pairs:
            raise WeightSyncError(f"the learner has tensor {name!r} that its metadata does not announce")
        if in_flight is not None:
            in_flight.wait()
        return digests

    def _post(self, bucket: Bucket, buffer: torch.Tensor) -> Pending:
        assert self._group is not None
        return self._group.broadcast(buffer)

    def checked(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors, each compared with what was announced: a disagreement would cut the stream differently on the
        other side and load garbage."""
        metas = iter(self.metadata)
        for name, tensor in self._tensors():
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
        """Leave the group; idempotent."""
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
