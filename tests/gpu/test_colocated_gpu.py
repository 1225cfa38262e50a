"""What `cluster.placement: colocated` asks of a CUDA device: a learner that leaves and comes back, memory lent to
another process. Not yet run on one."""

from __future__ import annotations

from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from learners import learner_on, one_row, recipe, some_samples, train, weights, write_model

from actors.ipc import CudaLender, IpcGroup
from actors.wire import fingerprint, join_store, plan_buckets, seal, serve_store
from aster.types import TensorMeta

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

CUDA = {"cluster": {"device": "cuda"}}
(BUCKET,) = plan_buckets([TensorMeta("bytes", "uint8", (1 << 20,))], bucket_bytes=1 << 21)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("gpu") / "model", hidden_size=512, intermediate_size=2048)


def test_a_learner_that_rested_gave_its_memory_back_and_trains_on_as_if_it_had_not(model_dir: Path) -> None:
    samples = some_samples(8, longest=60)
    with learner_on(model_dir, recipe(**CUDA)) as learner:
        train(learner, samples)
        train(learner, samples)
        expected = weights(learner)
    with learner_on(model_dir, recipe(**CUDA)) as learner:
        train(learner, samples)
        up = torch.cuda.memory_allocated()
        learner.rest(optimizer_only=True)
        half = torch.cuda.memory_allocated()
        learner.rest()
        down = torch.cuda.memory_allocated()
        assert down < 0.1 * up, (down, up)
        assert down < half < up
        learner.rise()
        assert learner.log_probs(one_row(samples)).logprobs.any()
        train(learner, samples)
        for name, tensor in weights(learner).items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def _receive(port: int) -> str:
    device = torch.device("cuda", 0)
    group = IpcGroup(
        store=join_store("127.0.0.1", port, timeout_s=60), rank=1, senders=1, world_size=2, timeout_s=60, device=device
    )
    return fingerprint(group.receive(BUCKET.size).wait(), BUCKET)


def test_another_process_on_the_same_gpu_copies_what_was_lent() -> None:
    device = torch.device("cuda", 0)
    store = serve_store(timeout_s=60)
    with get_context("spawn").Pool(1) as pool:
        arrived = pool.apply_async(_receive, (store.port,))
        group = IpcGroup(
            store=store, rank=0, senders=1, world_size=2, timeout_s=60, device=device, lender=CudaLender(device)
        )
        buffer = torch.arange(BUCKET.size // 8, dtype=torch.int64, device=device).view(torch.uint8)
        seal(buffer, BUCKET)
        group.send(buffer).wait()
        assert arrived.get(60) == fingerprint(buffer, BUCKET)
