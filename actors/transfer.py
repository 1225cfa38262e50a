"""The receiving end inside the vLLM worker: our weight-transfer engine in vLLM's factory, under the name "aster".

Imported by vLLM in every worker process, since `worker_extension_cls` names `WorkerExtension`; the import registers the
engine. Not imported by the driver or the learner (vLLM costs seconds and hundreds of MB): they know `wire.py` only.

A round is start -> receive (once) -> finish, driven from outside (`weight_sync.py`) while generation is paused. A
bucket is checked before it is loaded, and the next one is on the wire while this one loads. What the load did not write
is found at the end (`reload_proof.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check

from actors.ipc import IpcGroup
from actors.reload_proof import ProvenReload
from actors.wire import Bucket, Pending, Wire, WireGroup, address_towards, damaged, join_store, plan_buckets, view
from aster.errors import WeightSyncError
from aster.types import TensorMeta

log = logging.getLogger("aster")
# It warns at every reload of rotary tables and tied heads, which no checkpoint ever names.
logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)

BACKEND = "aster"
_HEAD_COLUMNS = 4  # of the output head that are read back; each holds a number for every token of the vocabulary


@dataclass
class InitInfo(WeightTransferInitInfo):
    """How to join the group; `rank_offset` is the rank of this engine's first worker, different for every engine."""

    backend: str
    host: str
    port: int
    rank_offset: int
    world_size: int
    bucket_bytes: int
    timeout_s: float
    senders: int = 1  # learner ranks in the group; more than one with `ipc` only


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """What will come, in wire order. The same three lists as vLLM's own NCCL engine."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]

    def tensors(self) -> list[TensorMeta]:
        return [
            TensorMeta(name, dtype, tuple(shape))
            for name, dtype, shape in zip(self.names, self.dtype_names, self.shapes, strict=True)
        ]


class TransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Receives buckets by broadcast and loads them with the model's own `load_weights` (which fuses and shards)."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    _group: Wire | None = None
    _bucket_bytes = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reload: ProvenReload | None = None  # under way

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        self.shutdown()
        self._bucket_bytes = init_info.bucket_bytes
        if init_info.backend == "ipc":
            self._group = IpcGroup(
                store=join_store(init_info.host, init_info.port, timeout_s=init_info.timeout_s),
                rank=init_info.rank_offset + self.parallel_config.rank,
                senders=init_info.senders,
                world_size=init_info.world_size,
                timeout_s=init_info.timeout_s,
                device=self.device,
            )
            return
        self._group = WireGroup(
            backend=init_info.backend,
            store=join_store(init_info.host, init_info.port, timeout_s=init_info.timeout_s),
            rank=init_info.rank_offset + self.parallel_config.rank,
            world_size=init_info.world_size,
            timeout_s=init_info.timeout_s,
            device=self.device,
            ip=address_towards(init_info.host, init_info.port),
        )

    def start_weight_update(self) -> None:
        self._reload = ProvenReload(self.model)

    def update_weights(self, update_info: dict) -> None:
        """As the base class, but the base synchronizes an accelerator, and raises where there is none."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Receive every bucket, check it, load it. Raises `WeightSyncError` naming the tensors that are damaged, that
        the model refuses, or that it has and nobody sent.

        After a bad bucket the rest is received but not loaded: leaving early would block the peers until their
        timeout. The model is then part old, part new, and must not serve until a later round succeeds.
        """
        if self._group is None or self._reload is None:
            raise WeightSyncError("weights were announced before the transfer group was opened and a reload begun")
        buckets = plan_buckets(update_info.tensors(), bucket_bytes=self._bucket_bytes)
        error: Exception | None = None
        try:
            with disable_mtp_completeness_check():
                for bucket, buffer in self._received(self._group, buckets):
                    if error is None:
                        error = self._load(bucket, buffer)
        except BaseException:
            self._end_reload()
            raise
        if error is None and (untouched := self._reload.untouched()):
            error = WeightSyncError(f"no tensor that the learner sent fills {', '.join(untouched)}")
        if error is not None:
            self._end_reload()
            raise error

    @staticmethod
    def _received(group: Wire, buckets: list[Bucket]) -> Iterator[tuple[Bucket, torch.Tensor]]:
        """Each bucket with its bytes, while the next one is already being received.

        Each in memory of its own: vLLM keeps views of the tensors of a fused layer until the layer is complete.
        """
        before: tuple[Bucket, Pending] | None = None
        for bucket in buckets:
            pending = group.receive(bucket.size)
            if before is not None:
                yield before[0], before[1].wait()
            before = bucket, pending
        if before is not None:
            yield before[0], before[1].wait()

    def _load(self, bucket: Bucket, buffer: torch.Tensor) -> Exception | None:
        if names := damaged(buffer, bucket):
            return WeightSyncError(
                f"bucket {bucket.index}: {', '.join(names)} arrived with another checksum than was sent; not loaded"
            )
        try:
            model: Any = self.model  # the loader is a method that vLLM's models have, not nn.Module
            model.load_weights([(slot.meta.name, view(buffer, slot)) for slot in bucket.slots])
        except Exception as error:  # any refusal of the loader ends the round, after the peers were served
            log.exception("loading %s failed", bucket.label)
            return WeightSyncError(f"{bucket.label}: the model refused the weights: {type(error).__name__}: {error}")
        return None

    def _end_reload(self) -> list[str]:
        """Leave no layer waiting for weights: the next round must start from a clean slate. Returns what holds NaN."""
        reload, self._reload = self._reload, None
        return reload.finish(self.model_config) if reload is not None else []

    def finish_weight_update(self) -> None:
        """Raises `WeightSyncError` naming the parameters of which some element was not written."""
        if unwritten := self._end_reload():
            some = ", ".join(unwritten[:5]) + (f" and {len(unwritten) - 5} more" if len(unwritten) > 5 else "")
            raise WeightSyncError(
                f"after the load {some} holds NaN: the learner sent it, or the loader left it unwritten"
            )
        _refresh_packed_head(self.model, self.device)

    def shutdown(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None


def _refresh_packed_head(model: torch.nn.Module, device: torch.device) -> None:
    """Re-pack a tied output head on CPU.

    The head shares the embedding's Parameter but computes with a oneDNN-packed copy of it, and the layer-wise reload
    never visits it, because no checkpoint tensor names it: without this the logits keep the old embedding.
    TODO: remove when vLLM re-processes tied heads on reload (test_rollout_engine.py, whose model is tied, stays green
    without this function).
    """
    head: Any = getattr(model, "lm_head", None)
    if device.type != "cpu" or getattr(head, "quant_method", None) is None:
        return
    if hasattr(head, "cpu_linear"):
        head.quant_method.process_weights_after_loading(head)
    columns = torch.eye(_HEAD_COLUMNS, head.weight.shape[1], dtype=head.weight.dtype)
    if not torch.equal(head.quant_method.apply(head, columns), head.weight[:, :_HEAD_COLUMNS].T):  # 1 * w + 0 is exact
        raise WeightSyncError("the output head computes with other weights than it was given: its packed copy is stale")


class WorkerExtension:
    """Mixed into vLLM's worker, which also makes vLLM import this module in every worker process.

    Neither method raises. Where one of several workers does, vLLM leaves the answers of those behind it unread and
    takes them for answers to the next call; and no caller learns which workers have a session open.
    """

    def aster_attempt(self: Any, method: str, *args: Any) -> str:
        """What the worker's `method(*args)` raised, in words; "" = nothing."""
        try:
            getattr(self, method)(*args)
        except WeightSyncError as error:
            return str(error)
        except Exception as error:  # told to the engine, which raises it
            log.exception("%s failed", method)
            return f"{type(error).__name__}: {error}"
        return ""

    def aster_end_session(self: Any) -> None:
        """End the weight update that this worker has under way, if it has one: no two need be in the same state."""
        if self._weight_update_active and self.aster_attempt("finish_weight_update"):
            self._weight_update_active = False  # a layer that was not finished is filled by the next update


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, TransferEngine)
