"""AdamW on fp32 shards: made with its state, one clipped step, the learning rate of a step. torch's, not ours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from aster.algo.schedule import learning_rate, warmup_length
from aster.config import OptimConfig
from aster.errors import AsterError

MOMENTS = ("exp_avg", "exp_avg_sq")


def adamw(parameters: Sequence[nn.Parameter], optim: OptimConfig) -> torch.optim.AdamW:
    """With its state made now: memory is honest from the start and loading a checkpoint has a target."""
    optimizer = torch.optim.AdamW(
        parameters,
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        fused=True,
    )
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            **{moment: torch.zeros_like(parameter, requires_grad=False) for moment in MOMENTS},
        }
    return optimizer


def clipped_step(optimizer: torch.optim.AdamW, parameters: Sequence[nn.Parameter], *, max_grad_norm: float) -> float:
    """Clip by global norm, step, forget the gradients; a collective. Returns the norm before clipping.

    A norm that is not finite changes neither weights nor moments. Raises `AsterError` when there is no gradient.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        raise AsterError("optim_step() without forward_backward(): there is no gradient")
    total = get_total_norm(gradients)
    norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
    if np.isfinite(norm):
        clip_grads_with_norm_(parameters, max_grad_norm, torch.tensor(norm, device=parameters[0].device))
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def set_learning_rate(optimizer: torch.optim.Optimizer, optim: OptimConfig, *, step: int, total_steps: int) -> float:
    """That of optimizer step `step`, counted from 0, in a run of `total_steps`; returned for the metrics."""
    lr = learning_rate(
        step,
        lr=optim.lr,
        min_lr=optim.min_lr or 0.0,
        schedule=optim.schedule,
        warmup=warmup_length(total_steps=total_steps, warmup_ratio=optim.warmup_ratio, warmup_steps=optim.warmup_steps),
        total_steps=total_steps,
    )
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr
