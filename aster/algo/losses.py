"""Token losses and their aggregation. Pure torch: no model, no config, no process group.

Shape legend: R positions of a packed row, or any selection of them.

Every aggregation is a sum over tokens of `weight * loss`, where the weight depends on the mini-batch alone, never on
the row or the rank that holds the token. So the sum over micro-batches and ranks is the loss of the mini-batch,
whatever the packing, the world size or the order:

    token       1 / (loss tokens of the mini-batch)
    group       1 / (loss tokens of the token's group  *  groups of the mini-batch)
    seq-mean    1 / (loss tokens of the token's sequence  *  sequences of the mini-batch)
    constant    1 / (a constant  *  sequences of the mini-batch)                                       (Dr.GRPO)

Only groups and sequences that have a loss token are counted.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch

from aster.types import MicroBatch

MAX_LOG_RATIO = 20.0  # exp() of a token that drifted far must not overflow; the reference's clamp

Aggregation = Literal["token", "group", "seq-mean", "constant"]


class TokenSums(NamedTuple):
    """Sums over the tokens under the mask; 0-d tensors without gradient. Names as in `StepStats`."""

    clipped: torch.Tensor
    clipped_lower: torch.Tensor
    kl: torch.Tensor
    tis: torch.Tensor
    tis_capped: torch.Tensor


def policy_loss(
    logprobs_R: torch.Tensor,
    *,
    old_R: torch.Tensor,
    behaviour_R: torch.Tensor,
    advantages_R: torch.Tensor,
    mask_R: torch.Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    tis_cap: float | None,
) -> tuple[torch.Tensor, TokenSums]:
    """Per-token loss of spec 1.1, 0 where the mask is off, and the token sums of its statistics.

        r = exp(clamp(logprobs - old, +-20))
        L = max(-A r, -A clip(r, 1 - low, 1 + high)),  then  min(L, -A dual_clip)  where A < 0
        loss = min(exp(old - behaviour), tis_cap) * L

    The importance weight corrects for the engine that sampled (other kernels, an older version); it carries no
    gradient, has no lower bound, and multiplies the already clipped loss. `tis_cap=None` leaves it out, and
    `behaviour_R` is then not read. Nothing is divided here: see `token_weights`.
    """
    mask = mask_R.to(torch.bool)
    zero = torch.zeros((), dtype=logprobs_R.dtype, device=logprobs_R.device)
    log_ratio = torch.where(mask, logprobs_R - old_R, zero).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    unclipped = -advantages_R * ratio
    clipped = -advantages_R * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    upper = torch.maximum(unclipped, clipped)
    ceiling = -advantages_R * dual_clip
    negative = advantages_R < 0
    loss = torch.where(negative, torch.minimum(upper, ceiling), upper)
    if tis_cap is None:
        weight = torch.ones_like(loss)
        capped = torch.zeros_like(mask)
    else:
        gap = torch.where(mask, old_R - behaviour_R, zero).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).detach()
        weight = gap.exp().clamp(max=tis_cap)
        capped = gap.exp() > tis_cap
    loss = torch.where(mask, weight * loss, zero)
    with torch.no_grad():
        sums = TokenSums(
            clipped=((clipped > unclipped) & mask).sum(),
            clipped_lower=((upper > ceiling) & negative & mask).sum(),
            kl=-log_ratio.sum(),
            tis=(weight * mask).sum(),
            tis_capped=(capped & mask).sum(),
        )
    return loss, sums


def sft_loss(logprobs_R: torch.Tensor, *, mask_R: torch.Tensor) -> torch.Tensor:
    """Per-token negative log-likelihood, 0 where the mask is off. Divided by `token_weights` like the policy loss."""
    return torch.where(mask_R.to(torch.bool), -logprobs_R, torch.zeros_like(logprobs_R))


def token_weights(
    microbatch: MicroBatch,
    *,
    aggregation: Aggregation,
    num_loss_tokens: int,
    num_groups: int,
    constant: int | None = None,
) -> np.ndarray:
    """Each position's share of the mini-batch loss, float64 [R], 0 where `loss_mask` is False (table above).

    `num_loss_tokens` and `num_groups` are those of the whole mini-batch. Which tokens share a group or sequence, and
    how many sequences there are, the packer wrote into the row (`group_loss_tokens`, `num_sequences`). Raises
    ValueError where a denominator is missing or zero although the row has loss tokens.
    """
    mask = microbatch.loss_mask
    if not mask.any():
        return np.zeros(len(mask))
    segments = microbatch.segment_ids
    if aggregation == "token":
        share = np.full(len(mask), _reciprocal(num_loss_tokens, "num_loss_tokens"))
    elif aggregation == "group":
        tokens = _per_segment(microbatch.group_loss_tokens, microbatch, "group_loss_tokens")
        share = _reciprocal(num_groups, "num_groups") / tokens[segments]
    elif aggregation == "seq-mean":
        tokens = np.bincount(segments, weights=mask)
        share = _reciprocal(microbatch.num_sequences, "num_sequences") / np.maximum(tokens, 1)[segments]
    elif aggregation == "constant":
        if not constant:
            raise ValueError("constant aggregation needs algo.aggregation_constant or a response budget")
        share = np.full(len(mask), _reciprocal(microbatch.num_sequences, "num_sequences") / constant)
    else:
        raise ValueError(f"unknown aggregation {aggregation!r}: use token, group, seq-mean or constant")
    return np.where(mask, share, 0.0)


def aggregate(loss_R: torch.Tensor, weights_R: torch.Tensor) -> torch.Tensor:
    """This row's part of the mini-batch loss: the weighted sum. Parts add up over micro-batches and ranks."""
    return (loss_R * weights_R).sum()


def _reciprocal(count: int, name: str) -> float:
    if count < 1:
        raise ValueError(f"{name}={count} but the row has loss tokens: pack() the whole mini-batch at once")
    return 1.0 / count


def _per_segment(values: tuple[int, ...], microbatch: MicroBatch, name: str) -> np.ndarray:
    if len(values) != len(microbatch.sample_index):
        raise ValueError(f"{name} has {len(values)} entries for {len(microbatch.sample_index)} segments: use pack()")
    return np.maximum(np.asarray(values, dtype=np.float64), 1.0)
