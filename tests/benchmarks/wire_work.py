"""What it takes to hand bytes over on one machine: through a `WireGroup` of one, and by CUDA IPC. No Ray, no vLLM."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.multiprocessing as mp

from actors.wire import Bucket, WireGroup, damaged, plan_buckets, seal, serve_store
from aster.types import TensorMeta

BUCKET = 256 << 20  # bytes
_WAIT_S = 120.0


def wire_seconds(total: int, *, device: torch.device) -> float:
    """Seal, broadcast and check `total` bytes in buckets: NCCL on CUDA, gloo on a CPU, alone in the group."""
    group = WireGroup(
        backend="nccl" if device.type == "cuda" else "gloo",
        store=serve_store(timeout_s=_WAIT_S),
        rank=0,
        world_size=1,
        timeout_s=_WAIT_S,
        device=device,
        ip="127.0.0.1",
    )
    try:
        bucket = _bucket(min(BUCKET, total))
        buffer = group.empty(bucket.size)
        buffer.fill_(7)
        _wait(device)
        began = time.perf_counter()
        for _ in range(-(-total // bucket.size)):
            seal(buffer, bucket)
            _check(group.send(buffer).wait(), bucket)
        _wait(device)
        return time.perf_counter() - began
    finally:
        group.close()


def ipc_seconds(total: int, *, rounds: int) -> list[float]:
    """Seal buckets here, open their handles in another process, copy and check there; seconds of each round."""
    context = mp.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_receive, args=(there,), daemon=True)
    process.start()
    try:
        _answer(here)  # it has its context
        bucket = _bucket(min(BUCKET, total))
        buffer = torch.full((bucket.size,), 7, dtype=torch.uint8, device="cuda")
        seconds = []
        for number in range(rounds + 1):
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(-(-total // bucket.size)):
                seal(buffer, bucket)
                torch.cuda.synchronize()
                here.send(mp.reductions.reduce_tensor(buffer))
                _answer(here)
            if number:
                seconds.append(time.perf_counter() - began)
        here.send(None)
        return seconds
    finally:
        process.join(10)
        if process.is_alive():
            process.kill()


def _receive(pipe: Any) -> None:
    target = torch.empty(0, dtype=torch.uint8, device="cuda")
    pipe.send("")
    while (handle := pipe.recv()) is not None:
        rebuild, arguments = handle
        source = rebuild(*arguments)
        target = target if len(target) == len(source) else torch.empty_like(source)
        target.copy_(source)
        del source  # the sender writes into it next
        torch.cuda.synchronize()
        pipe.send("a bucket arrived damaged" if damaged(target, _bucket(len(target))) else "")


def _answer(pipe: Any) -> None:
    if not pipe.poll(_WAIT_S):
        raise TimeoutError(f"the receiving process did not answer within {_WAIT_S:g} s")
    if problem := pipe.recv():
        raise AssertionError(problem)


def _bucket(size: int) -> Bucket:
    """One tensor that with its checksum fills `size` bytes, a multiple of 8."""
    (bucket,) = plan_buckets([TensorMeta("bytes", "uint8", (size - 8,))], bucket_bytes=size)
    return bucket


def _check(buffer: torch.Tensor, bucket: Bucket) -> None:
    if damaged(buffer, bucket):
        raise AssertionError("a bucket arrived damaged")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
