"""`aster plan`'s memory arithmetic against a real learner and real engines on this machine's CPU, part by part.

    make bench-plan                        learner and engines, about two minutes
    make bench-plan ARGS="--only learner"  without vLLM

Everything runs in a process of its own and is read off its resident memory: what a step adds, and the peak that it
reaches (the kernel's high-water mark, reset before). fp32, one rank. Prints a table, then one JSON line; exit status 1
when a prediction is off by more than 15 %. GPUs are not measured here: what the plan says of them stays a prediction.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

TOLERANCE = 0.15
SHAPE = {
    "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 8192, "max_position_embeddings": 4096,
}  # fmt: skip
CHUNK = 256
ENGINES = (("small", 64), ("small", 320), ("wide", 64))  # model, MiB of KV cache
_WIDE = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8}
# A freed block goes back to the system at once, so that resident memory is what is in use.
_ENV = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("learner", "engine"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        kind, *rest = args.child.split(":")
        print(json.dumps(_learner(rest[0] == "1") if kind == "learner" else _engine(rest[0], int(rest[1]))))
        return 0
    lines: list[tuple[str, float, float]] = []
    if args.only != "engine":
        for checkpointing in (False, True):
            lines += learner_lines(_child(f"learner:{int(checkpointing)}"), checkpointing=checkpointing)
    if args.only != "learner":
        lines += engine_lines([_child(f"engine:{model}:{mib}") for model, mib in ENGINES])
    print(f"{'MB':>58} {'predicted':>10} {'measured':>10} {'off':>7}")
    for name, predicted, measured in lines:
        print(f"{name:>58} {predicted / 1e6:>10.1f} {measured / 1e6:>10.1f} {predicted / measured - 1:>+7.1%}")
    worst = max(abs(predicted / measured - 1) for _, predicted, measured in lines)
    print(json.dumps({"bench": "plan", "worst": round(worst, 3), "lines": {n: [p, m] for n, p, m in lines}}))
    return int(worst > TOLERANCE)


def learner_lines(measured: dict[str, float], *, checkpointing: bool) -> list[tuple[str, float, float]]:
    from aster.planning import ModelShape, Workload, learner_memory

    shape = ModelShape(hidden=256, layers=4, heads=4, kv_heads=2, head_dim=64, ffn=768, vocab=8192, tied=True)
    how = "checkpointed" if checkpointing else "not checkpointed"

    def transient(tokens: int, chunk: int) -> float:
        work = Workload(
            trajectories=1, mean_tokens=tokens, max_tokens=tokens, calls=0, engines=1, learners=1, tensor_parallel=1,
            micro_batch_tokens=tokens, logprob_chunk_tokens=chunk, memory_utilization=0.9, compute_bytes=4,
            checkpointing=checkpointing,
        )  # fmt: skip
        parts = learner_memory(shape, work)
        return sum(parts.values()) - parts["sharded masters, gradients, Adam"]

    p = shape.parameters
    lines = [] if checkpointing else [
        ("learner: masters and Adam", 12.0 * p, measured["built"]),
        ("learner: gradients", 4.0 * p, measured["gradients"]),
    ]  # fmt: skip
    for key in (k for k in measured if "/" in k):
        tokens, loss = map(int, key.split("/"))
        lines.append((f"learner, {how}: a row of {key} above that", transient(tokens, min(CHUNK, loss)), measured[key]))
    slope = (transient(1024, 8) - transient(512, 8)) / 512
    lines.append((f"learner, {how}: 512 tokens more", 512 * slope, measured["1024/8"] - measured["512/8"]))
    return lines


def engine_lines(found: list[dict[str, float]]) -> list[tuple[str, float, float]]:
    small, more, wide = found
    head = SHAPE["vocab_size"] * (_WIDE["hidden_size"] - SHAPE["hidden_size"])  # on CPU a tied head is packed: a copy
    weights = 4.0 * (wide["parameters"] - small["parameters"] + head)
    cache = (more["kv_tokens"] - small["kv_tokens"]) * small["kv_bytes"]
    wider = weights + wide["kv_tokens"] * wide["kv_bytes"] - small["kv_tokens"] * small["kv_bytes"]
    return [
        ("engine: KV cache of more tokens", cache, more["resident"] - small["resident"]),
        ("engine: weights of a larger model", wider, wide["resident"] - small["resident"]),
    ]


def _child(what: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", what]
    done = subprocess.run(command, env={**os.environ, **_ENV}, capture_output=True, text=True, check=False, timeout=900)
    if done.returncode:
        raise SystemExit(f"{what} failed:\n{done.stderr[-4000:]}")
    answer: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


# in the children -----------------------------------------------------------------------------------------------------


def _learner(checkpointing: bool) -> dict[str, float]:
    import learners
    import torch

    from aster.types import MicroBatch, Sample

    torch.set_num_threads(1)

    def row(tokens: int, loss: int) -> MicroBatch:
        ids = np.random.default_rng(0).integers(0, learners.VOCAB, tokens).astype(np.int32)
        far = np.full(tokens, -9.0, np.float32)
        mask = np.arange(tokens) >= tokens - loss
        return learners.one_row([Sample(ids, mask, behaviour_logprobs=far, old_logprobs=far)])

    recipe = learners.recipe(
        model={"gradient_checkpointing": checkpointing}, learner={"logprob_chunk_tokens": CHUNK}, optim={"lr": 1e-5}
    )
    out: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        tiny = learners.write_model(Path(folder) / "tiny")
        model = learners.write_model(Path(folder) / "model", initializer_range=0.02, **SHAPE)
        with learners.learner_on(tiny, recipe) as learner:  # loads what libraries load late
            learner.forward_backward(row(512, 500), num_loss_tokens=500, num_groups=1)
            learner.optim_step()
        before = _status("VmRSS")
        with learners.learner_on(model, recipe) as learner:
            out["built"] = _status("VmRSS") - before
            for _ in range(2):  # the second time nothing is new but the gradients
                without = _status("VmRSS")
                learner.forward_backward(row(64, 8), num_loss_tokens=8, num_groups=1)
                out["gradients"] = _status("VmRSS") - without
                learner.optim_step()
            learner.forward_backward(row(64, 8), num_loss_tokens=8, num_groups=1)
            for tokens, loss in ((512, 8), (1024, 8), (512, 511)):
                Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
                resident = _status("VmRSS")
                learner.forward_backward(row(tokens, loss), num_loss_tokens=loss, num_groups=1)
                out[f"{tokens}/{loss}"] = _status("VmHWM") - resident
    return out


def _engine(model: str, mib: int) -> dict[str, float]:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    import learners
    from vllm import LLM, SamplingParams

    from aster.planning import ModelShape

    with tempfile.TemporaryDirectory() as folder:
        path = learners.write_model(Path(folder) / "model", **{**SHAPE, **(_WIDE if model == "wide" else {})})
        shape = ModelShape.from_config(path / "config.json")
        engine = LLM(
            model=str(path), dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=4,
            kv_cache_memory_bytes=mib << 20, skip_tokenizer_init=True, distributed_executor_backend="uni",
        )  # fmt: skip
        engine.generate(
            [{"prompt_token_ids": [1, 2, 3]}], SamplingParams(max_tokens=4, detokenize=False), use_tqdm=False
        )
        cache = engine.llm_engine.vllm_config.cache_config
        return {
            "resident": _status("VmRSS"),
            "parameters": shape.parameters,
            "kv_tokens": float(cache.num_gpu_blocks * cache.block_size),
            "kv_bytes": 2.0 * shape.kv_bytes,  # the plan's are bf16
        }


def _status(field: str) -> float:
    """Bytes, of this process."""
    text = Path("/proc/self/status").read_text()
    return 1024.0 * int(next(line.split()[1] for line in text.splitlines() if line.startswith(field)))


if __name__ == "__main__":
    sys.exit(main())
