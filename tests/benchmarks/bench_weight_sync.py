"""How long a publication takes, against the least it could take, interleaved in one run. One JSON line.

    make bench-weight-sync ARGS="--hidden 768 --layers 12"

    ours   the learner's `optim_step` returns -> `WeightSync.publish` -> the first answer of the engine (one token):
           gather, cast, checksums, transfer, load, canary on both sides, the copy for a roll-back, every control call
    floor  a raw gloo broadcast of the same bytes between two actors, all buckets posted at once, then vLLM's own reload
           of the same tensors, that lie in the engine's memory: layer-wise begin, `load_weights`, layer-wise end

Each round takes both floors and then a publication, so a loaded machine slows all three; the figure is the median of
the rounds' ratios, and must be <= 2. A random Qwen3-architecture model, bf16 on the wire, one vLLM engine on CPU, the
learner and the engine in actors of their own, one thread each.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # the reload is timed by a function sent into vLLM's worker

import numpy as np
import ray
import torch
import torch.distributed as dist
from transformers import Qwen3Config, Qwen3ForCausalLM

import actors.rollout
from actors.engine import RolloutEngine
from actors.rollout import RayEngine, spawn_engines
from actors.weight_sync import RayWeightSource, WeightSender, WeightSync
from actors.wire import join_store, process_group, serve_store
from aster.config import Recipe
from aster.types import MicroBatch, PublishReport, Sampling, TensorMeta, TokenScores

AT_MOST = 2.0
PROMPT = np.array([1, 2, 3], np.int32)


class Learner:
    """Holds the model in fp32 and sends it in bf16, as a learner rank does."""

    def __init__(self, folder: str) -> None:
        torch.set_num_threads(1)
        self.model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.sender = WeightSender(tensors=self.tensors, metadata=self.weight_metadata(), rank=0, device="cpu")

    @torch.no_grad()
    def optim_step(self) -> None:
        for parameter in self.model.parameters():
            parameter.mul_(1.001)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from ((name, p.detach()) for name, p in self.model.named_parameters())

    def weight_metadata(self) -> list[TensorMeta]:
        return [TensorMeta(name, "bfloat16", tuple(p.shape)) for name, p in self.model.named_parameters()]

    def weight_address(self) -> tuple[str, int]:
        return self.sender.address()

    def weight_open(self, **kwargs: Any) -> None:
        self.sender.open(**kwargs)

    def weight_send(self, **kwargs: Any) -> list[str]:
        return self.sender.send(**kwargs)

    def weight_keep(self) -> None:
        self.sender.keep()

    def weight_close(self) -> None:
        self.sender.close()

    @torch.no_grad()
    def log_probs(self, row: MicroBatch) -> TokenScores:
        ids = torch.tensor(row.input_ids)[None]
        logprobs = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].log_softmax(-1)
        own = logprobs.gather(-1, torch.tensor(row.labels)[:, None])[:, 0].numpy()
        return TokenScores(own, np.zeros_like(own))


class Peer:
    """One end of the raw broadcast."""

    def serve(self) -> tuple[str, int]:
        self.store = serve_store(timeout_s=60)
        return ray.util.get_node_ip_address(), self.store.port

    def join(self, address: tuple[str, int], rank: int, sizes: list[int]) -> None:
        store = self.store if rank == 0 else join_store(*address, timeout_s=60)
        self.group = process_group("gloo", store, rank, 2, timedelta(seconds=60), address[0])
        self.buffers = [torch.full((size,), rank, dtype=torch.uint8) for size in sizes]  # memory that is mapped already

    def broadcast(self) -> float:
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        began = time.perf_counter()
        for work in [self.group.broadcast([buffer], options) for buffer in self.buffers]:
            work.wait()
        return time.perf_counter() - began


class Engine(RolloutEngine):
    """The engine, with vLLM's reload under a stop-watch."""

    async def reload_seconds(self, tensors: list[TensorMeta]) -> float:
        """Leaves random weights behind."""
        shapes = [(m.name, m.dtype, tuple(m.shape)) for m in tensors]
        (seconds,) = await self._engine.collective_rpc(_reload_seconds, timeout=120, args=(shapes,))
        return float(seconds)


def _reload_seconds(worker: Any, shapes: list[tuple[str, str, tuple[int, ...]]]) -> float:
    import time

    import torch
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    if not hasattr(worker, "bench_tensors"):
        worker.bench_tensors = [(n, torch.randn(s).mul_(0.02).to(getattr(torch, d))) for n, d, s in shapes]
    model = worker.get_model()
    began = time.perf_counter()
    initialize_layerwise_reload(model)
    model.load_weights(worker.bench_tensors)
    finalize_layerwise_reload(model, worker.model_config)
    return time.perf_counter() - began


def raw_pair(total: int, *, bucket: int) -> list[Any]:
    """Two connected actors that hold `total` bytes in buckets."""
    peers = [ray.remote(Peer).remote() for _ in range(2)]
    address = ray.get(peers[0].serve.remote(), timeout=60)
    sizes = [bucket] * (total // bucket) + ([total % bucket] if total % bucket else [])
    ray.get([peer.join.remote(address, rank, sizes) for rank, peer in enumerate(peers)], timeout=60)
    return peers


async def published(learner: Any, engine: RayEngine, sync: WeightSync, version: int) -> tuple[float, PublishReport]:
    """Seconds from the return of the optimizer step to the first answer, and the report."""
    await learner.optim_step.remote()
    began = time.perf_counter()
    report = await sync.publish(RayWeightSource([learner]), version)
    answer = await engine.call(
        "generate",
        PROMPT,
        max_tokens=1,
        sampling=Sampling(),
        stop_token_ids=(),
        seed=0,
        request_id=f"first-{version}",
        deadline_s=60,
    )
    seconds = time.perf_counter() - began
    assert answer.versions.tolist() == [version], answer.versions
    return seconds, report


async def measure(learner: Any, engine: RayEngine, *, rounds: int, bucket: int) -> list[dict[str, Any]]:
    """One dict per round; the round that connects and warms up is left out."""
    sync = WeightSync([engine], bucket_bytes=bucket, timeout_s=120)
    tensors = list(RayWeightSource([learner]).metadata())
    _, report = await published(learner, engine, sync, 0)
    peers = raw_pair(report.bytes, bucket=bucket)
    out = []
    for version in range(rounds + 1):
        broadcast = max(await asyncio.gather(*(peer.broadcast.remote() for peer in peers)))
        reload = await engine.call("reload_seconds", tensors, deadline_s=150)
        seconds, report = await published(learner, engine, sync, version)
        out.append({"broadcast": broadcast, "reload": reload, "sync": seconds, "report": report})
    await engine.close()
    return out[1:]


def model(args: argparse.Namespace, folder: str) -> Recipe:
    """Save a random model; the recipe of its engine."""
    config = Qwen3Config(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 128),
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        dtype="bfloat16",
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return Recipe.model_validate(
        {
            "stage": "eval",
            "model": {"path": folder},
            "budget": {"max_prompt_tokens": 256, "max_response_tokens": 256},
            "rollout": {"max_num_seqs": 4, "kv_cache_bytes": 32 << 20, "enforce_eager": True},
            "cluster": {"device": "cpu"},
        }
    )


def main() -> None:
    print(json.dumps(measured(parsed())))


def parsed(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--bucket-mib", type=int, default=64)
    return parser.parse_args(argv)


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Starts a Ray of its own and ends it."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    actors.rollout.RolloutEngine = Engine
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=f"/tmp/rb{os.getpid()}")
    with tempfile.TemporaryDirectory() as folder:
        recipe = model(args, folder)
        (engine,) = spawn_engines(recipe, model_path=folder, sandboxes=None)
        learner = ray.remote(Learner).remote(folder)
        rounds = asyncio.run(measure(learner, engine, rounds=args.rounds, bucket=args.bucket_mib << 20))
    ray.shutdown()
    median = {key: statistics.median(r[key] for r in rounds) for key in ("broadcast", "reload", "sync")}
    ratio = statistics.median(r["sync"] / (r["broadcast"] + r["reload"]) for r in rounds)
    reports = [r["report"] for r in rounds]
    return {
        "benchmark": "weight_sync",
        "backend": "gloo",
        "megabytes": round(reports[0].bytes / 1e6, 1),
        "bucket_mib": args.bucket_mib,
        "rounds": len(rounds),
        "times_floor": {"is": round(ratio, 2), "must": f"<= {AT_MOST:g}", "met": ratio <= AT_MOST},
        "times_floor_by_round": [round(r["sync"] / (r["broadcast"] + r["reload"]), 2) for r in rounds],
        "sync_s": round(median["sync"], 4),
        "raw_broadcast_s": round(median["broadcast"], 4),
        "reload_s": round(median["reload"], 4),
        "phases_s": {
            phase: round(statistics.median(report.phases[phase] for report in reports), 4)
            for phase in reports[0].phases
        },
        "canary_max_diff": max(report.canary_max_diff for report in reports),
        "load_average": round(os.getloadavg()[0], 1),
    }


if __name__ == "__main__":
    main()
