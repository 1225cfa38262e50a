"""Engines as the pool sees them: `EngineMaker` starts them on the cluster, `RayEngine` is the handle of one.

All of Ray that concerns engines is here; what an engine does is in `engine.py`. A dead actor is not an exception for
the caller of `run` but a trajectory with cause ENGINE_LOST, which the pool may run elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError, TaskCancelledError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.engine import ANSWER_S, RolloutEngine
from actors.metrics import engine_stats
from actors.placement import cluster_device
from aster.agent.ledger import lost_trajectory
from aster.config import Recipe
from aster.data.journal import FOLDER as JOURNAL
from aster.data.journal import JournalPlace, KeptTurns
from aster.errors import ConfigError, EngineLost
from aster.roles import SandboxFactory
from aster.types import Cause, Task, Trajectory

log = logging.getLogger("aster")

_CONTROL_CALLS = 64  # concurrent calls beside the episodes: weights, health, cancel
_GRACE_S = 60.0  # what an episode may take past its own deadline to close its session and come home
_CLOSE_S = 20.0
_TURN_S = 120.0  # 8 GB of weights to pinned host memory or back take a second; the first time it is allocated

_CPU_ENV = {
    "TORCHDYNAMO_DISABLE": "1",  # compiling two small sampling functions takes longer than they ever run
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # with 1, vLLM on CPU silently turns the `uni` executor into `mp`
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # `auto` pins every engine of the machine to core 0
    "OMP_NUM_THREADS": "1",  # two OpenMP threads on a busy core spin against each other: 5x slower
}
_ENV = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class RayEngine:
    """The pool's handle of one engine actor (`handles.EngineHandle`)."""

    def __init__(self, actor: Any, *, name: str, recipe: Recipe, weight_backend: str) -> None:
        self.name = name
        self.capacity = recipe.rollout.max_num_seqs
        self.weight_backend = weight_backend  # "gloo" | "nccl" | "vllm_nccl" | "ipc"
        self.workers = recipe.rollout.tensor_parallel  # ranks that it takes in the transfer group
        self.max_model_len = recipe.max_model_len
        self.exact = recipe.rollout.dtype == "float32" and recipe.model.compute_dtype == "float32"
        # told by `know`, once it is ready
        self.vocab_size = 0
        self.kv_tokens = 0  # what its KV cache holds
        self.pid = 0  # of the actor, on its node
        self.lost = ""  # why it is dead; "" = alive as far as we know
        self._actor = actor

    async def run(self, task: Task) -> Trajectory:
        """One episode. Never raises for a failure of ours."""
        try:
            trajectory: Trajectory = await self.call(
                "run", task, deadline_s=task.budget.trajectory_timeout_s + _GRACE_S
            )
        except EngineLost as error:
            await self.probe()  # one that hangs soon looks empty, and would be given all new work
            return lost_trajectory(task, Cause.ENGINE_LOST, str(error), engine=self.name)
        if trajectory.cause is Cause.ENGINE_LOST:
            await self.probe()
        return trajectory

    async def run_tree(self, task: Task) -> Sequence[Trajectory]:
        """The leaves of one tree, in order of `task` and `task.leaves`; as `run`."""
        try:
            leaves: tuple[Trajectory, ...] = await self.call(
                "run_tree", task, deadline_s=task.budget.trajectory_timeout_s + _GRACE_S
            )
        except EngineLost as error:
            await self.probe()
            return [
                lost_trajectory(leaf, Cause.ENGINE_LOST, str(error), engine=self.name) for leaf in (task, *task.leaves)
            ]
        if any(leaf.cause is Cause.ENGINE_LOST for leaf in leaves):
            await self.probe()
        return leaves

    def know(self, answer: dict[str, Any]) -> None:
        """What `RolloutEngine.ready` said."""
        self.vocab_size, self.pid, self.kv_tokens = answer["vocab_size"], answer["pid"], answer["kv_tokens"]

    async def probe(self) -> bool:
        """Is it alive? Remembers in `lost` if not: an actor may outlive its engine core."""
        if not self.lost:
            try:
                alive = await self.call("alive", deadline_s=_GRACE_S + ANSWER_S)
                self.lost = "" if alive else "the engine core is dead"
            except EngineLost as error:
                self.lost = self.lost or str(error)
        return not self.lost

    async def call(self, method: str, *args: Any, deadline_s: float, **kwargs: Any) -> Any:
        """`await engine.method(...)` with a deadline.

        Raises `EngineLost` when the actor is dead (and remembers it) or late, and the method's own exception otherwise.
        Cancelling the caller cancels the call.
        """
        if self.lost:
            raise EngineLost(f"{self.name} is dead: {self.lost}")
        ref = getattr(self._actor, method).remote(*args, **kwargs)
        try:
            return await asyncio.wait_for(ref, deadline_s)
        except TimeoutError:
            ray.cancel(ref)
            raise EngineLost(f"{self.name}: {method} did not answer within {deadline_s:g} s") from None
        except asyncio.CancelledError:
            ray.cancel(ref)
            raise
        except RayActorError as error:
            self.lost = _first_line(error)
            log.error("%s is dead: %s", self.name, self.lost)
            raise EngineLost(f"{self.name} is dead: {self.lost}") from error
        except TaskCancelledError as error:
            raise EngineLost(f"{self.name}: {method} was cancelled") from error
        except RayTaskError as error:
            raise _unwrap(error) from None
        except RayError as error:  # its answer went down with the node that held it, say
            raise EngineLost(f"{self.name}: {method}: {_first_line(error)}") from error

    async def cancel_all(self) -> None:
        """End every episode of this engine; they come home through `run`, cancelled, with what they had sampled."""
        with contextlib.suppress(EngineLost):  # nothing runs on a dead engine
            await self.call("cancel_all", deadline_s=_GRACE_S)

    async def sleep(self) -> None:
        await self._turn("sleep")

    async def wake(self, what: str) -> None:
        await self._turn("wake", what)

    async def _turn(self, method: str, *args: Any) -> None:
        """A dead engine neither sleeps nor wakes; that its memory is not there to take is the learners' to find out."""
        try:
            await self.call(method, *args, timeout_s=_TURN_S, deadline_s=_TURN_S + _GRACE_S)
        except EngineLost as error:
            log.error("%s: %s", method, error)
            await self.probe()
            if not self.lost:
                raise

    async def close(self) -> None:
        """Idempotent. The actor goes in any case, orderly if it still answers."""
        if not self.lost:
            try:
                await self.call("shutdown", deadline_s=_CLOSE_S)
            except EngineLost as error:
                log.warning("closing %s: %s", self.name, error)
        self.lost = self.lost or "closed"
        ray.kill(self._actor, no_restart=True)


def spawn_engines(recipe: Recipe, *, model_path: str, sandboxes: SandboxFactory | None) -> list[RayEngine]:
    """`EngineMaker.start` for those who need no replacements."""
    return EngineMaker(recipe, model_path=model_path, sandboxes=sandboxes).start()


class EngineMaker:
    """Starts the engines of a recipe, and a successor for one that died."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        model_path: str,
        sandboxes: SandboxFactory | None,
        shared: Sequence[tuple[str, str]] | None = None,
    ) -> None:
        """`shared`: (node, GPU) of every learner rank, whose devices the engines use (`cluster.placement=colocated`).

        Raises `ConfigError` where the cluster or the recipe cannot hold the engines.
        """
        device = cluster_device(recipe)
        self._recipe = recipe
        self._model_path = model_path
        self._backend = _weight_backend(recipe, device) if shared is None else "ipc"
        self._shared = None if shared is None else share_devices(shared, recipe)
        if self._shared is None:
            _check(recipe, device)
        parallel = recipe.rollout.tensor_parallel
        self._options = {
            "num_cpus": parallel if device == "cpu" else 1,
            "num_gpus": 0 if device == "cpu" else parallel,
            "max_concurrency": recipe.rollout.max_num_seqs + _CONTROL_CALLS,
            "runtime_env": {"env_vars": {**_ENV, **(_CPU_ENV if device == "cpu" else {})}},
        }
        journal = None
        if recipe.stage == "rl" and recipe.run.journal:
            journal = JournalPlace(recipe.run.path.resolve() / JOURNAL, recipe.config_hash)
        self._arguments = {
            "device": device,
            "transfer": "nccl" if self._backend == "vllm_nccl" else "aster",
            "model_path": model_path,
            "sandboxes": sandboxes,
            "journal": journal,
        }
        self.kept = KeptTurns(journal) if journal else None
        self._made = 0  # seeds of engines must differ, also from those of the dead

    def start(self) -> list[RayEngine]:
        """`rollout.engines` engines in parallel; waits until all of them answer.

        Raises `EngineLost` with vLLM's own words when one does not come up within `rollout.start_timeout_s`; nothing
        is left running then.
        """
        engines = [self._make(f"engine-{i}") for i in range(self._recipe.rollout.engines)]
        try:
            answers = ray.get(
                [engine._actor.ready.remote() for engine in engines], timeout=self._recipe.rollout.start_timeout_s
            )
        except RayError as error:
            raise self._did_not_start(engines, error) from None
        for engine, answer in zip(engines, answers, strict=True):
            engine.know(answer)
        return engines

    async def replace(self, dead: RayEngine) -> RayEngine:
        """End what is left of `dead` (its actor may outlive its core) and start another on its resources.

        It has the weights of the model directory. `engine-1` is followed by `engine-1.1`, and that by `engine-1.2`.
        Raises `EngineLost` as `start` does.
        """
        await dead.close()
        stem, _, times = dead.name.partition(".")
        engine = self._make(f"{stem}.{int(times or 0) + 1}")
        try:
            engine.know(await asyncio.wait_for(engine._actor.ready.remote(), self._recipe.rollout.start_timeout_s))
        except (RayError, TimeoutError) as error:
            raise self._did_not_start([engine], error) from None
        except BaseException:
            ray.kill(engine._actor, no_restart=True)
            raise
        return engine

    def _make(self, name: str) -> RayEngine:
        options = self._options if self._shared is None else {**self._options, **self._shared[self._made]}
        make = ray.remote(RolloutEngine).options(**options).remote
        listeners = [engine_stats(name, run=self._recipe.run.name)] if self._recipe.cluster.metrics else []
        seed = self._recipe.run.seed + self._made
        actor = make(self._recipe, name=name, seed=seed, stat_loggers=listeners, **self._arguments)
        self._made += 1
        return RayEngine(actor, name=name, recipe=self._recipe, weight_backend=self._backend)

    def _did_not_start(self, engines: list[RayEngine], error: BaseException) -> EngineLost:
        for engine in engines:
            ray.kill(engine._actor, no_restart=True)
        if not isinstance(error, GetTimeoutError | TimeoutError):
            return EngineLost(f"an engine on {self._model_path!r} did not start: {error}")
        return EngineLost(
            f"{len(engines)} engine(s) on {self._model_path!r} were not ready within rollout.start_timeout_s="
            f"{self._recipe.rollout.start_timeout_s:g}; the cluster has {_resources()}, each engine asks for "
            f"{self._options['num_cpus']} CPU and {self._options['num_gpus']} GPU: raise the limit, or free what "
            "holds them"
        )


def share_devices(learners: Sequence[tuple[str, str]], recipe: Recipe) -> list[dict[str, Any]]:
    """Actor options of each engine that lives on the devices of learner ranks: engine i on ranks i*t .. i*t+t-1.

    Ray gave these GPUs to the learners; the engines ask for none and are told which they see. Raises `ConfigError`
    where an engine's ranks are on two nodes.
    """
    parallel = recipe.rollout.tensor_parallel
    options: list[dict[str, Any]] = []
    for first in range(0, recipe.rollout.engines * parallel, parallel):
        part = learners[first : first + parallel]
        nodes = {node for node, _ in part}
        if len(part) < parallel or len(nodes) != 1:
            raise ConfigError(
                f"engine-{len(options)} needs rollout.tensor_parallel={parallel} GPUs of one node, and the learner "
                f"ranks {first} to {first + parallel - 1} have {len(part)} on {len(nodes)} nodes: lower "
                "rollout.tensor_parallel, or make the nodes' GPUs a multiple of it"
            )
        env = {**_ENV, "CUDA_VISIBLE_DEVICES": ",".join(gpu for _, gpu in part)}
        options.append(
            {
                "num_gpus": 0,
                "scheduling_strategy": NodeAffinitySchedulingStrategy(nodes.pop(), soft=False),
                "runtime_env": {"env_vars": env},
            }
        )
    return options


def _weight_backend(recipe: Recipe, device: str) -> str:
    backend = recipe.rollout.weight_backend
    if backend == "auto":
        return "nccl" if device == "cuda" else "gloo"
    if backend != "gloo" and device == "cpu":
        raise ConfigError(f"rollout.weight_backend={backend} needs GPUs, and the engines run on cpu: use gloo or auto")
    return backend


def _check(recipe: Recipe, device: str) -> None:
    rollout = recipe.rollout
    if device == "cpu" and rollout.kv_cache_bytes is None:
        raise ConfigError(
            "rollout.kv_cache_bytes is needed on CPU, where vLLM cannot measure free memory: "
            "set it, for example rollout.kv_cache_bytes=268435456 (256 MiB)"
        )
    have = ray.cluster_resources()
    parallel = rollout.tensor_parallel
    need, kind = rollout.engines * parallel, "CPU" if device == "cpu" else "GPU"
    if have.get(kind, 0) < need:
        raise ConfigError(
            f"rollout.engines={rollout.engines} x rollout.tensor_parallel={parallel} need {need} {kind}, the "
            f"cluster has {have.get(kind, 0):g}: lower them, or add nodes"
            + (" (a local cluster takes cluster.num_cpus)" if kind == "CPU" else "")
        )


def _resources() -> str:
    free = ray.available_resources()
    return ", ".join(
        f"{free.get(k, 0):g} of {v:g} {k} free" for k, v in ray.cluster_resources().items() if k in ("CPU", "GPU")
    )


def _unwrap(error: RayError) -> BaseException:
    """The exception that the actor raised, not Ray's wrapper, so that `except ValueError` matches here as there."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
