"""How long a publication takes, against a raw gloo broadcast of the same bytes in the same run. One JSON line.

    python tests/benchmarks/bench_weight_sync.py [--hidden 256] [--layers 6] [--rounds 5] [--bucket-mib 16]

A random Qwen3-architecture model, bf16 on the wire, one vLLM engine on CPU, the learner and the engine in actors of
their own, one thread each. The floor is not the wire but vLLM's load: on CPU every linear layer is packed anew.
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
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import ray
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from actors.rollout import RayEngine, spawn_engines
from actors.weight_sync import RayWeightSource, WeightSender, WeightSync
from actors.wire import WireGroup, join_store, serve_store
from aster.config import Recipe
from aster.types import MicroBatch, TensorMeta


class Learner:
    """Holds the model in fp32 and sends it in bf16, as a learner rank does."""

    def __init__(self, folder: str) -> None:
        torch.set_num_threads(1)
        self.model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.sender = WeightSender(tensors=self.tensors, metadata=self.weight_metadata(), rank=0, device="cpu")

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

    def weight_close(self) -> None:
        self.sender.close()

    @torch.no_grad()
    def log_probs(self, row: MicroBatch) -> np.ndarray:
        ids = torch.tensor(row.input_ids)[None]
        logprobs = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].log_softmax(-1)
        return logprobs.gather(-1, torch.tensor(row.labels)[:, None])[:, 0].numpy()


class Peer:
    """One end of the raw broadcast."""

    def serve(self) -> tuple[str, int]:
        self.store = serve_store(timeout_s=60)
        return ray.util.get_node_ip_address(), self.store.port

    def join(self, address: tuple[str, int], rank: int) -> None:
        store = self.store if rank == 0 else join_store(*address, timeout_s=60)
        self.group = WireGroup(
            backend="gloo",
            store=store,
            rank=rank,
            world_size=2,
            timeout_s=60,
            device=torch.device("cpu"),
            ip=address[0],
        )

    def broadcast(self, sizes: list[int]) -> float:
        buffers = [self.group.empty(size).zero_() for size in sizes]
        began = time.perf_counter()
        for pending in [self.group.broadcast(buffer) for buffer in buffers]:
            pending.wait()
        return time.perf_counter() - began


def raw_broadcast(total: int, *, bucket: int, rounds: int) -> list[float]:
    """Seconds per round of sending `total` bytes in buckets, all posted at once, from one actor to another."""
    peers = [ray.remote(Peer).remote() for _ in range(2)]
    address = ray.get(peers[0].serve.remote())
    ray.get([peer.join.remote(address, rank) for rank, peer in enumerate(peers)], timeout=60)
    sizes = [bucket] * (total // bucket) + ([total % bucket] if total % bucket else [])
    times = [max(ray.get([p.broadcast.remote(sizes) for p in peers], timeout=120)) for _ in range(rounds + 1)]
    for peer in peers:
        ray.kill(peer)
    return times[1:]  # the first connects


async def publications(engine: RayEngine, source: RayWeightSource, *, bucket: int, rounds: int) -> list[Any]:
    sync = WeightSync([engine], bucket_bytes=bucket, timeout_s=120)
    reports = [await sync.publish(source, version) for version in range(rounds + 1)]
    await engine.close()
    return reports[1:]  # the first opens the group


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bucket-mib", type=int, default=16)
    args = parser.parse_args()
    bucket = args.bucket_mib << 20
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=f"/tmp/rb{os.getpid()}")
    with tempfile.TemporaryDirectory() as folder:
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
        recipe = Recipe.model_validate(
            {
                "stage": "eval",
                "model": {"path": folder},
                "budget": {"max_prompt_tokens": 256, "max_response_tokens": 256},
                "rollout": {"max_num_seqs": 4, "kv_cache_bytes": 32 << 20, "enforce_eager": True},
                "cluster": {"device": "cpu"},
            }
        )
        (engine,) = spawn_engines(recipe, model_path=folder, sandboxes=None)
        source = RayWeightSource([ray.remote(Learner).remote(str(Path(folder)))])
        reports = asyncio.run(publications(engine, source, bucket=bucket, rounds=args.rounds))
        raw = raw_broadcast(reports[0].bytes, bucket=bucket, rounds=args.rounds)
    publish = [report.seconds for report in reports]
    line = {
        "benchmark": "weight_sync",
        "backend": "gloo",
        "megabytes": round(reports[0].bytes / 1e6, 1),
        "bucket_mib": args.bucket_mib,
        "publish_s": [round(s, 4) for s in publish],
        "publish_median_s": round(statistics.median(publish), 4),
        "raw_broadcast_s": [round(s, 4) for s in raw],
        "raw_broadcast_median_s": round(statistics.median(raw), 4),
        "times_raw": round(statistics.median(publish) / statistics.median(raw), 2),
        "canary_max_diff": max(report.canary_max_diff for report in reports),
        "load_average": round(os.getloadavg()[0], 1),
    }
    print(json.dumps(line))
    ray.shutdown()


if __name__ == "__main__":
    main()
