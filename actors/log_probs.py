"""The log-prob head: log-probs of labels and entropies from hidden states, a few rows of logits at a time.

Shape legend: N positions under the loss mask · V vocabulary · H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

Project = Callable[[torch.Tensor], torch.Tensor]


def label_log_probs(
    hidden_NH: torch.Tensor,
    labels_N: torch.Tensor,
    head: nn.Linear,
    *,
    temperature: float,
    chunk_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the labels and entropies, [N] fp32 each, with logits of at most `chunk_tokens` rows alive at once.

    More than one chunk: each is recomputed in the backward pass instead of being kept. Entropy has no gradient; it
    comes after the loss inside a chunk, so that the recomputation, which stops at the last saved tensor, skips it.
    Of `head` weight and bias are read, here and not in the chunks; it is never called.
    """
    pieces = list(zip(hidden_NH.split(chunk_tokens), labels_N.split(chunk_tokens), strict=True))
    at_once = len(pieces) == 1 or not torch.is_grad_enabled()
    project = _projection(head, summed=not at_once)

    def chunk(hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = project(hidden).float()
        if temperature != 1.0:
            logits = logits / temperature
        all_logprobs = logits.log_softmax(-1)
        del logits  # else it would stay alive beside its log-softmax
        logprobs = -nn.functional.nll_loss(all_logprobs, labels, reduction="none")
        with torch.no_grad():
            entropy = -torch.bmm(all_logprobs.exp()[:, None], all_logprobs[:, :, None])[:, 0, 0]  # no [rows, V] product
        return logprobs, entropy

    if at_once:
        outs = [chunk(h, y) for h, y in pieces]
    else:
        outs = [checkpoint(chunk, h, y, use_reentrant=False, preserve_rng_state=False) for h, y in pieces]
    return torch.cat([logprobs for logprobs, _ in outs]), torch.cat([entropy for _, entropy in outs])


def _projection(head: nn.Linear, *, summed: bool) -> Project:
    """Hidden states to logits. `summed`: called once per chunk, with one gradient of the weight for all of them."""
    weight, bias = head.weight, head.bias
    if not summed or not weight.requires_grad or weight.dtype == torch.float32:
        return lambda hidden: linear(hidden, weight, bias)
    gradient = _Gradient()
    anchor = _Anchor.apply(weight, gradient)
    bias_fp32 = None if bias is None else bias.float()
    return lambda hidden: _Product.apply(hidden, anchor, bias_fp32, weight.detach(), gradient)


# Autograd would add the chunks' gradients of a bf16 weight in bf16: 144 of them to an error of 1.4 %, one has 0.24 %.


@dataclass
class _Gradient:
    """Of the weight, over the chunks whose backward pass is done: fp32 [V, H]."""

    total: torch.Tensor | None = None

    def add(self, part: torch.Tensor) -> None:
        if self.total is None:
            self.total = part.float()
        else:
            self.total += part


class _Anchor(torch.autograd.Function):
    """A zero that every chunk depends on, so that its backward comes after all of theirs and hands over their sum.

    The chunks do not hold the weight itself: ZeRO-3 takes its memory away in between.
    """

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, gradient: _Gradient) -> torch.Tensor:
        ctx.gradient, ctx.dtype = gradient, weight.dtype
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _zero: torch.Tensor) -> tuple[torch.Tensor, None]:
        total, ctx.gradient.total = ctx.gradient.total, None
        return total.to(ctx.dtype), None


class _Product(torch.autograd.Function):
    """`linear`, whose gradient of the weight goes into `gradient`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        anchor: torch.Tensor,
        bias_fp32: torch.Tensor | None,
        weight: torch.Tensor,
        gradient: _Gradient,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, anchor, weight)
        ctx.gradient = gradient
        return linear(hidden, weight, None if bias_fp32 is None else bias_fp32.to(weight.dtype))

    @staticmethod
    def backward(ctx: Any, logits: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, anchor, weight = ctx.saved_tensors
        ctx.gradient.add(logits.T @ hidden)
        bias = logits.sum(0, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        return logits @ weight, torch.zeros_like(anchor), bias, None, None
