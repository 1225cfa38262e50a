"""Token losses and their aggregation. Pure torch: no model, no process group.

Shape legend: R positions of a packed row · N of them under the loss mask, of one row or several.

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

from aster.config import AlgoConfig
from aster.types import MicroBatch

MAX_LOG_RATIO = 20.0  # exp() of a token that drifted far must not overflow; the reference's clamp

Aggregation = Literal["token", "group", "seq-mean", "constant"]


class TokenSums(NamedTuple):
    """Sums over the tokens; 0-d tensors without gradient. Names as in `StepStats`."""

    clipped: torch.Tensor
    clipped_lower: torch.Tensor
    kl: torch.Tensor
    tis: torch.Tensor
    tis_capped: torch.Tensor


def policy_loss(
    logprobs_N: torch.Tensor,
    *,
    old_N: torch.Tensor,
    behaviour_N: torch.Tensor,
    advantages_N: torch.Tensor,
    algo: AlgoConfig,
    segments_N: torch.Tensor | None = None,
) -> tuple[torch.Tensor, TokenSums]:
    """Per-token loss and the token sums of its statistics.

        r = exp(clamp(logprobs - old, +-20))
        loss = importance(old - behaviour) * objective(r, advantage)

    The importance weight corrects for the engine that sampled (other kernels, an older version): it carries no
    gradient and multiplies the finished objective. `algo.tis_cap=None` leaves it out, and `behaviour_N` is then not
    read. `segments_N` (the sequence of each token) is read by GSPO only. Nothing is divided: see `token_weights`.
    """
    log_ratio = _log_ratio(logprobs_N, old_N)
    kl = -log_ratio.detach().sum()
    if algo.objective == "cispo":
        loss, clipped, lower = cispo(logprobs_N, log_ratio, advantages_N, clip_high=algo.clip_high)
    else:
        if algo.objective == "gspo":
            if segments_N is None:
                raise ValueError("algo.objective=gspo needs segments_N, the sequence of each token")
            log_ratio = sequence_log_ratio(log_ratio, segments_N)
        loss, clipped, lower = clipped_surrogate(
            log_ratio, advantages_N, clip_low=algo.clip_low, clip_high=algo.clip_high, dual_clip=algo.dual_clip
        )
    weight, capped = torch.ones_like(loss), torch.zeros_like(clipped)
    if algo.tis_cap is not None:
        gap = _log_ratio(old_N, behaviour_N).detach().exp()
        weight, capped = importance_weight(gap, cap=algo.tis_cap, floor=algo.tis_floor, outside=algo.tis_outside)
    sums = TokenSums(clipped=clipped.sum(), clipped_lower=lower.sum(), kl=kl, tis=weight.sum(), tis_capped=capped.sum())
    return weight * loss, sums


# objectives: (loss [N], where the clip binds [N], where the dual clip binds [N]) -------------------------------------


def clipped_surrogate(
    log_ratio_N: torch.Tensor, advantages_N: torch.Tensor, *, clip_low: float, clip_high: float, dual_clip: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """max(-A r, -A clip(r, 1 - low, 1 + high)), then min(., -A dual_clip) where A < 0 (PPO, arXiv 1707.06347;
    clip-higher, DAPO, arXiv 2503.14476; dual clip, arXiv 1912.09729)."""
    ratio = log_ratio_N.exp()
    unclipped = -advantages_N * ratio
    clipped = -advantages_N * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    upper = torch.maximum(unclipped, clipped)
    ceiling = -advantages_N * dual_clip
    negative = advantages_N < 0
    loss = torch.where(negative, torch.minimum(upper, ceiling), upper)
    return loss, clipped > unclipped, (upper > ceiling) & negative


def cispo(
    logprobs_N: torch.Tensor, log_ratio_N: torch.Tensor, advantages_N: torch.Tensor, *, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-sg(min(r, 1 + high)) A log pi (CISPO, MiniMax-M1, arXiv 2506.13585): the ratio is capped, and no token loses
    its gradient. Cap it well above 1, at several units: `clip_high` of PPO is too tight for it."""
    ratio = log_ratio_N.detach().exp()
    capped = ratio > 1.0 + clip_high
    loss = -ratio.clamp(max=1.0 + clip_high) * advantages_N * logprobs_N
    return loss, capped, torch.zeros_like(capped)


def sequence_log_ratio(log_ratio_N: torch.Tensor, segments_N: torch.Tensor) -> torch.Tensor:
    """The mean log ratio of each token's sequence, with the token's own gradient (GSPO, arXiv 2507.18071, eq. 14).

    In value it is GSPO's sequence ratio; with aggregation `seq-mean` the gradient is GSPO's too. Its clip ranges are
    two orders below PPO's (3e-4, 4e-4), since a mean over a sequence moves little.
    """
    count = int(segments_N.max()) + 1 if len(segments_N) else 0
    value = log_ratio_N.detach()
    zeros = torch.zeros(count, dtype=value.dtype, device=value.device)
    total = zeros.index_add(0, segments_N, value)
    tokens = zeros.index_add(0, segments_N, torch.ones_like(value))
    return (total / tokens)[segments_N] + log_ratio_N - value


# weights and penalties ------------------------------------------------------------------------------------------------


def importance_weight(
    ratio_N: torch.Tensor, *, cap: float, floor: float, outside: Literal["truncate", "mask"]
) -> tuple[torch.Tensor, torch.Tensor]:
    """pi_old / pi_behaviour brought into [floor, cap], and where it was outside.

    `truncate` takes the nearest bound (TIS with floor 0: the reference's); `mask` takes the token out of the gradient
    but leaves it in the denominator (masked importance sampling, IcePop, arXiv 2510.18855).
    """
    beyond = (ratio_N > cap) | (ratio_N < floor)
    if outside == "mask":
        return torch.where(beyond, torch.zeros_like(ratio_N), ratio_N), beyond
    return ratio_N.clamp(min=floor, max=cap), beyond


def kl_penalty(
    logprobs_N: torch.Tensor, reference_N: torch.Tensor, *, estimator: Literal["k1", "k2", "k3"]
) -> torch.Tensor:
    """An estimate of KL(pi || reference) per token, with gradient (Schulman, "Approximating KL divergence", 2020).

    d = reference - logprobs:  k1 = -d  ·  k2 = d^2 / 2  ·  k3 = exp(d) - 1 - d. As a loss, the gradient of k1 has mean
    zero whatever the distance: it is there for measuring. k2's is the gradient of the reverse KL.
    """
    gap = (reference_N - logprobs_N).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if estimator == "k1":
        return -gap
    if estimator == "k2":
        return gap.square() / 2
    return torch.expm1(gap) - gap


def _log_ratio(new_N: torch.Tensor, old_N: torch.Tensor) -> torch.Tensor:
    return (new_N - old_N).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


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


def aggregate(loss_N: torch.Tensor, weights_N: torch.Tensor) -> torch.Tensor:
    """This row's part of the mini-batch loss: the weighted sum. Parts add up over micro-batches and ranks."""
    return (loss_N * weights_N).sum()


def _reciprocal(count: int, name: str) -> float:
    if count < 1:
        raise ValueError(f"{name}={count} but the row has loss tokens: pack() the whole mini-batch at once")
    return 1.0 / count


def _per_segment(values: tuple[int, ...], microbatch: MicroBatch, name: str) -> np.ndarray:
    if len(values) != len(microbatch.sample_index):
        raise ValueError(f"{name} has {len(values)} entries for {len(microbatch.sample_index)} segments: use pack()")
    return np.maximum(np.asarray(values, dtype=np.float64), 1.0)
