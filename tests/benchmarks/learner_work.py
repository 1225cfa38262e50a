"""What the learner's benchmarks share: models, samples, padded batches, the head alone, clocks, peaks, MFU. No Ray.

A figure belongs to a round: everything that is compared runs once in each round, so all of it saw the same load.
"""

from __future__ import annotations

import ctypes
import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from actors.fsdp import DTYPES
from actors.log_probs import label_log_probs
from aster.config import Recipe
from aster.errors import DataError
from aster.types import Sample

SIZES: dict[str, dict[str, Any]] = {
    "quickstart": {"vocab_size": 384, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3,
                   "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
    "0.6b": {"vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
             "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128},
    "4b": {"vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
           "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
}  # fmt: skip
DENSE_BF16 = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "B200": 2250e12,
}
"""FLOP/s of a device by a part of its name, first match; NVIDIA's data sheets, without sparsity."""


def write_random_model(path: Path, config: Qwen3Config) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return path


def qwen3(size: str) -> Qwen3Config:
    return Qwen3Config(**SIZES[size], tie_word_embeddings=True, max_position_embeddings=1 << 17)


def recipe(*, dtype: str, attention: str = "auto", recompute: bool = False, **learner: Any) -> Recipe:
    model = {"compute_dtype": dtype, "gradient_checkpointing": recompute, "attention": attention}
    rollout = {"prompts_per_step": 64, "enforce_eager": True}
    return Recipe.model_validate({"stage": "rl", "model": model, "rollout": rollout, "learner": learner})


# samples -------------------------------------------------------------------------------------------------------------


def lengths_of(file: str | None, *, count: int | None) -> list[tuple[int, int]]:
    """(prompt, completion) tokens of each sample: `lengths` of a JSON file, or 64 seeded lognormal ones."""
    if file is None:
        rng = np.random.default_rng(0)
        prompts = np.clip(rng.lognormal(np.log(64), 0.4, 64), 16, 256).astype(int)
        completions = np.clip(rng.lognormal(np.log(160), 0.8, 64), 8, 1024).astype(int)
        return list(zip(prompts.tolist(), completions.tolist(), strict=True))[:count]
    content = json.loads(Path(file).read_text("utf-8"))
    pairs = content.get("lengths") if isinstance(content, dict) else content
    if not isinstance(pairs, list) or not all(isinstance(p, list) and len(p) == 2 for p in pairs):
        raise DataError(f"{file} must hold a list `lengths` of [prompt tokens, completion tokens]")
    return [(int(prompt), int(completion)) for prompt, completion in pairs][:count]


def samples_of(lengths: Sequence[tuple[int, int]], *, vocab: int) -> list[Sample]:
    """Random ids; the completion is trained on, with log-probs near what a random model says."""
    rng = np.random.default_rng(1)
    samples = []
    for prompt, completion in lengths:
        n = prompt + completion
        old = rng.normal(-np.log(vocab), 0.1, n).astype(np.float32)
        ids = rng.integers(0, vocab, n).astype(np.int32)
        samples.append(Sample(ids, np.arange(n) >= prompt, 1.0, 0, old, old))
    return samples


def padded_batches(samples: Sequence[Sample], *, tokens: int, by_length: bool) -> list[list[Sample]]:
    """Batches of at most `tokens` places, padding included (one sample at least), in the order given or by length."""
    order = sorted(samples, key=len, reverse=True) if by_length else list(samples)
    batches: list[list[Sample]] = [[]]
    for sample in order:
        longest = max(len(sample), *(len(s) for s in batches[-1]), 0)
        if batches[-1] and longest * (len(batches[-1]) + 1) > tokens:
            batches.append([])
        batches[-1].append(sample)
    return batches


def waste(batches: Sequence[Sequence[Sample]]) -> float:
    """Share of places that hold padding.

    >>> two = [Sample(np.zeros(n, np.int32), np.ones(n, bool)) for n in (4, 1)]
    >>> waste([two])
    0.375
    """
    places = sum(len(b) * max(map(len, b)) for b in batches)
    return 1 - sum(len(s) for b in batches for s in b) / places


class PaddedLoop:
    """Plain transformers on padded batches, without FSDP, with our head on the loss tokens: padding is all it loses."""

    def __init__(self, path: Path, *, device: torch.device, dtype: str, recompute: bool, chunk_tokens: int) -> None:
        hf = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
        self.model: Any = hf.to(device)
        self.model.train()
        if recompute:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.device, self.bf16, self.chunk_tokens = device, DTYPES[dtype] == torch.bfloat16, chunk_tokens

    def forward_backward(self, batch: Sequence[Sample], *, num_loss_tokens: int) -> float:
        longest = max(map(len, batch))
        ids, here, labelled = (np.zeros((len(batch), longest), dtype) for dtype in (np.int64, np.int64, bool))
        for index, sample in enumerate(batch):
            ids[index, : len(sample)] = sample.ids
            here[index, : len(sample)] = 1
            labelled[index, : len(sample) - 1] = sample.mask[1:]
        at = torch.tensor(np.flatnonzero(labelled), device=self.device)
        labels = torch.tensor(np.roll(ids, -1, axis=1).ravel(), device=self.device)[at]
        inputs, mask = (torch.tensor(x, device=self.device) for x in (ids, here))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            hidden = self.model.base_model(input_ids=inputs, attention_mask=mask, use_cache=False).last_hidden_state
            logprobs, _ = label_log_probs(
                hidden.flatten(0, 1)[at], labels, self.model.lm_head, temperature=1.0, chunk_tokens=self.chunk_tokens
            )
        loss = -logprobs.sum() / num_loss_tokens
        loss.backward()
        return float(loss.detach())


# the head alone ------------------------------------------------------------------------------------------------------


class Head:
    """lm_head, log-probs and backward of `rows` positions: ours in chunks, or with all logits at once."""

    def __init__(self, *, rows: int, hidden: int, vocab: int, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(hidden, vocab, bias=False, device=device, dtype=dtype)
        self.linear.weight.grad = torch.zeros_like(self.linear.weight)  # part of the loaded model
        self.hidden = torch.randn(rows, hidden, device=device, dtype=dtype)
        self.labels = torch.randint(0, vocab, (rows,), device=device)

    def ours(self, *, chunk_tokens: int) -> torch.Tensor:
        hidden = self.hidden.clone().requires_grad_()
        logprobs, _ = label_log_probs(hidden, self.labels, self.linear, temperature=1.0, chunk_tokens=chunk_tokens)
        logprobs.sum().backward()
        return logprobs.detach()

    def full(self) -> torch.Tensor:
        hidden = self.hidden.clone().requires_grad_()
        logits = self.linear(hidden).float()
        logprobs = logits.log_softmax(-1).gather(1, self.labels[:, None])[:, 0]
        logprobs.sum().backward()
        return logprobs.detach()


# clocks, peaks, FLOPs ------------------------------------------------------------------------------------------------


@dataclass
class Cost:
    """Of one piece of work: seconds (wall time on CUDA, process time on a CPU that others share) and peak bytes."""

    seconds: float = 0.0
    peak_bytes: int = 0  # above what was held before it


@contextmanager
def cost(device: torch.device) -> Iterator[Cost]:
    """Fills in what it yields when the body is done."""
    out = Cost()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held, clock = torch.cuda.memory_allocated(), time.perf_counter
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what glibc keeps of freed memory would hide a peak below it
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again at the present size
        held, clock = _status("VmRSS"), time.process_time
    began = clock()
    yield out
    if device.type == "cuda":
        torch.cuda.synchronize()
    out.seconds = clock() - began
    out.peak_bytes = (torch.cuda.max_memory_allocated() if device.type == "cuda" else _status("VmHWM")) - held


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {field}")


def interleaved(works: dict[str, Callable[[], Any]], device: torch.device, *, rounds: int) -> dict[str, list[Cost]]:
    """Each piece of work once per round, in turns, after one round that does not count."""
    costs: dict[str, list[Cost]] = {name: [] for name in works}
    gc.collect()
    for number in range(rounds + 1):
        for name, work in works.items():
            with cost(device) as spent:
                work()
            if number:
                costs[name].append(spent)
    return costs


def forward_flops(config: Qwen3Config, lengths: Sequence[int], *, loss_tokens: int) -> float:
    """Of the model over these samples: projections, the causal half of attention, the head where the mask is on.

    A layer multiplies each token with its weights (2 FLOPs per weight); attention takes 2 x 2 x n^2 / 2 per unit of
    width (scores and their sum with the values, half of the square).
    """
    width, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    h = config.hidden_size
    weights = h * width + 2 * h * kv + width * h + 3 * h * config.intermediate_size
    layer = sum(2.0 * n * weights + 2.0 * n * n * width for n in lengths)
    return config.num_hidden_layers * layer + 2.0 * loss_tokens * h * config.vocab_size


def mfu(flops_forward: float, seconds: float, *, peak: float | None) -> float | None:
    """3 x the forward pass / time / the device's dense bf16 peak; None where the device is not in the table."""
    return None if peak is None else 3 * flops_forward / seconds / peak


def dense_peak(name: str) -> float | None:
    return next((peak for part, peak in DENSE_BF16.items() if part in name), None)
