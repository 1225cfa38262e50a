"""The loss of each token under the mask, as the recipe's stage and algorithm ask for it, with the sums to report.

What stands between a micro-batch (numpy, log-probs that may be absent) and the formulas of `aster.algo.losses`
(tensors, complete). The denominators are the learner's business.

Shape legend: N tokens of a packed row, those under the loss mask.
"""

from __future__ import annotations

import numpy as np
import torch

from aster.algo.losses import kl_penalty, policy_loss
from aster.config import Recipe
from aster.types import MicroBatch

SUMS = 6  # beside loss and entropy: the five of `TokenSums` and the KL estimate against the reference model


def token_losses(
    recipe: Recipe, logprobs_N: torch.Tensor, microbatch: MicroBatch
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Losses [N] and `SUMS` scalars without gradient.

    Stage `rl`: the clipped policy loss and the KL penalty; `sft`: -log pi.

    Raises `ValueError` when a log-prob that the algorithm needs was not recorded or not recomputed.
    """
    mask = microbatch.loss_mask
    nothing = torch.zeros((), device=logprobs_N.device)
    if recipe.stage == "sft":
        return -logprobs_N, (nothing,) * SUMS
    algo = recipe.algo
    old, behaviour = _old_and_behaviour(microbatch, proximal=algo.proximal_pass, tis=algo.tis_cap is not None)

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.tensor(array, device=logprobs_N.device)

    losses, sums = policy_loss(
        logprobs_N,
        old_N=tensor(old),
        behaviour_N=tensor(behaviour),
        advantages_N=tensor(microbatch.advantages[mask]),
        segments_N=tensor(microbatch.segment_ids[mask].astype(np.int64)),
        algo=algo,
    )
    if algo.kl_coef == 0.0:
        return losses, (*sums, nothing)
    reference = microbatch.reference_logprobs[mask]
    if not np.isfinite(reference).all():
        raise ValueError("loss tokens have no reference log-probs: run log_probs(reference=True) over the batch")
    kl = kl_penalty(logprobs_N, tensor(reference), estimator=algo.kl_estimator)
    return losses + algo.kl_coef * kl, (*sums, kl.detach().sum())


def _old_and_behaviour(microbatch: MicroBatch, *, proximal: bool, tis: bool) -> tuple[np.ndarray, np.ndarray]:
    """Under the mask, [N] each. Without a proximal pass pi_old is the behaviour policy; with one, absence raises."""
    mask = microbatch.loss_mask
    old, behaviour = microbatch.old_logprobs[mask], microbatch.behaviour_logprobs[mask]
    absent = np.isnan(old)
    if absent.any():
        if proximal:
            raise ValueError(
                f"{int(absent.sum())} of {len(old)} loss tokens have no old_logprobs: run log_probs() over the batch "
                "before the first update, or set algo.proximal_pass=false"
            )
        old = np.where(absent, behaviour, old)
    needed = behaviour if tis else old
    if not np.isfinite(needed).all() or not np.isfinite(old).all():
        raise ValueError("behaviour or old log-probs of loss tokens are not finite: the rollout did not record them")
    return old, behaviour
