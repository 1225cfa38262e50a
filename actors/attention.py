"""Attention over a packed row, one segment at a time, for machines without flash-attn (every CPU, some GPUs).

transformers' own sdpa path sees restarting position ids and builds a dense R x R mask: cost grows with the square of
the row, and a mask forbids the fast kernels. Here every segment is its own causal call without a mask, so a row of
ten samples costs what the ten cost alone. Registered once under `SEGMENTED`; select it as `attn_implementation`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from aster.errors import ConfigError

SEGMENTED = "aster_segmented"


def segmented_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    segment_lengths: list[int],
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, heads, R, d], key and value [1, kv heads, R, d] -> [1, R, heads, d]. `segment_lengths` sums to R.

    The signature is transformers'. A mask or a sliding window is refused: this function knows causal segments only.
    """
    assert attention_mask is None, "packed rows carry no mask; the segments are the mask"
    if sliding_window is not None and max(segment_lengths) > sliding_window:
        raise ConfigError(
            f"a sample of {max(segment_lengths)} tokens is longer than the model's sliding window of {sliding_window}, "
            "which model.attention=sdpa cannot do: use model.attention=flash on a GPU, or shorter samples"
        )
    grouped = query.shape[1] != key.shape[1]
    parts = [
        scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=grouped)
        for q, k, v in zip(
            query.split(segment_lengths, dim=2),
            key.split(segment_lengths, dim=2),
            value.split(segment_lengths, dim=2),
            strict=True,
        )
    ]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(SEGMENTED, segmented_attention)
