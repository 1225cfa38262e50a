"""The rollout engine: vLLM, the episodes that it serves, and its side of a weight publication.

    driver process (rollout.py)          | actor process (RolloutEngine)             | engine core (vLLM)
    RayEngine.run(task) ---- Ray ------->| run_episode -- generate --> AsyncLLM ---->| scheduler, worker, weights
    WeightSync ------------- Ray ------->| weight_begin/receive/commit/verify/accept | TransferEngine (transfer.py)

Token ids in, token ids out; log-probs are those of the sampling distribution; each token carries its policy version.
Nothing waits for ever: each await has a deadline, and a core that is dead or late is `EngineLost`. Knows no Ray; does
not route, retry or score.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from aster.agent.chat import ChatRenderer
from aster.agent.rollout import Generation, run_episode
from aster.agent.tree import run_tree
from aster.config import Recipe
from aster.data.journal import JournalPlace, TurnJournal
from aster.errors import EngineLost, WeightSyncError
from aster.roles import SandboxFactory
from aster.types import Sampling, Task, TensorMeta, Trajectory

T = TypeVar("T")

ANSWER_S = 120.0  # deadline of any word from the engine core, which may be in the middle of a prefill or a bucket
_CALL_S = 60.0  # deadline of a call that the engine core answers at once
_SHUTDOWN_S = 2.0  # what the core gets to leave by itself; on CPU it uses all of it
_LIFE_S = 0.5  # how often a control call that waits looks whether the core still lives
_CANARY_PRIORITY = -1  # before every episode's request (priority 0)


class _Gate:
    """Shut between `weight_begin` and `weight_accept`: no new request enters, and no finished one leaves.

    So nothing that an unverified policy sampled is ever handed out: it passes with the weights or is lost with them.
    """

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._open = False
        self.rejections = 0

    async def set(self, *, open: bool, rejected: bool = False) -> None:
        async with self._changed:
            self._open = open
            self.rejections += rejected
            self._changed.notify_all()

    async def enter(self) -> int:
        """Waits until open; returns the ticket for `leave`."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._open)
            return self.rejections

    async def leave(self, ticket: int) -> bool:
        """Waits until open or rejected; False = weights were rejected since `enter`."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._open or self.rejections != ticket)
            return self.rejections == ticket


class RolloutEngine:
    """vLLM and the episodes that it serves. A plain class with async methods; `EngineMaker` makes it an actor."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        name: str,
        seed: int,
        device: str,
        transfer: str,
        model_path: str,
        sandboxes: SandboxFactory | None,
        stat_loggers: Sequence[Callable[[], type]] = (),
        journal: JournalPlace | None = None,
    ) -> None:
        """Loads the model; blocks for as long as vLLM takes to start (20 s for a small model on CPU).

        `seed` must differ between engines: two that start alike would draw the same samples of a prompt.
        `transfer` is vLLM's weight-transfer backend: "aster" (ours, gloo or NCCL) or "nccl" (stock).
        `stat_loggers` make the classes of those who want to hear from vLLM's scheduler.
        `journal`: where finished turns are written.
        """
        _prepare_process()
        from vllm.config import WeightTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        rollout, cpu = recipe.rollout, device == "cpu"
        self.name = name
        self._recipe = recipe
        self._sandboxes = sandboxes
        self._renderer: ChatRenderer | None = None
        self._journal = TurnJournal(journal, engine=name) if journal else None
        # A per-request seed costs a kernel launch (on CPU a Python call) per sequence and step, the batch changes bits
        # anyway, and vLLM's CPU worker dies of one in a chunked prefill ("CPU Generator does not use offset").
        self._seeded = recipe.run.deterministic
        whole_prompt = recipe.max_model_len if self._seeded else None
        self._model_path = model_path
        self._episodes: set[asyncio.Task[Any]] = set()
        self._gate = _Gate()
        self._canaries = itertools.count()
        self._engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=model_path,
                dtype=rollout.dtype,
                seed=seed,
                max_model_len=recipe.max_model_len,
                max_num_seqs=rollout.max_num_seqs + 1,  # one seat for the canary, however full the engine is
                scheduling_policy="priority",  # first come first served, but the canary goes first
                max_num_batched_tokens=rollout.max_num_batched_tokens or whole_prompt,
                tensor_parallel_size=rollout.tensor_parallel,
                distributed_executor_backend="uni" if rollout.tensor_parallel == 1 else "mp",
                # A resumed trajectory computes the keys and values of its whole past in one prefill; bit-equal to one
                # that was not interrupted only if that one did so at each turn, too.
                enable_prefix_caching=False if self._seeded else None,
                enforce_eager=True if cpu else rollout.enforce_eager,  # compiling buys nothing on CPU
                gpu_memory_utilization=rollout.gpu_memory_utilization,
                enable_sleep_mode=recipe.cluster.placement == "colocated",
                kv_cache_memory_bytes=rollout.kv_cache_bytes,
                logprobs_mode="processed_logprobs",  # of the distribution sampled from: after temperature and top-p
                skip_tokenizer_init=True,
                generation_config="vllm",  # stop ids and sampling come with the request, never from the model directory
                enable_log_requests=False,
                disable_log_stats=True,  # vLLM's own loggers; ours are `stat_loggers`
                worker_extension_cls="actors.transfer.WorkerExtension",
                weight_transfer_config=WeightTransferConfig(backend=transfer),
            ),
            stat_loggers=[make() for make in stat_loggers] or None,
        )

    async def ready(self) -> dict[str, Any]:
        """The first call: proves that the engine core answers, and opens the gate at version 0."""
        await self._within(_CALL_S, self._engine.update_weight_version("0"))
        await self._gate.set(open=True)
        cache = self._engine.vllm_config.cache_config  # vLLM has put in what it could allocate
        return {
            "vocab_size": self._engine.model_config.get_vocab_size(),
            "pid": os.getpid(),
            "kv_tokens": (cache.num_gpu_blocks or 0) * cache.block_size,
        }

    # episodes --------------------------------------------------------------------------------------------------------

    async def run(self, task: Task) -> Trajectory:
        """One episode; failures of ours come back as the trajectory's cause."""
        return await self._run(functools.partial(run_episode, journal=self._journal), task)

    async def run_tree(self, task: Task) -> tuple[Trajectory, ...]:
        """The episodes of `task` and its leaves, as one tree."""
        return await self._run(run_tree, task)

    async def _run(self, run: Callable[..., Coroutine[Any, Any, T]], task: Task) -> T:
        if self._renderer is None:
            self._renderer = ChatRenderer.from_model_dir(self._model_path)
        episode = asyncio.create_task(
            run(
                task,
                generate=self.generate,
                sandboxes=self._sandboxes,
                renderer=self._renderer,
                tool=self._recipe.tool,
                engine=self.name,
            )
        )
        self._episodes.add(episode)
        try:
            return await episode
        finally:
            self._episodes.discard(episode)

    async def generate(
        self,
        ids: np.ndarray,
        *,
        max_tokens: int,
        sampling: Sampling,
        stop_token_ids: tuple[int, ...],
        seed: int,
        request_id: str,
    ) -> Generation:
        """Sample up to `max_tokens` after `ids` [N] int32; stops with (and keeps) any of `stop_token_ids`.

        Raises `EngineLost` when the engine is dead, late, or its new weights did not verify, and ValueError for a
        request that no engine could serve (longer than max_model_len).
        """
        params = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "max_tokens": max_tokens,
            "stop_token_ids": list(stop_token_ids),
            "seed": seed if self._seeded else None,
            "logprobs": 0,  # the sampled token's own
        }
        limit = self._recipe.rollout.generate_timeout_s  # None: the episode has its own
        try:
            async with asyncio.timeout(limit):
                ticket = await self._gate.enter()
                output = (await self._complete(ids, params, request_id)).outputs[0]
                if not await self._gate.leave(ticket):
                    raise EngineLost(f"{self.name}: {request_id} ran under weights that did not verify")
        except TimeoutError:
            raise EngineLost(f"{self.name}: {request_id} not answered within generate_timeout_s={limit}") from None
        if output.finish_reason not in ("stop", "length", "abort"):
            raise EngineLost(f"{self.name}: {request_id} ended with {output.finish_reason!r}")
        try:
            return _generation(output)
        except (KeyError, TypeError, ValueError) as error:  # policy: it cannot be trained on, and only we are to blame
            raise EngineLost(f"{self.name}: {request_id}: malformed answer: {error!r}") from error

    async def log_probs(self, ids: np.ndarray, prompt_len: int, *, temperature: float = 1.0) -> np.ndarray:
        """log p(ids[t] | ids[:t]) at `temperature` for t >= prompt_len; float32 [len(ids) - prompt_len].

        Teacher-forced, ahead of every waiting request; does not pass the gate. One prefill at temperature 1. vLLM knows
        no temperature for prompts, so at any other it is one request per position: use short sequences there.
        """
        assert 1 <= prompt_len < len(ids) < self._recipe.max_model_len, (prompt_len, len(ids))
        if temperature == 1.0:
            output = await self._canary(ids, prompt_logprobs=0)
            table = output.prompt_logprobs
            return np.asarray([table[t][int(ids[t])].logprob for t in range(prompt_len, len(ids))], dtype=np.float32)

        async def one(at: int, token: int) -> float:
            output = await self._canary(ids[:at], temperature=temperature, logprob_token_ids=[token])
            return float(output.outputs[0].logprobs[0][token].logprob)

        positions = range(prompt_len, len(ids))
        return np.asarray(await asyncio.gather(*(one(t, int(ids[t])) for t in positions)), dtype=np.float32)

    async def _canary(self, ids: np.ndarray, **params: Any) -> Any:
        request_id = f"canary-{next(self._canaries)}"
        return await self._complete(ids, {"max_tokens": 1, **params}, request_id, priority=_CANARY_PRIORITY)

    async def _complete(self, ids: np.ndarray, params: dict[str, Any], request_id: str, *, priority: int = 0) -> Any:
        """The finished RequestOutput. The only place that hands vLLM a prompt. Raises ValueError, `EngineLost`."""
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        final = None
        try:
            sampling = SamplingParams(
                ignore_eos=True,  # only `stop_token_ids` end a turn
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,  # streaming costs 1.65x
                **params,
            )
            prompt = tokens_input(ids.tolist())
            async for output in self._engine.generate(prompt, sampling, request_id, priority=priority):
                final = output
        except VLLMValidationError as error:
            raise ValueError(f"{request_id}: {error}") from None
        except (EngineDeadError, EngineGenerateError) as error:
            raise EngineLost(f"{self.name}: {request_id}: {error}") from error
        if final is None:
            raise EngineLost(f"{self.name}: {request_id} ended without an answer")
        return final

    async def cancel_all(self) -> None:
        """Stop every episode; each closes its session and comes home CANCELLED, with its finished turns."""
        for episode in self._episodes:
            episode.cancel()

    # weights ---------------------------------------------------------------------------------------------------------

    async def weight_open(self, init_info: dict[str, Any], *, timeout_s: float) -> None:
        """Join the transfer group; blocks until all its ranks are there."""
        await self._on_workers(timeout_s, "init_weight_transfer_engine", init_info)

    async def weight_close(self, *, timeout_s: float) -> None:
        """Leave the group, so that peers waiting for us fail now. Also ends an unfinished session."""
        await self._end_session(timeout_s)
        await self._on_workers(timeout_s, "shutdown_weight_transfer_engine")

    async def weight_begin(self, *, timeout_s: float) -> None:
        """Close the gate, freeze what is in flight, drop every cached key and value, and start a reload."""
        await self._gate.set(open=False)
        # keep + clear_cache: a frozen request is prefilled again under the new weights. With its old keys and values it
        # would sample from a mixture that is no model's distribution.
        await self._step(timeout_s, self._engine.pause_generation(mode="keep", clear_cache=True))
        await self._end_session(timeout_s)
        await self._on_workers(timeout_s, "start_weight_update")

    async def weight_receive(self, tensors: list[TensorMeta], *, timeout_s: float) -> None:
        """Receive and load; runs while the learner sends."""
        info = {
            "names": [m.name for m in tensors],
            "dtype_names": [m.dtype for m in tensors],
            "shapes": [list(m.shape) for m in tensors],
        }
        await self._on_workers(timeout_s, "update_weights", info)

    async def weight_commit(self, version: int, *, timeout_s: float) -> None:
        """Finish the reload and label what is sampled from here on. The engine stays paused."""
        await self._on_workers(timeout_s, "finish_weight_update")
        await self._step(timeout_s, self._engine.update_weight_version(str(version)))

    async def weight_verify(self, ids: np.ndarray, prompt_len: int, *, timeout_s: float) -> np.ndarray:
        """Run again, behind the closed gate, and say what the new weights think of the canary: `log_probs` at the
        training temperature, which the learner's log-probs have too."""
        temperature = self._recipe.sampling.temperature
        canary = asyncio.ensure_future(self.log_probs(ids, prompt_len, temperature=temperature))
        try:
            async with asyncio.timeout(timeout_s):
                await self._engine.resume_generation()
                return await canary
        except TimeoutError:
            raise EngineLost(f"{self.name}: the canary was not answered within {timeout_s:g} s") from None
        finally:
            canary.cancel()

    async def weight_accept(self, *, timeout_s: float) -> None:
        """The weights are proven: open the gate."""
        await self._gate.set(open=True)

    async def weight_reject(self, *, timeout_s: float) -> None:
        """The weights are wrong: what ran under them is lost, and the gate stays shut until a publication succeeds."""
        await self._gate.set(open=False, rejected=True)
        await self._step(timeout_s, self._engine.pause_generation(mode="abort", clear_cache=True))

    async def _on_workers(self, timeout_s: float, method: str, *args: Any) -> None:
        """vLLM's `method` in every worker; `WeightSyncError` with the words of the first that failed."""
        call = self._engine.collective_rpc("aster_attempt", args=(method, *args))
        for problem in await self._step(timeout_s, call):
            if problem:
                raise WeightSyncError(f"{self.name}: {problem}")

    async def _step(self, timeout_s: float, call: Coroutine[Any, Any, T]) -> T:
        """One step of a publication. What the engine core raised arrives as text: `WeightSyncError` with it."""
        try:
            return await self._within(timeout_s, call)
        except EngineLost:
            raise
        except Exception as error:  # whatever it was, the policy is the same: the publication failed
            raise WeightSyncError(f"{self.name}: {error}") from error

    async def _end_session(self, timeout_s: float) -> None:
        """Each worker ends its own: one may have failed in an update that the others are still in."""
        await self._step(timeout_s, self._engine.collective_rpc("aster_end_session"))

    async def alive(self) -> bool:
        """Whether the core answers."""
        try:
            await self._within(ANSWER_S, self._engine.is_sleeping())
        except EngineLost:
            return False
        return not self._engine.errored

    # life ------------------------------------------------------------------------------------------------------------

    async def _within(self, timeout_s: float, call: Coroutine[Any, Any, T]) -> T:
        """`call`, or `EngineLost` if the core is dead or does not answer in time.

        vLLM fails the requests of a core that dies, but not the control calls that it was working at: we watch those.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        answer = asyncio.ensure_future(call)
        try:
            async with asyncio.timeout(timeout_s):
                while not (await asyncio.wait([answer], timeout=_LIFE_S))[0]:
                    if self._engine.errored:
                        raise EngineLost(f"{self.name}: the engine core is dead")
                return answer.result()
        except TimeoutError:
            raise EngineLost(f"{self.name}: the engine core did not answer within {timeout_s:g} s") from None
        except EngineDeadError as error:
            raise EngineLost(f"{self.name}: the engine core is dead") from error
        finally:
            answer.cancel()

    async def sleep(self, *, timeout_s: float) -> None:
        """Give the device to the learners: freeze what runs, weights to host memory, KV cache dropped (`colocated`)."""
        await self._within(timeout_s, self._engine.sleep(level=1, mode="keep"))

    async def wake(self, what: str, *, timeout_s: float) -> None:
        """`weights` or `kv_cache`. With both back vLLM samples again; what was frozen is computed once more."""
        await self._within(timeout_s, self._engine.wake_up([what]))

    async def shutdown(self) -> None:
        await asyncio.to_thread(self._engine.shutdown, timeout=_SHUTDOWN_S)


def _generation(output: Any) -> Generation:
    """vLLM's CompletionOutput as arrays. Raises KeyError, TypeError or ValueError for one that is not whole."""
    return Generation(
        ids=np.asarray(output.token_ids, dtype=np.int32),
        logprobs=np.asarray(
            [entry[token].logprob for entry, token in zip(output.logprobs or [], output.token_ids, strict=True)],
            dtype=np.float32,
        ),
        versions=_versions(output),
        finish_reason=output.finish_reason,
    )


def _versions(output: Any) -> np.ndarray:
    """int32 [tokens] from vLLM's spans; an in-flight update leaves two versions in one output."""
    versions = np.full(len(output.token_ids), -1, dtype=np.int32)
    for span in output.weight_versions or ():
        versions[span.start : span.end] = int(span.version)
    if (versions < 0).any():
        raise ValueError(f"tokens without a version: {output.weight_versions}")
    return versions


def _prepare_process() -> None:
    """The environment that vLLM's processes inherit from this one."""
    root = str(Path(__file__).resolve().parents[1])  # where they find `actors.transfer`
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if root not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, paths)])
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # whole GiB, and would override rollout.kv_cache_bytes
