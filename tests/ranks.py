"""A function on n gloo ranks, each a process of its own, for what must be seen from two sides and needs no Ray."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist


def run_on_ranks(function: Callable[..., None], world_size: int, *args: Any, timeout_s: float = 240) -> None:
    """`function(rank, world_size, *args)`; it makes its own process group. A rank that fails fails the caller."""
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=_one, args=(function, rank, world_size, args), daemon=True) for rank in range(world_size)
    ]
    for rank in ranks:
        rank.start()
    deadline = time.monotonic() + timeout_s
    while any(rank.is_alive() for rank in ranks) and time.monotonic() < deadline:
        if any(rank.exitcode for rank in ranks):
            break  # the others wait for it in a collective
        ranks[0].join(0.1)
        time.sleep(0.02)
    alive = [index for index, rank in enumerate(ranks) if rank.is_alive()]
    for index in alive:
        ranks[index].kill()
        ranks[index].join()
    codes = [None if index in alive else rank.exitcode for index, rank in enumerate(ranks)]
    assert codes == [0] * world_size, f"exit codes by rank, None where it was still running: {codes}"


def gloo(store: str, rank: int, world_size: int) -> None:
    """Join the default group over the file `store`."""
    dist.init_process_group("cpu:gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)


def _one(function: Callable[..., None], rank: int, world_size: int, args: tuple[Any, ...]) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    function(rank, world_size, *args)
    if dist.is_initialized():
        dist.destroy_process_group()
