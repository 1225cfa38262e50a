"""How fast one learner rank trains, against a plain torch loop on the same packed rows. Prints one JSON line.

    python tests/benchmarks/bench_learner.py                       the CPU recipes' model (0.6M parameters, fp32)
    python tests/benchmarks/bench_learner.py --size 0.6b --tokens 16384 --dtype bfloat16      one GPU

`tokens_per_s` counts every token of the row through forward_backward; `plain_tokens_per_s` the same forward, cross
entropy and backward without FSDP, chunking, entropy and statistics (fp32 or autocast, same attention, no
recomputation unless asked for). Medians of wall time on CUDA, of process time on a CPU that others may share.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from actors.attention import PACKED, Packing, choose
from actors.fsdp import DTYPES
from actors.learner import Learner
from aster.algo.packing import denominators, pack
from aster.config import Recipe
from aster.types import MicroBatch, Sample

SIZES: dict[str, dict[str, Any]] = {
    "quickstart": {"vocab_size": 384, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3,
                   "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
    "0.6b": {"vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
             "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128},
    "4b": {"vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
           "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="quickstart")
    parser.add_argument("--tokens", type=int, default=1500, help="tokens of the packed row")
    parser.add_argument("--mean-length", type=int, default=160, help="tokens of a sample, lognormal")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--attention", choices=["auto", "sdpa", "flash", "varlen", "flex"], default="auto")
    parser.add_argument("--recompute", action="store_true", help="gradient checkpointing, in both loops")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--no-plain", action="store_true", help="leave the plain loop out (it keeps all logits)")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as path:
        config = Qwen3Config(**SIZES[args.size], tie_word_embeddings=True, max_position_embeddings=1 << 17)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
        recipe = Recipe.model_validate(
            {
                "stage": "rl",
                "model": {
                    "compute_dtype": args.dtype,
                    "gradient_checkpointing": args.recompute,
                    "attention": args.attention,
                },
                "rollout": {"prompts_per_step": 64, "enforce_eager": True},
            }
        )
        learner = Learner(recipe, model_path=path, total_steps=100)
        row, tokens = rows_of(args.tokens, args.mean_length, config.vocab_size)
        result = {
            "size": args.size,
            "device": torch.cuda.get_device_name() if learner.device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "dtype": args.dtype,
            "attention": learner.model.kernel,
            "recompute": args.recompute,
            "row_tokens": len(row.input_ids),
            "segments": len(row.sample_index),
            "parameters": sum(p.numel() for p in learner.model.parameters().values()),
        }
        seconds, peak = timed(
            lambda: learner.forward_backward(row, num_loss_tokens=tokens, num_groups=1), learner.device, args.repeats
        )
        result["tokens_per_s"] = round(len(row.input_ids) / seconds, 1)
        result["peak_gib"] = peak
        result["optim_step_s"] = round(learner.optim_step().seconds, 4)
        result["log_probs_tokens_per_s"] = round(
            len(row.input_ids) / timed(lambda: learner.log_probs(row), learner.device, args.repeats)[0], 1
        )
        learner.close()
        if not args.no_plain:
            del learner
            seconds, peak = timed(plain_loop(path, row, args), _device(), args.repeats)
            result["plain_tokens_per_s"] = round(len(row.input_ids) / seconds, 1)
            result["plain_peak_gib"] = peak
            result["ratio"] = round(result["tokens_per_s"] / result["plain_tokens_per_s"], 3)
    print(json.dumps(result))


def rows_of(tokens: int, mean_length: int, vocab: int) -> tuple[MicroBatch, int]:
    """One row of about `tokens` tokens and its loss tokens; lengths lognormal, 60 % of the tokens trained on."""
    rng = np.random.default_rng(0)
    samples: list[Sample] = []
    left = tokens
    while left > 8:
        n = int(min(left, max(8, rng.lognormal(np.log(mean_length), 0.35))))
        mask = rng.random(n) < 0.6
        old = rng.normal(-5.0, 0.5, n).astype(np.float32)
        samples.append(Sample(rng.integers(0, vocab, n).astype(np.int32), mask, 1.0, 0, old, old))
        left -= n
    [[row]] = pack(samples, row_tokens=tokens, dp_size=1)
    return row, denominators(samples)[0]


def plain_loop(path: str, row: MicroBatch, args: argparse.Namespace) -> Callable[[], None]:
    device = _device()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=PACKED).to(device)
    model.train()
    if args.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.tensor(row.input_ids, device=device)[None]
    positions = torch.tensor(row.position_ids, device=device)[None]
    labels = torch.tensor(np.where(row.loss_mask, row.labels, -100), device=device)
    packing = Packing(
        lengths=np.diff(row.cu_seqlens).tolist(),
        boundaries=torch.tensor(row.cu_seqlens, device=device),
        kernel=choose(args.attention, device=device, dtype=DTYPES[args.dtype]),
    )

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            out = model.base_model(input_ids=ids, position_ids=positions, use_cache=False, packing=packing)
            logits = model.lm_head(out.last_hidden_state)[0]
        torch.nn.functional.cross_entropy(logits.float(), labels).backward()

    return step


def timed(step: Callable[[], Any], device: torch.device, repeats: int) -> tuple[float, float | None]:
    """Median seconds of `step` after two warm-up calls, and the peak GiB on CUDA."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    for _ in range(2):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        _wait(device)
        began = clock()
        step()
        _wait(device)
        seconds.append(clock() - began)
    peak = round(torch.cuda.max_memory_allocated() / 2**30, 2) if device.type == "cuda" else None
    return statistics.median(seconds), peak


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
