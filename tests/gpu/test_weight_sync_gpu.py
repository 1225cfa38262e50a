"""The publication on real GPUs: gloo into a GPU engine with one device, NCCL (ours and vLLM's) with two.

The control flow is the one that tests/actors/test_rollout_engine.py runs on CPU; here only what differs by device.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "actors"))
os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # read when Ray is imported

import publishing
import ray

from actors.rollout import RayEngine, spawn_engines
from actors.weight_sync import RayWeightSource, WeightSync
from actors.wire import WireGroup, damaged, fingerprint, plan_buckets, seal, serve_store
from aster.errors import WeightSyncError
from aster.types import Sampling, TensorMeta

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROMPT = np.random.default_rng(1).integers(3, publishing.VOCAB, 24).astype(np.int32)
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL refuses two ranks on one GPU: needs two")


def test_the_checksum_is_the_same_on_both_devices() -> None:
    (bucket,) = plan_buckets([TensorMeta("a", "int64", ((1 << 18) + 777,))], bucket_bytes=1 << 30)
    buffer = torch.randint(0, 256, (bucket.size,), dtype=torch.uint8)
    seal(buffer, bucket)
    on_gpu = buffer.cuda()
    assert damaged(on_gpu, bucket) == []
    assert fingerprint(on_gpu, bucket) == fingerprint(buffer, bucket)
    on_gpu[4001] ^= 1
    assert damaged(on_gpu, bucket) == ["a"]


def test_an_nccl_group_of_one_broadcasts_and_closes() -> None:
    store = serve_store(timeout_s=30)
    group = WireGroup(
        backend="nccl",
        store=store,
        rank=0,
        world_size=1,
        timeout_s=30,
        device=torch.device("cuda", 0),
        ip="127.0.0.1",
    )
    (bucket,) = plan_buckets([TensorMeta("a", "uint8", (1 << 20,))], bucket_bytes=1 << 30)
    buffer = group.empty(bucket.size).zero_()
    buffer[:1000] = 7
    seal(buffer, bucket)
    assert damaged(group.send(buffer).wait(), bucket) == []
    group.close()


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.cloudpickle.register_pickle_by_value(publishing)
    ray.init(include_dashboard=False, log_to_driver=False, _temp_dir=f"/tmp/rg{os.getpid()}")
    yield
    ray.shutdown()


@pytest.mark.parametrize(
    "backend", ["gloo", pytest.param("nccl", marks=TWO_GPUS), pytest.param("vllm_nccl", marks=TWO_GPUS)]
)
async def test_a_gpu_engine_follows_two_publications(backend: str, tmp_path: Path, cluster: None) -> None:
    folder = publishing.save_model(tmp_path)
    recipe = publishing.recipe(
        folder,
        device="cuda",
        dtype="bfloat16",
        weight_backend=backend,
        kv_cache_bytes=256 << 20,
        gpu_memory_utilization=0.3,
        generate_timeout_s=120,
        start_timeout_s=400,
    )
    (engine,) = await asyncio.to_thread(spawn_engines, recipe, model_path=str(folder), sandboxes=None)
    try:
        device = "cpu" if backend == "gloo" else "cuda"
        remote = ray.remote(publishing.ToyLearner).options(num_gpus=0 if device == "cpu" else 1)
        learner = remote.remote(device=device, dtype="bfloat16")
        await follow(engine, learner, damage=backend != "vllm_nccl")
    finally:
        await engine.close()


async def follow(engine: RayEngine, learner: Any, *, damage: bool) -> None:
    """Publish twice, and once damaged where our wire carries checksums; bf16, so compare means."""
    model = publishing.build_model()
    source = RayWeightSource([learner], timeout_s=120)
    sync = WeightSync([engine], bucket_bytes=100_000, timeout_s=60)
    for version in (1, 2):
        ray.get(learner.perturb.remote(version), timeout=60)
        old = publishing.log_probs(model, PROMPT)
        publishing.perturb(model, version)
        report = await sync.publish(source, version)
        assert report.engines == 1
        new = publishing.log_probs(model, PROMPT)
        ours = await engine.call("log_probs", PROMPT, 1, deadline_s=60)
        assert np.abs(ours - new).mean() < 0.1 < np.abs(ours - old).mean()
        out = await engine.call(
            "generate",
            PROMPT,
            max_tokens=16,
            sampling=Sampling(),
            stop_token_ids=(),
            seed=1,
            request_id=f"r{version}",
            deadline_s=60,
        )
        assert (out.versions == version).all()
    if damage:
        ray.get(learner.damage_bucket.remote(1), timeout=60)
        with pytest.raises(WeightSyncError, match="bucket 1") as error:
            await sync.publish(source, 3)
        assert error.value.restored == 2
        restored = await engine.call("log_probs", PROMPT, 1, deadline_s=60)
        assert np.abs(restored - publishing.log_probs(model, PROMPT)).mean() < 0.1
        await sync.publish(source, 3)
