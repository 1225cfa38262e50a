"""What the learner tests share: a tiny random Qwen3 on disk, recipes, samples, and plain transformers as the judge."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from transformers import Qwen3Config, Qwen3ForCausalLM

from actors.learner import Learner
from aster.algo.packing import denominators, pack
from aster.config import Recipe
from aster.types import MicroBatch, OptimStats, Sample, StepStats

VOCAB = 97


def write_model(path: Path, *, tied: bool = True, seed: int = 0, **config: Any) -> Path:
    """A random Qwen3 with a tokenizer stand-in (plain files), saved by transformers. 30k parameters by default."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            **{
                "vocab_size": VOCAB,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "max_position_embeddings": 512,
                "tie_word_embeddings": tied,
                "initializer_range": 0.2,  # with 0.02 every distribution is flat and every error is small
                **config,
            }
        )
    )
    model.save_pretrained(path)
    (path / "tokenizer.json").write_text("{}", "utf-8")
    (path / "chat_template.jinja").write_text("{{ messages }}", "utf-8")
    return path


def recipe(stage: str = "rl", **sections: dict[str, Any]) -> Recipe:
    """fp32, no recomputation, lr large enough to see; sections override."""
    base: dict[str, dict[str, Any]] = {
        "model": {"compute_dtype": "float32", "gradient_checkpointing": False},
        "optim": {"lr": 1e-2},
        "learner": {"step_timeout_s": 60},
        "rollout": {"prompts_per_step": 64, "dtype": "float32", "start_timeout_s": 240, "enforce_eager": True},
    }
    merged = {key: {**base.get(key, {}), **sections.get(key, {})} for key in {*base, *sections}}
    return Recipe.model_validate({"stage": stage, **merged})


def some_samples(n: int = 9, *, seed: int = 0, longest: int = 40, groups: int = 3) -> list[Sample]:
    """RL samples whose old and behaviour log-probs are near what a random model says, so that no clip binds always."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        length = int(rng.integers(3, longest))
        mask = rng.random(length) < 0.7
        mask[0] = False
        old = rng.normal(-4.5, 0.3, length).astype(np.float32)
        out.append(
            Sample(
                ids=rng.integers(0, VOCAB, length).astype(np.int32),
                mask=mask,
                advantage=float(rng.normal()),
                group=i % groups,
                behaviour_logprobs=old + rng.normal(0, 0.2, length).astype(np.float32),
                old_logprobs=old,
            )
        )
    return out


def accumulate(learner: Learner, samples: Sequence[Sample], *, row_tokens: int = 64, dp_size: int = 1) -> StepStats:
    """forward_backward over the mini-batch; with `dp_size` > 1 the rows of all ranks go through this one learner."""
    tokens, groups = denominators(samples)
    total = StepStats()
    for ranks in pack(samples, row_tokens=row_tokens, dp_size=dp_size):
        for row in ranks:
            total += learner.forward_backward(row, num_loss_tokens=tokens, num_groups=groups)
    return total


def train(learner: Learner, samples: Sequence[Sample], *, row_tokens: int = 64) -> tuple[StepStats, OptimStats]:
    stats = accumulate(learner, samples, row_tokens=row_tokens)
    return stats, learner.optim_step()


def gradients(learner: Learner) -> dict[str, np.ndarray]:
    """Full gradients by Hugging Face name."""
    return {n: _full(p.grad).cpu().numpy() for n, p in learner.model.parameters().items() if p.grad is not None}


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    """Full fp32 masters by Hugging Face name, copied."""
    return {n: _full(p.detach()).cpu().clone() for n, p in learner.model.parameters().items()}


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """Whole tensors by name (model.*, optim.*) out of a learner checkpoint, without a process group."""
    stored = dcp.FileSystemReader(str(path)).read_metadata().state_dict_metadata
    into = {name: torch.full(entry.size, torch.nan) for name, entry in stored.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch announces that one process reads alone
        dcp.load(into, checkpoint_id=str(path), no_dist=True)
    return into


def _full(tensor: Any) -> torch.Tensor:
    full: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def hf_log_probs(model: torch.nn.Module, sample: Sample, *, temperature: float = 1.0) -> torch.Tensor:
    """log pi(ids[t] | ids[:t]) for t >= 1, [S - 1], by plain transformers on the sequence alone."""
    ids = torch.tensor(sample.ids.astype(np.int64))[None]
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float() / temperature
    return logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]


@contextlib.contextmanager
def learner_on(path: Path, recipe: Recipe, *, total_steps: int = 100) -> Iterator[Learner]:
    learner = Learner(recipe, model_path=str(path), total_steps=total_steps)
    try:
        yield learner
    finally:
        learner.close()


def one_row(samples: Sequence[Sample], *, row_tokens: int = 100_000) -> MicroBatch:
    [[row]] = pack(samples, row_tokens=row_tokens, dp_size=1)
    return row


def relative_gap(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """Largest |a - b| / max|b| over the tensors."""
    assert ours.keys() == theirs.keys()
    return max(float(np.abs(ours[n] - theirs[n]).max() / (np.abs(theirs[n]).max() + 1e-12)) for n in ours)
