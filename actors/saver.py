"""Checkpoints written behind the training's back: `start` returns when the copy in host memory is taken.

    training thread   ---- start: wait for the last save, copy ----> step, step, step ...
    writing thread                                            `---> shards, rng, counters, rename

One save at a time. The writing thread has a gloo group of its own, so its collectives never meet the training's. What
goes wrong there goes wrong on every rank alike, and is raised by the next call that waits: the next save, a load, an
export, the end; and by every `wait` until a next save begins. What is written is said in `persist.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from actors import persist
from aster.checkpoints import sync
from aster.errors import AsterError


class Saver:
    """Every method but `done` is a collective. To be made after the default process group, by every rank."""

    def __init__(self, *, timeout_s: float) -> None:
        """`timeout_s`: of one collective of the writing, and of waiting for it."""
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self._timeout_s = timeout_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._path = ""
        self._writing: Future[None] | None = None
        self._failure: BaseException | None = None  # what `wait` found, and says until the next `start`

    def start(
        self, path: str, *, tensors: dict[str, torch.Tensor], counters: Mapping[str, Any], copied: bool = False
    ) -> None:
        """Copy `tensors` and the random state, and begin to write `path`, which appears when all ranks are done.

        `copied`: the tensors are on the CPU and nobody else's, no further copy is needed. Raises what the save
        before failed with, unless it was told; nothing is begun then.
        """
        self.settle()
        self._failure = None
        staged = tensors if copied else _copy(tensors)
        self._path = path
        self._writing = self._thread.submit(self._write, path, staged, persist.rng_state(), dict(counters))

    def done(self) -> bool:
        """False while the files are being written. Does not wait and does not raise."""
        return self._writing is None or self._writing.done()

    def wait(self) -> None:
        """Until the save that began last is on disk. Raises `AsterError` with its path when it failed, every time: a
        caller that was not the first to ask must not take it for complete."""
        writing, self._writing = self._writing, None
        if writing is not None:
            try:
                writing.result(self._timeout_s)
            except (Exception, dcp.CheckpointException) as error:  # the latter is no Exception
                self._failure = error
        if self._failure is not None:
            cause = str(self._failure) or type(self._failure).__name__
            raise AsterError(f"checkpoint {self._path} was not written: {cause}") from self._failure

    def settle(self) -> None:
        """`wait`, for a caller that does not need that save: a failure that was told is not told again."""
        if self._failure is None:
            self.wait()

    def close(self) -> None:
        """Settle, and end the thread in any case."""
        try:
            self.settle()
        finally:
            self._thread.shutdown(wait=False)

    def _write(
        self, path: str, tensors: dict[str, torch.Tensor], rng: dict[str, torch.Tensor], counters: dict[str, Any]
    ) -> None:
        """In the thread. Written beside `path` and renamed by rank 0 when every rank is done."""
        final = Path(path)
        partial = final.with_name(final.name + ".tmp")
        rank = dist.get_rank()

        def prepare() -> None:
            if rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
                (partial / "rng").mkdir(parents=True)

        def save_rng() -> None:
            file = partial / "rng" / f"{rank}.pt"
            torch.save(rng, file)
            sync(file)  # by whoever wrote it: rank 0 may be on another machine

        def finish() -> None:
            if rank == 0:
                (partial / persist.COUNTERS).write_text(json.dumps(counters), "utf-8")
                persist.replace_directory(partial, final)

        self._together(prepare)
        dcp.save(tensors, checkpoint_id=str(partial), process_group=self._group)  # agrees on errors by itself
        self._together(save_rng)
        self._together(finish)

    def _together(self, action: Callable[[], None]) -> None:
        """Run `action` and wait for the other ranks. What one raises, all raise: none may wait for a peer in vain."""
        problem, cause = "", None
        try:
            action()
        except Exception as error:  # policy: told to all ranks, and raised by each below
            problem, cause = f"{type(error).__name__}: {error}", error
        problems = [""] * dist.get_world_size(self._group)
        dist.all_gather_object(problems, problem, group=self._group)
        for rank, text in enumerate(problems):
            if text:
                raise AsterError(f"rank {rank}: {text}") from cause


def _copy(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """In host memory, DTensors as such."""
    stager = DefaultStager(
        StagingOptions(
            use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
        )
    )
    copied = stager.stage(tensors)
    assert isinstance(copied, dict)
    stager.close()  # drops its cache of storages, not what it handed out
    return copied
