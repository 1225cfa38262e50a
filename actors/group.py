"""The learner gang as the driver sees it: one Ray actor per rank, called all together, dead all together.

    driver --await--> RayLearnerGroup --one call per rank--> LearnerRank 0 .. n-1  <--collectives--> each other

A rank that raises or dies leaves its peers waiting inside a collective, and neither NCCL nor gloo can heal. So any
failure, or silence past `learner.step_timeout_s`, kills the whole gang and becomes one `GangFailure` that names
the rank that began it. The exception is an `AsterError` that every rank raises alike (a checkpoint that does not
exist, a run that diverged): it passes through and the gang lives on.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup

from actors.fsdp import open_store
from actors.learner import Learner
from actors.placement import cluster_device, in_bundle, learner_bundles, release, reserve
from actors.weight_sync import RayWeightSource
from actors.zero import ZeroLearner
from aster.config import Recipe
from aster.errors import AsterError, GangFailure
from aster.types import MicroBatch, OptimStats, StepStats, TokenScores

log = logging.getLogger("aster")

_AFTERMATH_S = 10.0  # how long the peers of a failed rank get to say why, before they are killed
_CLOSE_S = 20.0
_POLL_S = 0.2
_ENV = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
_CUDA_ENV = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}  # packed rows differ in length at every step


class _InActor:
    """A learner in an actor. Made in two steps: rank 0's address must be known before anybody can join."""

    def __init__(self, rank: int, world_size: int, *, timeout_s: float) -> None:
        self._place = (rank, world_size)
        self._timeout_s = timeout_s
        self._rendezvous: Any = None

    def address(self) -> tuple[str, int]:
        """Rank 0: open the rendezvous on a port that the system picks. The socket stays bound from here on."""
        rank, world_size = self._place
        host = ray.util.get_node_ip_address()
        self._rendezvous = open_store(host, 0, rank=rank, world_size=world_size, timeout_s=self._timeout_s)
        return host, self._rendezvous.port

    def join(self, recipe: Recipe, *, model_path: str, total_steps: int, master: tuple[str, int]) -> int:
        """Become the learner; returns the process id."""
        rank, world_size = self._place
        super().__init__(  # type: ignore[call-arg]  # the class of learner that this one is mixed into
            recipe,
            model_path=model_path,
            total_steps=total_steps,
            rank=rank,
            world_size=world_size,
            master=master,
            store=self._rendezvous,
        )
        return os.getpid()

    def place(self) -> tuple[str, str]:
        """(Ray's node, the GPU as CUDA_VISIBLE_DEVICES of any process there would name it)."""
        context = ray.get_runtime_context()
        return context.get_node_id(), context.get_accelerator_ids()["GPU"][0]


class LearnerRank(_InActor, Learner):
    """FSDP2."""


class ZeroRank(_InActor, ZeroLearner):
    """DeepSpeed."""


class RayLearnerGroup:
    """`roles.LearnerGroup` over Ray actors."""

    def __init__(
        self,
        ranks: Sequence[Any],
        *,
        placement: PlacementGroup | None,
        timeout_s: float,
        publish_timeout_s: float = 300.0,
        context_parallel: int = 1,
    ) -> None:
        """Use `spawn`. `placement` is released with the gang; None where it belongs to somebody else."""
        self.dp_size = len(ranks) // context_parallel
        self._context = context_parallel  # consecutive ranks get the same row and return the same
        self.pids: list[int] = []
        self._ranks = list(ranks)
        self._placement = placement
        self._timeout_s = timeout_s
        self._publish_timeout_s = publish_timeout_s
        self._failure: GangFailure | None = None
        self._saving = False  # a checkpoint may be under way

    @classmethod
    async def spawn(
        cls, recipe: Recipe, *, model_path: str, total_steps: int, placement: PlacementGroup | None = None
    ) -> RayLearnerGroup:
        """Place, start and join `learner.world_size` ranks on `model_path` (a path that every node can read).

        `placement`: somebody else's placement group whose first bundles are to be used; None reserves one. Raises
        `ConfigError` when the cluster cannot hold the gang or the model directory cannot be used, `GangFailure` when
        a rank dies on the way; nothing is left running then.
        """
        start_s = recipe.rollout.start_timeout_s
        own = None
        if placement is None:
            own = placement = await reserve(learner_bundles(recipe), name="learner gang", timeout_s=start_s)
        on_cpu = cluster_device(recipe) == "cpu"
        shares = recipe.cluster.placement == "colocated"  # memory in expandable segments is not lent over CUDA IPC
        gpu_env = {} if shares else _CUDA_ENV
        env = {**_ENV, **({"OMP_NUM_THREADS": str(recipe.learner.cpu_threads)} if on_cpu else gpu_env)}
        world_size = recipe.learner.world_size
        kind = LearnerRank if recipe.learner.backend in LearnerRank.backends else ZeroRank
        ranks = [
            ray.remote(kind)
            .options(
                name=None,
                max_restarts=0,
                max_task_retries=0,
                runtime_env={"env_vars": env},
                **in_bundle(placement, rank),
            )
            .remote(rank, world_size, timeout_s=start_s)
            for rank in range(world_size)
        ]
        group = cls(
            ranks,
            placement=own,
            timeout_s=recipe.learner.step_timeout_s,
            publish_timeout_s=recipe.rollout.publish_timeout_s,
            context_parallel=recipe.learner.context_parallel,
        )
        try:
            master = await group._one(0, "address", timeout_s=start_s)
            group.pids = await group._all(
                "join",
                recipe,
                model_path=_absolute(model_path),
                total_steps=total_steps,
                master=master,
                timeout_s=start_s,
            )
        except BaseException:
            group.kill()
            raise
        return group

    # roles.LearnerGroup ----------------------------------------------------------------------------------------------

    async def log_probs(
        self, microbatch_per_rank: Sequence[MicroBatch], *, reference: bool = False
    ) -> list[TokenScores]:
        scores = await self._each("log_probs", self._per_rank(microbatch_per_rank), reference=reference)
        return scores[:: self._context]

    async def forward_backward(
        self, microbatch_per_rank: Sequence[MicroBatch], *, num_loss_tokens: int, num_groups: int
    ) -> StepStats:
        """Sums over the rows; `seconds` is that of the slowest rank."""
        stats: list[StepStats] = await self._each(
            "forward_backward",
            self._per_rank(microbatch_per_rank),
            num_loss_tokens=num_loss_tokens,
            num_groups=num_groups,
        )
        return replace(reduce(add, stats[:: self._context]), seconds=max(s.seconds for s in stats))

    async def optim_step(self) -> OptimStats:
        """The norm and the rate are the same on every rank; rank 0's record."""
        stats: list[OptimStats] = await self._all("optim_step")
        return stats[0]

    def weight_source(self) -> RayWeightSource:
        return RayWeightSource(self._ranks, timeout_s=self._publish_timeout_s, died=self._fail)

    async def save(self, path: str) -> None:
        """Returns when every rank has its copy in host memory. See `saved`."""
        self._saving = True
        await self._all("save", _absolute(path))

    async def saved(self) -> None:
        """Asks rather than waits: a call that waited in the actor would keep the training calls behind it waiting."""
        deadline = time.monotonic() + self._timeout_s
        while not all(await self._all("saved", wait=False)):
            if time.monotonic() > deadline:
                raise AsterError(f"a checkpoint was not written within learner.step_timeout_s={self._timeout_s:g}")
            await asyncio.sleep(_POLL_S)
        self._saving = False
        await self._all("saved")  # raises what the writing failed with, on every rank alike

    async def load(self, path: str) -> int:
        steps: list[int] = await self._all("load", _absolute(path))
        return steps[0]

    async def save_hf(self, path: str, *, dtype: str | None = None) -> None:
        """Write a Hugging Face model directory; `dtype` None = the compute dtype."""
        await self._all("save_hf", _absolute(path), dtype=dtype)

    async def rest(self, *, optimizer_only: bool = False) -> None:
        await self._all("rest", optimizer_only=optimizer_only)

    async def rise(self) -> None:
        await self._all("rise")

    async def devices(self) -> list[tuple[str, str]]:
        """(node, GPU) of every rank, for engines that share them."""
        return list(await self._all("place"))

    async def close(self) -> None:
        """Idempotent. Ranks leave the process group together if they still can, and are ended in any case."""
        if self._saving and self._failure is None and self._ranks:
            try:
                await self.saved()  # else the time to close would have to hold the writing of a checkpoint
            except AsterError as error:
                log.warning("while closing the learner gang: %s", error)
        if self._failure is None and self._ranks:
            calls = [self._ref(rank, "close") for rank in range(len(self._ranks))]
            done, pending = await asyncio.wait([asyncio.ensure_future(c) for c in calls], timeout=_CLOSE_S)
            for task in pending:
                task.cancel()
            for task in done:
                if task.exception() is not None:
                    log.warning("while closing the learner gang: %s", task.exception())
        self.kill()

    def kill(self) -> None:
        """End every rank now and give the placement back. Idempotent."""
        for actor in self._ranks:
            ray.kill(actor, no_restart=True)
        self._ranks = []
        if self._placement is not None:
            release(self._placement)
            self._placement = None

    # calls -----------------------------------------------------------------------------------------------------------

    def _per_rank(self, microbatches: Sequence[MicroBatch]) -> list[tuple[MicroBatch]]:
        """Arguments of each rank: the row of its context-parallel group."""
        if len(microbatches) != self.dp_size:
            raise ValueError(f"{len(microbatches)} micro-batches for {self.dp_size} ranks: one per rank")
        return [(m,) for m in microbatches for _ in range(self._context)]

    async def _one(self, rank: int, method: str, *, timeout_s: float) -> Any:
        return (await self._gather({rank: self._ref(rank, method)}, method, timeout_s))[0]

    async def _all(self, method: str, *args: Any, timeout_s: float | None = None, **kwargs: Any) -> list[Any]:
        return await self._each(method, [args] * len(self._ranks), timeout_s=timeout_s, **kwargs)

    async def _each(
        self, method: str, args_per_rank: Sequence[tuple[Any, ...]], *, timeout_s: float | None = None, **kwargs: Any
    ) -> list[Any]:
        """One call per rank; results in order of rank."""
        self._check_alive()
        refs = {rank: self._ref(rank, method, *args, **kwargs) for rank, args in enumerate(args_per_rank)}
        return await self._gather(refs, method, timeout_s or self._timeout_s)

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise self._failure
        if not self._ranks:
            raise GangFailure(0, "the gang was closed")

    def _ref(self, rank: int, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._ranks[rank], method).remote(*args, **kwargs)

    async def _gather(self, refs: dict[int, Awaitable[Any]], method: str, timeout_s: float) -> list[Any]:
        tasks = {rank: asyncio.ensure_future(_outcome(ref)) for rank, ref in refs.items()}
        try:
            await asyncio.wait(tasks.values(), timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION)
            errors = {rank: task.exception() for rank, task in tasks.items() if task.done() and task.exception()}
            late = [rank for rank, task in tasks.items() if not task.done()]
            if not errors and not late:
                return [tasks[rank].result() for rank in refs]
            if errors and late:
                await asyncio.wait([tasks[rank] for rank in late], timeout=_AFTERMATH_S)
                errors = {rank: task.exception() for rank, task in tasks.items() if task.done() and task.exception()}
                late = [rank for rank, task in tasks.items() if not task.done()]
        finally:
            for task in tasks.values():
                task.cancel()
        if errors and not late and len(errors) == len(refs) and all(_agreed(e) for e in errors.values()):
            raise _own(next(iter(errors.values())))
        self._fail(_blame(errors, late, method=method, timeout_s=timeout_s))
        assert self._failure is not None
        raise self._failure

    def _fail(self, failure: GangFailure) -> None:
        if self._failure is None:  # else another call saw it first; what this one saw is the killing
            self._failure = failure
            log.error("killing the learner gang: %s", failure)
            self.kill()


def _absolute(path: str) -> str:
    """Actors have another working directory than the driver."""
    return os.path.abspath(path)


async def _outcome(ref: Awaitable[Any]) -> Any:
    return await ref


def _own(error: BaseException | None) -> BaseException:
    """The exception that was raised in the actor, out of Ray's wrapper."""
    assert error is not None
    cause = getattr(error, "cause", None)
    return cause if isinstance(error, RayTaskError) and isinstance(cause, BaseException) else error


def _agreed(error: BaseException | None) -> bool:
    return isinstance(_own(error), AsterError)


def _blame(
    errors: dict[int, BaseException | None], late: Sequence[int], *, method: str, timeout_s: float
) -> GangFailure:
    """Which rank began it. A dead process comes first, then an error of its own, then one about a lost peer."""
    if not errors:
        return GangFailure(late[0], f"{method} did not return within {timeout_s:g} s (ranks {list(late)} are silent)")

    def order(item: tuple[int, BaseException | None]) -> tuple[int, int]:
        rank, error = item
        if isinstance(error, RayActorError):
            return 0, rank
        return (2 if _blames_a_peer(error) else 1), rank

    rank, error = min(errors.items(), key=order)
    return GangFailure(rank, f"in {method}: {_text(error)}")


def _blames_a_peer(error: BaseException | None) -> bool:
    """Collectives of the survivors fail too; their words are about the connection, not about the cause."""
    own = _own(error)
    words = str(own).lower()
    return type(own).__name__.startswith("Dist") or any(
        sign in words for sign in ("connection closed by peer", "connection reset", "gloo", "nccl", "broken pipe")
    )


def _text(error: BaseException | None) -> str:
    """A RayTaskError prints the traceback of the rank itself."""
    return str(error) if isinstance(error, RayError) else repr(error)
