"""A function on n gloo ranks, each a process of its own, for what must be seen from two sides and needs no Ray."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch.distributed as dist


def run_on_ranks(function: Callable[..., None], world_size: int, *args: Any, timeout_s: float = 120) -> None:
    """`function(rank, world_size, *args)`; it makes its own process group. A rank that fails fails the caller."""
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=_one, args=(function, rank, world_size, args), daemon=True) for rank in range(world_size)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout_s)
    alive = [rank for rank in ranks if rank.is_alive()]
    for rank in alive:
        rank.kill()
        rank.join()
    assert not alive, f"{len(alive)} ranks did not end within {timeout_s:g} s"
    assert [rank.exitcode for rank in ranks] == [0] * world_size


def gloo(store: str, rank: int, world_size: int) -> None:
    """Join the default group over the file `store`."""
    dist.init_process_group("cpu:gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)


def _one(function: Callable[..., None], rank: int, world_size: int, args: tuple[Any, ...]) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    function(rank, world_size, *args)
    if dist.is_initialized():
        dist.destroy_process_group()
