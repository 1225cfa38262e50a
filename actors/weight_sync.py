"""Publication of a policy: one object owns the hand-over from the learner gang to every engine, and proves it.

    WeightSync (driver)      engines                                   learner ranks
    open, once               join the group (rank_offset each)         rank 0 serves the rendezvous and joins
    begin                    gate shut, pause(keep), reload started
    transfer                 receive, check, load each bucket    <---  pack, seal, broadcast; ranks > 0 gather along
    commit                   reload finished, version set              canary, while the engines still load
    verify                   resumed behind the gate: canary                                    or reject: gate shut
    keep                                                               what was sent is kept
    accept                   gate open

Invariant: no token leaves an engine that was sampled by weights whose bytes, load and canary are not proven. The bytes
have checksums. The load is proven by the worker, in any precision: an element that was not written is found and its
parameter named (`reload_proof.py`). The canary compares log-probs with the learner's and is for what was written wrong:
in fp32 it sees a single tensor, in bf16 nothing below rounding, so that it would pass the weights of some steps before.

A publication that fails is rolled back: learner rank 0 sends what it published last once more (checksums and all), the
canary must have the log-probs that were recorded then, and the engines serve that version again. They stay shut when
there is nothing to go back to, or when that fails too; the next publication that succeeds opens them.

All three backends run this control flow: `gloo` and `nccl` (ours, `wire.py`) and `vllm_nccl` (vLLM's own engine: canary
only, no checksums, no proof of the load and no roll-back).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol

import numpy as np
import ray
from ray.exceptions import RayActorError, RayError

from actors.rollout import RayEngine
from actors.weight_sender import WeightSender
from actors.wire import dtype_of
from aster.algo.packing import pack
from aster.errors import EngineLost, GangFailure, WeightSyncError
from aster.types import PublishReport, Sample, TensorMeta, TokenScores

__all__ = ["RayWeightSource", "WeightSender", "WeightSync"]

log = logging.getLogger("aster")

_MARGIN_S = 30.0  # a call inside an actor must end first, so that its own words arrive instead of our timeout
_CANARY_TOKENS = 16  # both sides compute them while nothing else runs; one wrong tensor moves them all
_EXACT_NATS = 1e-4  # fp32 on both sides: 4e-5 was the largest difference in 768 tokens of a 135M model
_EXACT_RELATIVE = 1e-5  # of the log-prob itself, for ids that the model finds absurd
_MEAN_NATS = 0.2  # bf16 on either side: 0.03 to 0.04 on average, so this is five times the noise; a step moves less


@dataclass
class RayWeightSource:
    """The learner gang, seen from the pool (`roles.WeightSource`). Every call goes to all ranks: they are collectives.

    A dead rank is `GangFailure`; a late one `WeightSyncError`.
    """

    ranks: Sequence[Any]  # actor handles of `Learner`, rank by rank
    timeout_s: float = 600.0  # of the wire inside a call; the call itself gets `_MARGIN_S` more
    died: Callable[[GangFailure], None] | None = None  # ends the others, which wait for the dead one in a collective
    _tensors: list[TensorMeta] = field(default_factory=list, repr=False)

    def metadata(self) -> Sequence[TensorMeta]:
        """Every tensor in wire order. Blocks on the first call; inside a loop use `describe`."""
        if not self._tensors:
            self._tensors = ray.get(self.ranks[0].weight_metadata.remote(), timeout=self.timeout_s)
        return self._tensors

    async def describe(self) -> list[TensorMeta]:
        if not self._tensors:
            self._tensors = await self._call(0, "weight_metadata")
        return self._tensors

    async def address(self) -> tuple[str, int]:
        host, port = await self._call(0, "weight_address")
        return host, port

    async def open(
        self, *, backend: str, host: str, port: int, world_size: int, timeout_s: float, senders: int = 1
    ) -> None:
        more = {"senders": senders} if senders > 1 else {}
        await self._all(
            "weight_open", backend=backend, host=host, port=port, world_size=world_size, timeout_s=timeout_s, **more
        )

    async def send(self, *, bucket_bytes: int, hold: bool) -> list[str]:
        digests: list[str] = (await self._all("weight_send", bucket_bytes=bucket_bytes, hold=hold))[0]
        return digests

    async def keep(self) -> None:
        """What was sent last is good: rank 0 holds it for `resend`."""
        await self._call(0, "weight_keep")

    async def resend(self, *, bucket_bytes: int) -> list[str]:
        """What was kept last, once more. Only rank 0 has it."""
        digests: list[str] = await self._call(0, "weight_resend", bucket_bytes=bucket_bytes)
        return digests

    async def close(self) -> None:
        await self._all("weight_close")

    async def log_probs(self, ids: np.ndarray) -> np.ndarray:
        """log p(ids[t] | ids[:t]) for t >= 1 at the training temperature, float32 [len(ids) - 1]."""
        row = pack([Sample(ids=ids, mask=np.ones(len(ids), bool))], row_tokens=len(ids), dp_size=1)[0][0]
        scores: list[TokenScores] = await self._all("log_probs", row)
        return scores[0].logprobs[:-1]

    async def _all(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        return list(await asyncio.gather(*(self._call(r, method, *args, **kwargs) for r in range(len(self.ranks)))))

    async def _call(self, rank: int, method: str, *args: Any, **kwargs: Any) -> Any:
        deadline_s = self.timeout_s + _MARGIN_S
        try:
            return await asyncio.wait_for(getattr(self.ranks[rank], method).remote(*args, **kwargs), deadline_s)
        except TimeoutError:
            raise WeightSyncError(f"learner rank {rank}: {method} did not return within {deadline_s:g} s") from None
        except RayActorError as error:
            failure = GangFailure(rank, str(error))
            if self.died is not None:
                self.died(failure)
            raise failure from error
        except RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, WeightSyncError):
                raise cause from None
            raise WeightSyncError(f"learner rank {rank}: {method} failed: {cause or error}") from error


@dataclass(frozen=True)
class _Good:
    """The last publication that verified: what a roll-back restores."""

    version: int
    canary: np.ndarray  # float32 [len(canary ids) - 1], the learner's log-probs of it
    source: RayWeightSource  # the gang that published it; another one has no copy


class Handover(Protocol):
    """Devices that learners and engines share (`colocated.DeviceTurn`)."""

    async def before_weights(self) -> None:
        """Both sides have their weights on the device when this returns."""
        ...

    async def after_weights(self) -> None:
        """The engines have all of it when this returns."""
        ...


class WeightSync:
    """Publishes to the engines that it was given and those that it admitted since (`router.Publisher`). One publication
    at a time."""

    def __init__(
        self,
        engines: Sequence[RayEngine],
        *,
        backend: str = "auto",
        bucket_bytes: int = 64 << 20,
        canary_ids: np.ndarray | None = None,
        canary_nats: float | None = None,
        rollback: bool = True,
        handover: Handover | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        """`canary_ids` [n] int; null = fixed random ids. `canary_nats`: largest (fp32) or mean (bf16) difference of
        log-probs that passes; null = 1e-4 or 0.2. `rollback`: learner rank 0 holds a copy of what was published, to
        send it again after a failure (`weight_sender.py` says what it weighs). `handover`: of devices that both sides
        share. `timeout_s` bounds every single step and every broadcast."""
        assert engines, "an engine at least"
        actual = engines[0].weight_backend
        if backend not in ("auto", actual):
            raise ValueError(f"weight backend {backend!r} was asked for, but the engines were started with {actual!r}")
        self._engines = list(engines)
        self._backend = actual
        self._bucket_bytes = bucket_bytes
        self._timeout_s = timeout_s
        self._exact = engines[0].exact
        self._nats = canary_nats if canary_nats is not None else _EXACT_NATS if self._exact else _MEAN_NATS
        if canary_ids is None:
            canary_ids = np.random.default_rng(0).integers(0, engines[0].vocab_size, _CANARY_TOKENS)
        self._canary = np.asarray(canary_ids, dtype=np.int32)[: engines[0].max_model_len - 1]
        # the stock sender's stream cannot be recorded, and over IPC rank 0's copy would reach rank 0's device only
        self._rollback = rollback and actual not in ("vllm_nccl", "ipc")
        self._handover = handover
        self._good: _Good | None = None
        self._published = False
        self._phases: dict[str, float] = {}  # seconds of the publication under way
        self._members: tuple[Any, ...] = ()  # who is in the open group; () = none is open
        self._lock = asyncio.Lock()

    async def publish(self, source: RayWeightSource, version: int) -> PublishReport:
        """Bring every living engine to the learner's weights, labelled `version`.

        An engine that dies on the way is left out and the rest is served. Raises `WeightSyncError` naming the bucket or
        the canary token that disagrees, and in `restored` the version that was rolled back to; `EngineLost` when no
        engine is left; `GangFailure`.
        """
        async with self._lock:
            began = time.perf_counter()
            self._phases = {}
            tensors = await source.describe()
            try:
                engines, worst = await self._deliver(source, tensors, version)
                self._published = True
            except WeightSyncError as error:
                raise await self._roll_back(source, tensors, error) from error
            return PublishReport(
                version=version,
                bytes=sum(prod(m.shape) * dtype_of(m).itemsize for m in tensors),
                seconds=time.perf_counter() - began,
                engines=engines,
                canary_max_diff=worst,
                phases=dict(self._phases),
            )

    async def admit(self, engine: RayEngine) -> bool:
        """Bring a new engine, and it alone, to the version that verified last; the others go on meanwhile.

        False where no copy of that version is held: it takes part from the next publication on. Raises what `publish`
        raises; the engine is forgotten then.
        """
        async with self._lock:
            self._phases = {}
            if self._good is not None:
                tensors = await self._good.source.describe()
                await self._deliver(
                    self._good.source, tensors, self._good.version, recorded=self._good.canary, among=[engine]
                )
            self._engines.append(engine)
            return self._good is not None or not self._published

    async def _roll_back(
        self, source: RayWeightSource, tensors: list[TensorMeta], error: WeightSyncError
    ) -> WeightSyncError:
        """Bring the engines back to the last good version. Returns the error to raise: what failed, what serves."""
        good = self._good
        if not self._rollback:
            return WeightSyncError(f"{error}; no copy of the last version is held, so the engines stay shut")
        if good is None or tuple(good.source.ranks) != tuple(source.ranks):
            return WeightSyncError(f"{error}; this learner published nothing before, so the engines stay shut")
        log.error("rolling back to version %d: %s", good.version, error)
        try:
            await self._deliver(source, tensors, good.version, recorded=good.canary)
        except (WeightSyncError, EngineLost) as second:
            return WeightSyncError(
                f"{error}; the roll-back to version {good.version} failed too, so the engines stay shut: {second}"
            )
        return WeightSyncError(f"{error}; the engines serve version {good.version} again", good.version)

    async def _deliver(
        self,
        source: RayWeightSource,
        tensors: list[TensorMeta],
        version: int,
        *,
        recorded: np.ndarray | None = None,
        among: Sequence[RayEngine] | None = None,
    ) -> tuple[int, float]:
        """One version to every living engine (`among` some): (how many there are, the canary's largest difference).

        `recorded`: send the kept copy instead of the learner's weights, and expect these log-probs of the canary.
        """
        while True:
            known = self._engines if among is None else among
            engines = [engine for engine in known if not engine.lost]
            if not engines:
                raise EngineLost(
                    "no engine is left to publish to: " + "; ".join(f"{e.name} is dead: {e.lost}" for e in known)
                )
            try:
                if self._handover is not None:
                    await self._timed("before_weights", self._handover.before_weights())
                await self._join(source, engines)
                ours, *_ = await _together(
                    [self._feed(source, recorded), *(self._load(engine, tensors, version) for engine in engines)]
                )
                if self._handover is not None:
                    await self._timed("after_weights", self._handover.after_weights())
                worst = await self._verify(engines, ours, version)
                if recorded is None and self._rollback:
                    # before a gate opens: where one is late, the copy and its label are of one version all the same
                    await source.keep()
                    self._good = _Good(version, ours, source)
                await _together([self._one(engine, "weight_accept") for engine in engines])
                return len(engines), worst
            except EngineLost as error:
                await self._leave(source, engines)
                await asyncio.gather(*(engine.probe() for engine in engines))
                if not any(engine.lost for engine in engines):
                    raise WeightSyncError(f"version {version} was not published: {error}") from error
                log.error("version %d is published again without the engine that died: %s", version, error)
            except BaseException:
                await self._leave(source, engines)
                raise

    async def _join(self, source: RayWeightSource, engines: Sequence[RayEngine]) -> None:
        """Open the group with exactly these engines, unless it is open already."""
        members = (*source.ranks, *(engine.name for engine in engines))
        if members == self._members:
            return
        if self._members:
            await self._leave(source, engines)
        host, port = await source.address()
        senders = len(source.ranks) if self._backend == "ipc" else 1
        world_size = senders + sum(engine.workers for engine in engines)
        joining: list[Awaitable[Any]] = [
            source.open(
                backend=self._backend,
                host=host,
                port=port,
                world_size=world_size,
                timeout_s=self._timeout_s,
                senders=senders,
            )
        ]
        offset = senders
        for engine in engines:
            info = self._init_info(host=host, port=port, rank_offset=offset, world_size=world_size)
            if self._backend == "ipc":
                info["senders"] = senders
            joining.append(self._one(engine, "weight_open", info))
            offset += engine.workers
        await _together(joining)
        self._members = members

    def _init_info(self, *, host: str, port: int, rank_offset: int, world_size: int) -> dict[str, Any]:
        if self._backend == "vllm_nccl":  # packed, as the stock sender's default; both take vLLM's default buffer size
            rendezvous = {"master_address": host, "master_port": port, "packed": True}
            return rendezvous | {"rank_offset": rank_offset, "world_size": world_size}
        return {
            "backend": self._backend,
            "host": host,
            "port": port,
            "rank_offset": rank_offset,
            "world_size": world_size,
            "bucket_bytes": self._bucket_bytes,
            "timeout_s": self._timeout_s,
        }

    async def _feed(self, source: RayWeightSource, recorded: np.ndarray | None) -> np.ndarray:
        """The learner's part: send, then the canary. Returns its log-probs, float32 [len(canary) - 1]."""
        if recorded is not None:
            await self._timed("send", source.resend(bucket_bytes=self._bucket_bytes))
            return recorded
        await self._timed("send", source.send(bucket_bytes=self._bucket_bytes, hold=self._rollback))
        ours: np.ndarray = await self._timed("canary", source.log_probs(self._canary))
        return ours

    async def _load(self, engine: RayEngine, tensors: list[TensorMeta], version: int) -> None:
        """The part of one engine, up to the new weights behind its shut gate."""
        try:
            await self._one(engine, "weight_begin")
            await self._one(engine, "weight_receive", tensors)
            await self._one(engine, "weight_commit", version)
        except BaseException:
            await self._quietly(self._one(engine, "weight_close"))  # with gloo the sender then stops waiting for it
            raise

    async def _verify(self, engines: Sequence[RayEngine], ours: np.ndarray, version: int) -> float:
        """The canary through every engine, against the learner's log-probs. Returns the largest difference in nats.

        What an engine sampled behind its gate is lost unless all of them pass.
        """
        try:
            theirs = await _together([self._one(engine, "weight_verify", self._canary, 1) for engine in engines])
            return max(self._compare(e.name, t, ours, version) for e, t in zip(engines, theirs, strict=True))
        except BaseException:
            await self._quietly(*(self._one(engine, "weight_reject") for engine in engines if not engine.lost))
            raise

    def _compare(self, engine: str, theirs: np.ndarray, ours: np.ndarray, version: int) -> float:
        """The largest difference; `WeightSyncError` if it is too large."""
        gap = np.abs(theirs - ours)
        if self._exact:
            passes = bool((gap <= self._nats + _EXACT_RELATIVE * np.abs(ours)).all())
        else:
            passes = bool(gap.mean() <= self._nats)
        if passes:
            return float(gap.max())
        at = int(np.argmax(np.where(np.isnan(gap), np.inf, gap)))
        raise WeightSyncError(
            f"version {version} does not verify on {engine}: canary token {at + 1} of {len(ours)} has "
            f"log-prob {theirs[at]:.6g} there and {ours[at]:.6g} in the learner (mean difference "
            f"{gap.mean():.3g}, allowed {self._nats:g}{' at most' if self._exact else ' on average'}); every "
            "bucket arrived as sent, so a tensor was loaded wrongly or not at all"
        )

    async def _leave(self, source: RayWeightSource, engines: Sequence[RayEngine]) -> None:
        """Take the group down, whatever state its members are in; the next publication builds a new one."""
        self._members = ()
        await self._quietly(source.close(), *(self._one(engine, "weight_close") for engine in engines))

    async def _one(self, engine: RayEngine, method: str, *args: Any) -> Any:
        call = engine.call(method, *args, timeout_s=self._timeout_s, deadline_s=self._timeout_s + _MARGIN_S)
        return await self._timed(method.removeprefix("weight_"), call)

    async def _timed(self, phase: str, call: Awaitable[Any]) -> Any:
        began = time.perf_counter()
        result = await call
        self._phases[phase] = max(self._phases.get(phase, 0.0), time.perf_counter() - began)
        return result

    @staticmethod
    async def _quietly(*calls: Coroutine[Any, Any, Any]) -> None:
        for result in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(result, Exception):
                log.warning("while closing the weight group: %s", result)


async def _together(calls: Sequence[Awaitable[Any]]) -> list[Any]:
    """All results in order; waits for all even if one fails, then raises the failure that explains the others.

    Whoever saw the bad bucket knows more than the peers, who only see a closed connection; among equals the first.
    """
    failures: list[BaseException] = []

    async def watched(call: Awaitable[Any]) -> Any:
        try:
            return await call
        except BaseException as error:
            failures.append(error)
            raise

    results = await asyncio.gather(*(watched(call) for call in calls), return_exceptions=True)
    if failures:
        raise min(failures, key=_explains)
    return list(results)


def _explains(failure: BaseException) -> int:
    order = (asyncio.CancelledError, GangFailure, EngineLost, WeightSyncError)
    return next((i for i, kind in enumerate(order) if isinstance(failure, kind)), len(order))
