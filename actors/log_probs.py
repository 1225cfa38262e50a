"""The log-prob head: log-probs of labels and entropies from hidden states, a few rows of logits at a time.

Shape legend: N positions under the loss mask · V vocabulary · H hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def label_log_probs(
    hidden_NH: torch.Tensor,
    labels_N: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    *,
    temperature: float,
    chunk_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the labels and entropies, [N] fp32 each, with logits of at most `chunk_tokens` rows alive at once.

    More than one chunk: each is recomputed in the backward pass instead of being kept. Entropy has no gradient; it
    comes after the loss inside a chunk, so that the recomputation, which stops at the last saved tensor, skips it.
    """

    def chunk(hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = head(hidden).float()
        if temperature != 1.0:
            logits = logits / temperature
        all_logprobs = logits.log_softmax(-1)
        del logits  # else it would stay alive beside its log-softmax
        logprobs = -nn.functional.nll_loss(all_logprobs, labels, reduction="none")
        with torch.no_grad():
            entropy = -torch.bmm(all_logprobs.exp()[:, None], all_logprobs[:, :, None])[:, 0, 0]  # no [rows, V] product
        return logprobs, entropy

    pieces = list(zip(hidden_NH.split(chunk_tokens), labels_N.split(chunk_tokens), strict=True))
    if len(pieces) == 1 or not torch.is_grad_enabled():
        outs = [chunk(h, y) for h, y in pieces]
    else:
        outs = [checkpoint(chunk, h, y, use_reentrant=False, preserve_rng_state=False) for h, y in pieces]
    return torch.cat([logprobs for logprobs, _ in outs]), torch.cat([entropy for _, entropy in outs])
