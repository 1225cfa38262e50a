"""One set of devices for learners and engines (`cluster.placement: colocated`): whose turn it is, and how it changes.

    learners up, engines asleep     log_probs, forward_backward, optim_step, save, load
        | publish                   1 the learners' optimizer rests          4 learners rest
        |                           2 engines wake their weights             5 engines wake their KV cache
        v                           3 weights over CUDA IPC, canary          6 canary, gate open
    engines awake, learners rest    sampling
        | a call of the learners    1 engines sleep: requests frozen, weights in host memory, KV cache dropped
        v                           2 learners rise
    learners up, engines asleep     ...

Nothing is ever up on both sides but between 2 and 4, where the weights have to exist twice: there the KV cache and the
optimizer's state, the two large ones, are both away. What was frozen is computed again when the engines wake. The same
driver runs either placement; that it does not know is why the turn follows its calls: a call of the learners takes the
devices, and a reader of groups gets them back when the learners have not been called for a while (a validation that
began beside the last step and has to end before the next publication).

The order is tested with fakes. It has not been run on a GPU.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

from aster.roles import RolloutPool
from aster.types import (
    MicroBatch,
    OptimStats,
    PublishReport,
    RolloutWork,
    StepStats,
    TokenScores,
    Trajectory,
    TrajectoryGroup,
)

log = logging.getLogger("aster")

_IDLE_S = 2.0  # between two calls of a step the driver packs rows; that takes less
_LOOK_S = 0.5

WEIGHTS, KV_CACHE = "weights", "kv_cache"  # vLLM's names of what wakes


class SleepingEngine(Protocol):
    lost: str

    async def sleep(self) -> None:
        """Freeze what runs, move the weights to host memory, drop the KV cache."""
        ...

    async def wake(self, what: str) -> None:
        """`WEIGHTS` or `KV_CACHE`; it samples again when both are back."""
        ...


class RestingLearners(Protocol):
    async def rest(self, *, optimizer_only: bool = False) -> None:
        """Move what the ranks hold to host memory, and give the device's memory back."""
        ...

    async def rise(self) -> None:
        """All of it back onto the devices."""
        ...


class DeviceTurn:
    """Owns the order of events. Its methods may be called in any order and again after a failure in the middle."""

    def __init__(
        self, learners: RestingLearners, engines: Callable[[], Sequence[SleepingEngine]], *, idle_s: float = _IDLE_S
    ) -> None:
        """Begins as things are after the start: learners at rest, engines awake. `engines()`: all, the dead too."""
        self._learners = learners
        self._engines = engines
        self._idle_s = idle_s
        self._lock = asyncio.Lock()  # one change at a time
        self._awake: set[str] = {WEIGHTS, KV_CACHE}
        self._parameters_up = self._optimizer_up = False
        self._calls = 0  # of the learners, under way
        self._called_at = -idle_s

    @property
    def engines_can_sample(self) -> bool:
        return self._awake == {WEIGHTS, KV_CACHE}

    @contextlib.asynccontextmanager
    async def learning(self) -> AsyncIterator[None]:
        """Around one call of the learners: takes the devices first, if the engines have them."""
        self._calls += 1
        try:
            async with self._lock:
                await self._to_learners()
            yield
        finally:
            self._calls -= 1
            self._called_at = asyncio.get_running_loop().time()

    async def sampling(self) -> None:
        """Until the engines have the devices: now, or when the learners have been idle for a while."""
        while not self.engines_can_sample:
            idle = asyncio.get_running_loop().time() - self._called_at
            if self._calls or idle < self._idle_s:
                await asyncio.sleep(_LOOK_S if self._calls else min(self._idle_s - idle, _LOOK_S))
                continue
            async with self._lock:
                if not self._calls:
                    await self._to_engines()

    async def before_weights(self) -> None:
        """1 and 2: room for the weights to exist twice."""
        async with self._lock:
            await self._to_learners(optimizer=False)
            await self._learners.rest(optimizer_only=True)
            self._optimizer_up = False
            await self._wake(WEIGHTS)

    async def after_weights(self) -> None:
        """4 and 5: the engines have what they need."""
        async with self._lock:
            await self._to_engines()

    async def _to_learners(self, *, optimizer: bool = True) -> None:
        if self._awake:
            await asyncio.gather(*(engine.sleep() for engine in self._living()))
            self._awake = set()
        if not self._parameters_up or (optimizer and not self._optimizer_up):
            await self._learners.rise()
            self._parameters_up = self._optimizer_up = True

    async def _to_engines(self) -> None:
        if self._parameters_up or self._optimizer_up:
            await self._learners.rest()
            self._parameters_up = self._optimizer_up = False
        await self._wake(WEIGHTS)
        await self._wake(KV_CACHE)

    async def _wake(self, what: str) -> None:
        if what not in self._awake:
            await asyncio.gather(*(engine.wake(what) for engine in self._living()))
            self._awake.add(what)

    def _living(self) -> list[SleepingEngine]:
        return [engine for engine in self._engines() if not engine.lost]


class ColocatedLearners:
    """`roles.LearnerGroup` whose every call on the devices takes the turn."""

    def __init__(self, inner: Any, turn: DeviceTurn) -> None:
        self.inner = inner
        self.dp_size: int = inner.dp_size
        self._turn = turn

    async def log_probs(
        self, microbatch_per_rank: Sequence[MicroBatch], *, reference: bool = False
    ) -> list[TokenScores]:
        async with self._turn.learning():
            scores: list[TokenScores] = await self.inner.log_probs(microbatch_per_rank, reference=reference)
        return scores

    async def forward_backward(
        self, microbatch_per_rank: Sequence[MicroBatch], *, num_loss_tokens: int, num_groups: int
    ) -> StepStats:
        async with self._turn.learning():
            stats: StepStats = await self.inner.forward_backward(
                microbatch_per_rank, num_loss_tokens=num_loss_tokens, num_groups=num_groups
            )
        return stats

    async def optim_step(self) -> OptimStats:
        async with self._turn.learning():
            stats: OptimStats = await self.inner.optim_step()
        return stats

    def weight_source(self) -> Any:
        return self.inner.weight_source()

    async def save(self, path: str) -> None:
        async with self._turn.learning():
            await self.inner.save(path)

    async def saved(self) -> None:
        await self.inner.saved()  # files only

    async def load(self, path: str) -> int:
        async with self._turn.learning():
            version: int = await self.inner.load(path)
        return version

    async def save_hf(self, path: str, *, dtype: str | None = None) -> None:
        async with self._turn.learning():
            await self.inner.save_hf(path, dtype=dtype)

    async def close(self) -> None:
        await self.inner.close()


class ColocatedPool:
    """`roles.RolloutPool` that samples only while the engines have the devices. The publisher makes the hand-over."""

    def __init__(self, inner: RolloutPool, turn: DeviceTurn) -> None:
        self.inner = inner
        self.turn = turn

    def submit(self, work: RolloutWork) -> None:
        self.inner.submit(work)  # engines that sleep queue it

    async def groups(self) -> AsyncIterator[TrajectoryGroup]:
        stream = self.inner.groups()
        while True:
            coming = asyncio.ensure_future(anext(stream))
            try:
                while not coming.done():
                    await self.turn.sampling()
                    await asyncio.wait([coming], timeout=_LOOK_S)  # the learners may take the devices meanwhile
                yield await coming
            finally:
                coming.cancel()

    async def publish(self, source: Any, version: int) -> PublishReport:
        return await self.inner.publish(source, version)

    async def drain(self) -> list[Trajectory]:
        await self.turn.sampling()  # an aborted request answers from an engine that is awake
        return await self.inner.drain()

    async def close(self) -> None:
        await self.inner.close()
