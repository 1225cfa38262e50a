"""The learner on one CUDA device, with torch, triton and transformers at hand; no Ray, no vLLM. Prints one JSON line.

    make bench-gpu                                        every part, a Qwen3-4B-shaped random model
    make bench-gpu ARGS="--parts step head --size 0.6b"   some of them, a smaller model

    step           forward, backward and AdamW at 4K, 16K and 32K tokens: tokens/s, MFU, peak, the head's share
    attention      forward and backward of each varlen kernel that can run here
    head           log-probs in chunks against full logits: seconds and peak memory
    precision      bf16 against fp32: distance of log-probs, tokens/s
    checkpointing  recomputed layers, offloaded masters: tokens/s and peak memory
    sync           a checkpoint's bytes over NCCL with world size 1, and over CUDA IPC into another process

MFU is 3 x the forward pass's FLOPs (causal half of attention, the head where the mask is on, recomputation not
counted) over the device's dense bf16 peak; optimizer step included, median of 10 after one that does not count. A part
that runs out of memory says so in its place, and the others go on. The parts take their shapes from `Scale`, so that
tests run them small on a CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

from learner_work import (
    SIZES,
    Cost,
    Head,
    dense_peak,
    forward_flops,
    interleaved,
    mfu,
    qwen3,
    recipe,
    samples_of,
    write_random_model,
)
from wire_work import ipc_seconds, wire_seconds

from actors.attention import KERNELS, Packing, choose
from actors.fsdp import DTYPES
from actors.learner import Learner
from aster.algo.packing import denominators, pack
from aster.errors import ConfigError
from aster.types import MicroBatch

MIB = 2**20
NO_DEVICE = "bench-gpu: torch sees no CUDA device here, and nothing was measured; `make bench-learner` runs on a CPU"


@dataclass(frozen=True)
class Scale:
    """How large everything is. The defaults are the benchmark; a test gives a few dozen tokens on a CPU."""

    config: Qwen3Config
    device: torch.device
    dtype: str = "bfloat16"
    tokens: tuple[int, ...] = (4096, 16_384, 32_768)
    longest: int = 8192  # tokens of a sample; a row of fewer tokens holds one sample
    rounds: int = 10
    head_rows: int = 8192
    sync_bytes: int = 8 << 30
    peak: float | None = None  # FLOP/s of the device in dense bf16
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="4b")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 peak of a device that is not in our table")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(NO_DEVICE, file=sys.stderr)
        return 1
    name = torch.cuda.get_device_name()
    with tempfile.TemporaryDirectory() as folder:
        scale = Scale(
            config=qwen3(args.size),
            device=torch.device("cuda", 0),
            rounds=args.rounds,
            peak=args.peak_tflops * 1e12 if args.peak_tflops else dense_peak(name),
            folder=Path(folder),
        )
        result = {"device": name, "torch": torch.__version__, "size": args.size, **measure(scale, args.parts)}
    print(json.dumps(result))
    return 0


def measure(scale: Scale, parts: list[str]) -> dict[str, Any]:
    write_random_model(scale.folder, scale.config)
    return {part: PARTS[part](scale) for part in parts}


# parts ---------------------------------------------------------------------------------------------------------------


def step(scale: Scale) -> dict[str, Any]:
    out: dict[str, Any] = {}
    with _learner(scale, recompute=True) as learner:
        for tokens in scale.tokens:
            out[str(tokens)] = _or_out_of_memory(lambda tokens=tokens: _step(scale, learner, tokens))
    return out


def _step(scale: Scale, learner: Learner, tokens: int) -> dict[str, Any]:
    row, loss_tokens = _row(scale, tokens)
    whole = _once(scale, lambda: _update(learner, row, loss_tokens))
    head = Head(
        rows=loss_tokens,
        hidden=scale.config.hidden_size,
        vocab=scale.config.vocab_size,
        device=scale.device,
        dtype=DTYPES[scale.dtype],
    )
    chunk_tokens = learner.recipe.learner.logprob_chunk_tokens
    alone = _once(scale, lambda: head.ours(chunk_tokens=chunk_tokens))
    lengths = np.diff(row.cu_seqlens).tolist()
    flops = forward_flops(scale.config, lengths, loss_tokens=loss_tokens)
    return {
        **_told(whole, tokens),
        "mfu": mfu(flops, whole.seconds, peak=scale.peak),
        "head_share": alone.seconds / whole.seconds,
        "kernel": learner.model.kernel,
    }


def attention(scale: Scale) -> dict[str, Any]:
    """One layer's attention at the middle one of `tokens`, for each kernel."""
    row, _ = _row(scale, scale.tokens[len(scale.tokens) // 2])
    lengths = np.diff(row.cu_seqlens).tolist()
    config, dtype = scale.config, DTYPES[scale.dtype]
    out: dict[str, Any] = {}
    for kernel in KERNELS:
        try:
            choose(kernel, device=scale.device, dtype=dtype)
        except ConfigError as error:
            out[kernel] = {"cannot_run": str(error)}
            continue
        packing = Packing(lengths=lengths, boundaries=torch.tensor(row.cu_seqlens, device=scale.device), kernel=kernel)
        out[kernel] = _or_out_of_memory(lambda packing=packing: _told(_attention(scale, config, packing), sum(lengths)))
    return out


def _attention(scale: Scale, config: Qwen3Config, packing: Packing) -> Cost:
    torch.manual_seed(0)
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    q, k, v = (
        torch.randn(
            sum(packing.lengths), h, config.head_dim, device=scale.device, dtype=DTYPES[scale.dtype], requires_grad=True
        )
        for h in heads
    )

    def both_ways() -> None:
        out = KERNELS[packing.kernel](q, k, v, packing, scale=config.head_dim**-0.5, window=None)
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    return _once(scale, both_ways)


def head(scale: Scale) -> dict[str, Any]:
    both = Head(
        rows=scale.head_rows,
        hidden=scale.config.hidden_size,
        vocab=scale.config.vocab_size,
        device=scale.device,
        dtype=DTYPES[scale.dtype],
    )
    chunk_tokens = recipe(dtype=scale.dtype).learner.logprob_chunk_tokens
    works = {"ours": lambda: both.ours(chunk_tokens=chunk_tokens), "full_logits": both.full}
    return {
        name: _or_out_of_memory(lambda work=work: _told(_once(scale, work), scale.head_rows))
        for name, work in works.items()
    }


def precision(scale: Scale) -> dict[str, Any]:
    """The same row in fp32 and bf16; distances in nats over its loss tokens."""
    row, loss_tokens = _row(scale, scale.tokens[0])
    logprobs, out = {}, {}
    for dtype in ("float32", "bfloat16"):
        with _learner(scale, dtype=dtype, recompute=True) as learner:
            logprobs[dtype] = learner.log_probs(row).logprobs[row.loss_mask]
            out[dtype] = _told(_once(scale, lambda: _update(learner, row, loss_tokens)), len(row.input_ids))
    gap = np.abs(logprobs["bfloat16"] - logprobs["float32"])
    return {**out, "gap_mean": float(gap.mean()), "gap_max": float(gap.max())}


def checkpointing(scale: Scale) -> dict[str, Any]:
    variants: dict[str, dict[str, Any]] = {
        "kept": {"recompute": False},
        "recomputed": {"recompute": True},
        "recomputed, masters in host memory": {"recompute": True, "offload_optimizer": True},
    }
    row, loss_tokens = _row(scale, scale.tokens[0])

    def one(sections: dict[str, Any]) -> dict[str, Any]:
        with _learner(scale, **sections) as learner:
            return _told(_once(scale, lambda: _update(learner, row, loss_tokens)), len(row.input_ids))

    return {name: _or_out_of_memory(lambda s=sections: one(s)) for name, sections in variants.items()}


def sync(scale: Scale) -> dict[str, Any]:
    """Seconds for `sync_bytes` in sealed buckets, checked at the other end."""
    wire = [wire_seconds(scale.sync_bytes, device=scale.device) for _ in range(scale.rounds)]
    out: dict[str, Any] = {"bytes": scale.sync_bytes, "wire_world_1_s": statistics.median(wire)}
    if scale.device.type == "cuda":
        out["cuda_ipc_s"] = statistics.median(ipc_seconds(scale.sync_bytes, rounds=scale.rounds))
    return out


PARTS: dict[str, Callable[[Scale], dict[str, Any]]] = {
    "step": step,
    "attention": attention,
    "head": head,
    "precision": precision,
    "checkpointing": checkpointing,
    "sync": sync,
}


# pieces --------------------------------------------------------------------------------------------------------------


@contextmanager
def _learner(scale: Scale, *, recompute: bool, dtype: str | None = None, **sections: Any) -> Iterator[Learner]:
    settings = recipe(dtype=dtype or scale.dtype, recompute=recompute, **sections)
    learner = Learner(settings, model_path=str(scale.folder), total_steps=1000)
    try:
        yield learner
    finally:
        learner.close()


def _row(scale: Scale, tokens: int) -> tuple[MicroBatch, int]:
    """A row of `tokens` tokens in samples of at most `longest`, of which an eighth is prompt; and its loss tokens."""
    lengths = [min(scale.longest, tokens - start) for start in range(0, tokens, scale.longest)]
    samples = samples_of([(n // 8, n - n // 8) for n in lengths], vocab=scale.config.vocab_size)
    [[row]] = pack(samples, row_tokens=tokens, dp_size=1)
    return row, denominators(samples)[0]


def _update(learner: Learner, row: MicroBatch, loss_tokens: int) -> None:
    learner.forward_backward(row, num_loss_tokens=loss_tokens, num_groups=1)
    learner.optim_step()


def _once(scale: Scale, work: Callable[[], Any]) -> Cost:
    """Medians of `rounds` runs."""
    [costs] = interleaved({"it": work}, scale.device, rounds=scale.rounds).values()
    return Cost(statistics.median(c.seconds for c in costs), max(c.peak_bytes for c in costs))


def _told(spent: Cost, tokens: int) -> dict[str, float]:
    return {
        "seconds": round(spent.seconds, 4),
        "tokens_per_s": round(tokens / spent.seconds, 1),
        "peak_mib": round(spent.peak_bytes / MIB, 1),
    }


def _or_out_of_memory(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A shape that does not fit is a finding, not a failure."""
    try:
        return work()
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        return {"out_of_memory": str(error).splitlines()[0]}


if __name__ == "__main__":
    sys.exit(main())
