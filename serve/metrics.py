"""What a pool tells Prometheus, through `ray.util.metrics`: recorded in the replica's own process, scraped per node.

No message is sent per call. Every name begins with `aster_sandbox_` (Ray puts `ray_` before it) and carries the node.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import AsyncIterator, Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from serve.replica import SandboxReplica
from serve.schema import ExecuteRequest, ExecuteResponse, OutputChunk
from serve.settings import PoolSettings

_SECONDS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0]
_GAUGES = {"sessions": "open sessions", "cells": "cells", "running": "calls that run", "waiting": "calls that wait"}
_COUNTS = {
    "created": ("sessions_opened", "sessions opened, copies included"),
    "lost": ("sessions_lost", "sessions lost with their cell"),
    "replayed": ("sessions_replayed", "sessions rebuilt from their journal"),
    "adopted": ("sessions_adopted", "sessions taken over from a pool that ended"),
    "swept": ("cells_swept", "orphaned cells removed"),
}


class PoolMetrics:
    """`executed` after every call; `gauges` now and then, with what `SandboxPool.stats` says."""

    def __init__(self, node: str) -> None:
        tags = {"node": node}
        keys = tuple(tags)
        self._calls = Counter("aster_sandbox_calls", "cells executed, by status", tag_keys=("status", "state", *keys))
        self._calls.set_default_tags(tags)
        self._duration = Histogram("aster_sandbox_duration_s", "seconds a cell ran", _SECONDS, tag_keys=keys)
        self._duration.set_default_tags(tags)
        self._queue = Histogram("aster_sandbox_queue_s", "seconds a call waited for its turn", _SECONDS, tag_keys=keys)
        self._queue.set_default_tags(tags)
        self._gauges = {name: Gauge(f"aster_sandbox_{name}", words, tag_keys=keys) for name, words in _GAUGES.items()}
        self._counts = {
            key: Counter(f"aster_sandbox_{name}", words, tag_keys=keys) for key, (name, words) in _COUNTS.items()
        }
        for metric in (*self._gauges.values(), *self._counts.values()):
            metric.set_default_tags(tags)
        self._told: Tally[str] = Tally()

    def executed(self, answer: ExecuteResponse) -> None:
        self._calls.inc(tags={"status": answer.status.value, "state": answer.state.value})
        self._duration.observe(answer.duration_s)
        self._queue.observe(answer.queue_s)

    def gauges(self, stats: Mapping[str, Any]) -> None:
        """The pool's numbers as they are; its running totals by what was added since the last time."""
        for name, gauge in self._gauges.items():
            gauge.set(float(stats[name]))
        for key, counter in self._counts.items():
            new = int(stats.get(key, 0)) - self._told[key]
            if new > 0:
                counter.inc(new)
                self._told[key] += new


class MeteredReplica(SandboxReplica):
    """A pool's replica that keeps `PoolMetrics`. Its gauges follow Serve's poll of the routing stats, every 2 s."""

    async def __init__(self, settings: PoolSettings) -> None:  # type: ignore[misc]  # Serve awaits it
        await super().__init__(settings)
        self._metrics = PoolMetrics(self.owner)

    async def execute(self, session_id: str, request: ExecuteRequest) -> ExecuteResponse:
        answer = await super().execute(session_id, request)
        self._metrics.executed(answer)
        return answer

    async def execute_stream(
        self, session_id: str, request: ExecuteRequest
    ) -> AsyncIterator[OutputChunk | ExecuteResponse]:
        async for event in super().execute_stream(session_id, request):
            if isinstance(event, ExecuteResponse):
                self._metrics.executed(event)
            yield event

    async def record_routing_stats(self) -> dict[str, int]:  # type: ignore[override]  # Serve takes either
        self._metrics.gauges(await self.stats())
        return super().record_routing_stats()
