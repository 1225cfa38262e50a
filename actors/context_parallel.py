"""Context parallelism: the c ranks of a group share one row, each R/c tokens of it (Ulysses, arXiv 2309.14509).

    tokens  0 .. R/c     R/c .. 2R/c                    heads  0 .. Q/c     Q/c .. Q
            rank 0       rank 1       --all-to-all-->          rank 0       rank 1       attention over whole segments
            all heads    all heads    <--all-to-all--          all tokens   all tokens

Everything but attention works token by token, so it runs on the slice alone: a row of R tokens costs each rank the
activations of R/c. Segments may straddle the cuts. Ranks c*i .. c*i + c - 1 form group i and are given the same row.

The log-probs are put together again (`gather`, R numbers), and every rank of the group takes the same loss over the
whole row. Its gradient flows back into the rank's own slice only, so that the gradients of the ranks add up to that of
the row once: FSDP's mean over all ranks times the world size is right with or without context parallelism.

Shape legend: R tokens of the row, padded to a multiple of c · r = R/c · Q query heads · K key and value heads · D size
of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from math import lcm
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from aster.errors import ConfigError
from aster.types import MicroBatch


@dataclass(frozen=True)
class RowSlice:
    """What one rank feeds to the model."""

    input_ids: np.ndarray  # [r] int64
    position_ids: np.ndarray  # [r] int64
    labels: np.ndarray  # [r] int64
    loss_mask: np.ndarray  # [r] bool
    boundaries: np.ndarray  # [segments + 1] int32, of the whole padded row


def slice_row(row: MicroBatch, *, rank: int, size: int) -> RowSlice:
    """Part `rank` of `size` equal parts; the row is padded by a segment of its own without loss.

    Labels are shifted over the whole row before the cut: the last token of a part predicts the first of the next.
    """
    padding = -len(row.input_ids) % size
    part = slice(rank * (len(row.input_ids) + padding) // size, (rank + 1) * (len(row.input_ids) + padding) // size)
    boundaries = row.cu_seqlens
    if padding:
        boundaries = np.append(boundaries, np.int32(len(row.input_ids) + padding))
    return RowSlice(
        input_ids=np.pad(row.input_ids, (0, padding))[part],
        position_ids=np.append(row.position_ids, np.arange(padding, dtype=row.position_ids.dtype))[part],
        labels=np.pad(row.labels, (0, padding))[part],
        loss_mask=np.pad(row.loss_mask, (0, padding))[part],
        boundaries=boundaries,
    )


class ContextParallel:
    """This rank's place in its group of `size`, and the exchanges with the others."""

    def __init__(self, *, size: int, timeout_s: float) -> None:
        """A collective over all ranks of the default process group."""
        self.size = size
        self.rank = dist.get_rank() % size
        self._group, _ = dist.new_subgroups(size, timeout=timedelta(seconds=timeout_s))

    def check_heads(self, query_heads: int) -> None:
        if query_heads % self.size:
            raise ConfigError(
                f"learner.context_parallel={self.size} does not divide the model's {query_heads} attention heads: "
                f"use a divisor of {query_heads}"
            )

    def to_heads(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[r, Q, D], [r, K, D], [r, K, D] of all heads -> [R, Q/c, D], [R, K', D], [R, K', D] of this rank's heads.

        Where c does not divide K, key and value heads are repeated until it does; autograd adds their gradients up.
        """
        repeat = lcm(k.shape[1], self.size) // k.shape[1]
        if repeat > 1:
            k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
        by_rank = [x.unflatten(1, (self.size, -1)) for x in (q, k, v)]  # [r, c, heads / c, D]
        widths = [x.shape[2] for x in by_rank]
        sent = torch.cat(by_rank, dim=2).transpose(0, 1)  # [c, r, all three, D]: one exchange for the three
        q, k, v = self._all_to_all(sent).flatten(0, 1).split(widths, dim=1)
        return q, k, v

    def to_tokens(self, out: torch.Tensor) -> torch.Tensor:
        """[R, Q/c, D] of this rank's heads -> [r, Q, D] of this rank's tokens."""
        received = self._all_to_all(out.unflatten(0, (self.size, -1)))  # [c, r, Q/c, D]
        return received.transpose(0, 1).flatten(1, 2)

    def gather(self, values_r: torch.Tensor) -> torch.Tensor:
        """The whole row's values [R], the same on every rank; the gradient is that of this rank's own part."""
        out: torch.Tensor = _Gather.apply(values_r, self._group, self.rank)
        return out

    def _all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = _AllToAll.apply(x, self._group)
        return out


class _AllToAll(torch.autograd.Function):
    """Slab i of [c, ...] goes to rank i, slab i of the result came from rank i: its own transpose."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _exchange(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _exchange(grads[0], ctx.group), None


def _exchange(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=group)
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup, rank: int) -> torch.Tensor:
        ctx.part = slice(rank * len(x), (rank + 1) * len(x))
        out = x.new_empty(len(x) * dist.get_world_size(group))
        dist.all_gather_single(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grads[0][ctx.part], None, None
