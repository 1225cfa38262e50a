"""Several learner ranks as plain processes over gloo, without Ray: quick to start, since they fork from one import."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
from ports import free_ports

_TESTS = Path(__file__).parent


def run_gang(world_size: int, work: Callable[..., Any], *args: Any, folder: Path, timeout_s: float = 240) -> list[Any]:
    """`work(rank, world_size, port, *args)` in each of `world_size` processes; what they return, in order of rank.

    `work` is a function of a module. A rank that raises, or silence past `timeout_s`, ends all and raises.
    """
    port = free_ports(16)[0]  # who opens several groups takes the next ones too
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{rank}.pickle" for rank in range(world_size)]
    context = _context()
    ranks = [
        context.Process(target=_rank, args=(file, work, rank, world_size, port, *args), daemon=True)
        for rank, file in enumerate(files)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (_TESTS.parent, _TESTS))))  # for the server's one import
        for process in ranks:
            process.start()
    deadline = time.monotonic() + timeout_s
    try:
        while any(p.is_alive() for p in ranks) and not any(p.exitcode for p in ranks):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{work.__name__} on {world_size} ranks did not end within {timeout_s:g} s")
            time.sleep(0.02)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    outcomes = [pickle.loads(f.read_bytes()) if f.is_file() else (False, "died") for f in files]
    failures = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(outcomes) if not ok]
    if failures:
        raise AssertionError("\n".join(failures))
    return [value for _, value in outcomes]


def _context() -> ForkServerContext:
    """Processes that fork from a server which has imported torch and the learner once, and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["learners"])
    return context


def _rank(file: Path, work: Callable[..., Any], rank: int, world_size: int, port: int, *args: Any) -> None:
    try:
        outcome = (True, work(rank, world_size, port, *args))
    except BaseException:
        outcome = (False, traceback.format_exc())
    file.write_bytes(pickle.dumps(outcome))
    if not outcome[0]:
        raise SystemExit(1)
