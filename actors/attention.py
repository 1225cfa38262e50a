"""Attention over a packed row: every segment attends causally to itself and to no other. Four kernels, one signature.

    sdpa    torch's scaled_dot_product_attention, one call per segment     anywhere, fp32 too; slow for many segments
    flash   the flash-attn package                                         CUDA, bf16
    varlen  torch.nn.attention.varlen, flash kernels without that package  CUDA, bf16
    flex    torch.nn.attention.flex_attention with a block mask            CUDA, fp32 too; no backward on a CPU

`auto` takes flash, else varlen, for bf16 on CUDA, and sdpa elsewhere. transformers calls `packed_attention`, registered
once under `PACKED`; its own sdpa path would see restarting position ids and build a dense R x R mask, whose cost grows
with the square of the row. What a kernel must know of the row is in `Packing`, which the model hands down to it.

Shape legend: R tokens of the row · Q query heads · K key and value heads · D size of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from actors.context_parallel import ContextParallel
from aster.errors import ConfigError

PACKED = "aster_packed"
_FLEX_BLOCK = 128


@dataclass(frozen=True, eq=False)
class Packing:
    """The whole row, as attention sees it. With context parallelism, still the whole row, not this rank's slice."""

    lengths: list[int]  # tokens of each segment; sums to R
    boundaries: torch.Tensor  # [segments + 1] int32 on the device, where segments begin and end
    kernel: str = "sdpa"
    context: ContextParallel | None = None
    _block_masks: dict[int | None, BlockMask] = field(default_factory=dict, repr=False)

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def block_mask(self, window: int | None) -> BlockMask:
        """For `flex`; made once per row, not once per layer."""
        if window not in self._block_masks:
            self._block_masks[window] = _block_mask(self.boundaries, sum(self.lengths), window=window)
        return self._block_masks[window]


def choose(attention: str, *, device: torch.device, dtype: torch.dtype) -> str:
    """The kernel that `model.attention` means here. Raises `ConfigError` where the one asked for cannot run."""
    half_on_cuda = device.type == "cuda" and dtype == torch.bfloat16
    if attention == "auto":
        if not half_on_cuda:
            return "sdpa"
        return "varlen" if _without_flash() else "flash"
    if attention in {"flash", "varlen"}:
        if not half_on_cuda:
            raise ConfigError(
                f"model.attention={attention} needs CUDA and model.compute_dtype=bfloat16, here they are {device.type} "
                f"and {str(dtype).removeprefix('torch.')}: use auto or sdpa"
            )
        if attention == "flash" and (problem := _without_flash()):
            raise ConfigError(
                f"model.attention=flash needs the flash-attn package ({problem}; uv pip install --no-build-isolation "
                "flash-attn): use varlen, torch's own, or auto"
            )
    if attention == "flex" and device.type != "cuda":
        raise ConfigError("model.attention=flex needs CUDA, since it has no backward pass on a CPU: use auto or sdpa")
    return attention


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packing: Packing,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, Q, r, D], key and value [1, K, r, D] -> [1, r, Q, D], r this rank's tokens of the row.

    The signature is transformers'. A mask is refused: the segments are the mask. So are capped scores and attention
    sinks, which no kernel here has.
    """
    if softcap is not None or s_aux is not None:
        raise ConfigError(
            f"{type(module).__name__} wants {f'softcap={softcap}' if softcap is not None else 's_aux (sinks)'}, which "
            "packed attention does not compute: dense decoders like Qwen's and Llama's are supported"
        )
    assert attention_mask is None, "packed rows carry no mask; the segments are the mask"
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if packing.context is not None:
        q, k, v = packing.context.to_heads(q, k, v)
    out = KERNELS[packing.kernel](q, k, v, packing, scale=scaling, window=sliding_window)
    if packing.context is not None:
        out = packing.context.to_tokens(out)
    return out[None], None


# kernels: q [R, Q, D], k and v [R, K, D] -> [R, Q, D]; `window`: at most so many tokens back, itself included ---------


def sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing, *, scale: float | None, window: int | None
) -> torch.Tensor:
    if window is not None and packing.longest > window:
        raise ConfigError(
            f"a sample of {packing.longest} tokens is longer than the model's sliding window of {window}, which "
            "model.attention=sdpa cannot do: use flash, varlen or flex on a GPU, or shorter samples"
        )
    grouped = q.shape[1] != k.shape[1]
    heads_first = (x.transpose(0, 1)[None].split(packing.lengths, dim=2) for x in (q, k, v))
    parts = [
        scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
        for query, key, value in zip(*heads_first, strict=True)
    ]
    return torch.cat([part[0].transpose(0, 1) for part in parts])


def flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing, *, scale: float | None, window: int | None
) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func

    out: torch.Tensor = flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=packing.boundaries,
        cu_seqlens_k=packing.boundaries,
        max_seqlen_q=packing.longest,
        max_seqlen_k=packing.longest,
        softmax_scale=scale,
        causal=True,
        window_size=_left_right(window),
    )
    return out


def varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing, *, scale: float | None, window: int | None
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        q,
        k,
        v,
        packing.boundaries,
        packing.boundaries,
        packing.longest,
        packing.longest,
        scale=scale,
        window_size=(-1, 0) if window is None else _left_right(window),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(out, torch.Tensor)
    return out


def flex(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing, *, scale: float | None, window: int | None
) -> torch.Tensor:
    out: torch.Tensor = _flex(q.device.type)(
        *(x.transpose(0, 1)[None] for x in (q, k, v)),
        block_mask=packing.block_mask(window),
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)


Kernel = Callable[..., torch.Tensor]
KERNELS: dict[str, Kernel] = {"sdpa": sdpa, "flash": flash, "varlen": varlen, "flex": flex}


# pieces -------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _without_flash() -> str:
    """Why the flash-attn package cannot be used; "" = it can. Imported, not only looked for: one that was built for
    another torch is there, and would fail in the first forward pass."""
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401 - whether it can be had is the question
    except ImportError as error:
        return str(error)
    return ""


def _left_right(window: int | None) -> tuple[int, int]:
    """What the flash kernels call a window: tokens to the left and to the right, itself not counted; -1 = no bound."""
    return (-1, -1) if window is None else (window - 1, 0)


@lru_cache(maxsize=2)
def _flex(device: str) -> Any:
    """Compiled on CUDA, once for rows of any length; on a CPU it is only ever asked for outputs, by tests."""
    return torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention


def _block_mask(boundaries: torch.Tensor, tokens: int, *, window: int | None) -> BlockMask:
    """Which 128 x 128 blocks of the row hold an allowed pair, and which hold nothing else.

    Made from the segment of each block's first and last token, so that no R x R mask is ever evaluated.
    """
    device = boundaries.device
    positions = torch.arange(tokens, device=device)
    segment_R = torch.searchsorted(boundaries[1:], positions, right=True)
    count = -(-tokens // _FLEX_BLOCK)
    first = torch.arange(count, device=device) * _FLEX_BLOCK
    last = (first + _FLEX_BLOCK - 1).clamp(max=tokens - 1)
    some = (segment_R[first][:, None] <= segment_R[last]) & (first[:, None] >= first)  # [query block, key block]
    whole = (segment_R[last][:, None] == segment_R[first]) & (first[:, None] > first)
    if window is not None:
        some &= first[:, None] - last < window
        whole &= last[:, None] - first < window

    def allowed(_b: Any, _h: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        near = (q >= k) & (segment_R[q] == segment_R[k])
        return near if window is None else near & (q - k < window)

    return BlockMask.from_kv_blocks(
        *_ordered(some & ~whole),
        *_ordered(whole),
        BLOCK_SIZE=_FLEX_BLOCK,
        mask_mod=allowed,
        seq_lengths=(tokens, tokens),
    )


def _ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(how many, which ones first) per query block, with batch and head dimensions, as BlockMask wants them."""
    counts = blocks.sum(-1, dtype=torch.int32)
    indices = blocks.int().argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return counts[None, None], indices[None, None]


AttentionInterface.register(PACKED, packed_attention)
