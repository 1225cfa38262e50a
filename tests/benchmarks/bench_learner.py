"""Packed rows against padded batches, the log-prob head against full logits, weight sync against a raw broadcast.

Prints one JSON line.

    make bench-learner                                                   the quickstart's model, on this machine
    make bench-learner ARGS="--lengths FILE --row-tokens 8192"           samples of other lengths: [prompt, completion]
    make bench-learner ARGS="--size 0.6b --dtype bfloat16 --recompute"   one GPU

Three ways to the gradient of the same samples, one after the other in every round, each under the same budget of
places: our learner on packed rows; plain transformers with an attention mask on batches in the given order; the same
on batches sorted by length. `tokens_per_s` counts real tokens, `waste` is the share of places that hold padding,
`peak_mib` is what forward and backward need above the loaded models. The ratios under `targets` are medians over
rounds of ratios within a round. On a CPU seconds are process time: others may share the machine. Then, there alone,
`weight_sync` is what `make bench-weight-sync` prints, in seconds on the clock: it starts Ray and an engine, and takes a
minute more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

from learner_work import (
    SIZES,
    Cost,
    Head,
    PaddedLoop,
    cost,
    dense_peak,
    forward_flops,
    interleaved,
    lengths_of,
    mfu,
    padded_batches,
    qwen3,
    recipe,
    samples_of,
    waste,
    write_random_model,
)

from actors.fsdp import DTYPES
from actors.learner import Learner
from aster.algo.packing import denominators, pack

HEAD_VOCAB = 151_936
MIB = 2**20


def main() -> None:
    print(json.dumps(measure(parsed())))


def parsed(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="quickstart")
    parser.add_argument("--lengths", metavar="FILE", help="JSON; default: 64 lognormal samples, always the same")
    parser.add_argument("--samples", type=int, help="only the first so many")
    parser.add_argument("--row-tokens", type=int, default=4096, help="places of a row or a padded batch")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--attention", choices=["auto", "sdpa", "flash", "varlen", "flex"], default="auto")
    parser.add_argument("--recompute", action="store_true", help="gradient checkpointing, in all three")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--head-rows", type=int, default=3072, help="loss tokens of the comparison; 0 leaves it out")
    parser.add_argument("--head-hidden", type=int, default=64)
    parser.add_argument("--no-weight-sync", dest="weight_sync", action="store_false", help="no Ray, no engine")
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 peak of a device that is not in our table")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        config = qwen3(args.size)
        path = write_random_model(Path(folder), config)
        settings = recipe(dtype=args.dtype, attention=args.attention, recompute=args.recompute)
        learner = Learner(settings, model_path=str(path), total_steps=100)
        try:
            result = _measure(args, learner, path)
        finally:
            learner.close()
    on_cpu = learner.device.type == "cpu"
    return result | {"weight_sync": _weight_sync() if args.weight_sync and on_cpu else None}


def _weight_sync() -> dict[str, Any]:
    import bench_weight_sync  # brings Ray and vLLM, which the rest must not weigh

    return bench_weight_sync.measured(bench_weight_sync.parsed([]))


def _measure(args: argparse.Namespace, learner: Learner, path: Path) -> dict[str, Any]:
    config, device = qwen3(args.size), learner.device
    chunk_tokens = learner.recipe.learner.logprob_chunk_tokens
    samples = samples_of(lengths_of(args.lengths, count=args.samples), vocab=config.vocab_size)
    tokens, groups = denominators(samples)
    rows = [row for [row] in pack(samples, row_tokens=args.row_tokens, dp_size=1)]
    padded = padded_batches(samples, tokens=args.row_tokens, by_length=False)
    by_length = padded_batches(samples, tokens=args.row_tokens, by_length=True)
    plain = PaddedLoop(path, device=device, dtype=args.dtype, recompute=args.recompute, chunk_tokens=chunk_tokens)

    def through_rows() -> None:
        for row in rows:
            learner.forward_backward(row, num_loss_tokens=tokens, num_groups=groups)

    def through(batches: list[Any]) -> None:
        for batch in batches:
            plain.forward_backward(batch, num_loss_tokens=tokens)

    costs = interleaved(
        {"packed": through_rows, "padded": lambda: through(padded), "sorted": lambda: through(by_length)},
        device,
        rounds=args.rounds,
    )
    with cost(device) as step:
        learner.optim_step()
    with cost(device) as scores:
        for row in rows:
            learner.log_probs(row)
    total = sum(map(len, samples))
    seconds = statistics.median(c.seconds for c in costs["packed"]) + step.seconds
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    peak = args.peak_tflops * 1e12 if args.peak_tflops else dense_peak(name)
    flops = forward_flops(config, [len(s) for s in samples], loss_tokens=tokens)
    shapes = {"packed": (len(rows), 0.0)} | {
        kind: (len(batches), waste(batches)) for kind, batches in (("padded", padded), ("sorted", by_length))
    }
    result = {
        "size": args.size,
        "device": name,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
        "attention": learner.model.kernel,
        "recompute": args.recompute,
        "samples": len(samples),
        "tokens": total,
        "row_tokens": args.row_tokens,
        **{kind: _told(spent, total, *shapes[kind]) for kind, spent in costs.items()},
        "optim_step_s": round(step.seconds, 4),
        "log_probs_tokens_per_s": round(total / scores.seconds, 1),
        "gflop_per_s": round(3 * flops / seconds / 1e9, 1),
        "mfu": mfu(flops, seconds, peak=peak),
        "head": _head(args, device, chunk_tokens) if args.head_rows else None,
    }
    return result | {"targets": _targets(costs, result["head"])}


def _told(spent: list[Cost], tokens: int, batches: int, padding: float) -> dict[str, float]:
    return {
        "tokens_per_s": round(tokens / statistics.median(c.seconds for c in spent), 1),
        "peak_mib": round(statistics.median(c.peak_bytes for c in spent) / MIB, 1),
        "batches": batches,
        "waste": round(padding, 3),
    }


def _head(args: argparse.Namespace, device: torch.device, chunk_tokens: int) -> dict[str, Any]:
    head = Head(rows=args.head_rows, hidden=args.head_hidden, vocab=HEAD_VOCAB, device=device, dtype=DTYPES[args.dtype])
    works = {"ours": lambda: head.ours(chunk_tokens=chunk_tokens), "full": head.full}
    costs = interleaved(works, device, rounds=max(1, args.rounds // 2))
    ours, full = ({"s": _median(c, "seconds"), "mib": _median(c, "peak_bytes") / MIB} for c in costs.values())
    return {
        "rows": args.head_rows,
        "hidden": args.head_hidden,
        "vocab": HEAD_VOCAB,
        "chunk_tokens": chunk_tokens,
        "seconds": round(ours["s"], 3),
        "full_logits_seconds": round(full["s"], 3),
        "peak_mib": round(ours["mib"], 1),
        "full_logits_peak_mib": round(full["mib"], 1),
        "peak_ratio": round(ours["mib"] / full["mib"], 3),
    }


def _targets(costs: dict[str, list[Cost]], head: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    def faster_than(kind: str) -> float:
        pairs = zip(costs["packed"], costs[kind], strict=True)
        return round(statistics.median(other.seconds / ours.seconds for ours, other in pairs), 3)

    figures = {"packed_vs_padded": (faster_than("padded"), 1.3), "packed_vs_sorted": (faster_than("sorted"), 1.0)}
    out = {name: {"is": it, "must": f">= {bound:g}", "met": it >= bound} for name, (it, bound) in figures.items()}
    if head is not None:
        ratio = head["peak_ratio"]
        out["head_peak_vs_full_logits"] = {"is": ratio, "must": "<= 0.25", "met": ratio <= 0.25}
    return out


def _median(costs: list[Cost], field: str) -> float:
    return float(statistics.median(getattr(c, field) for c in costs))


if __name__ == "__main__":
    main()
