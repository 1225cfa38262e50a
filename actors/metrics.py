"""What a run tells Prometheus, through `ray.util.metrics`: recorded in each process, scraped from its node's agent.

    RunGauges     the driver's process   a tracking sink: reward, collapse, entropy, throughput, seconds of each phase
    pool_gauges   the driver's process   trajectories in flight and waiting, living engines; every 2 s
    engine_stats  each engine's actor    what vLLM's scheduler says, at most twice a second

Ray puts `ray_` before every name here. The sandbox's own are in serve/metrics.py. deploy/grafana/aster.json draws them;
a test holds every panel of it against `NAMES` and against a real scrape. A run's full record is metrics.jsonl: here is
what one watches, since Prometheus keeps a series for every name and label.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Protocol

from ray.util.metrics import Counter, Gauge

RUN_GAUGES = {  # metric of the run -> (name, what it is)
    "training/global_step": ("aster_step", "rollout steps done"),
    "critic/score/mean": ("aster_reward", "mean reward of the step's trajectories"),
    "train/loss": ("aster_sft_loss", "loss of supervised fine-tuning"),
    "perf/throughput": ("aster_tokens_per_second", "tokens per second and device over the whole step"),
    "perf/total_num_tokens": ("aster_step_tokens", "tokens of the step, prompts included"),
    "response_length/mean": ("aster_response_tokens", "mean tokens of a response"),
    "response_length/clip_ratio": ("aster_response_clip_ratio", "share of responses that ran out of tokens"),
    "actor/entropy": ("aster_entropy", "nats per token, under pi_old"),
    "actor/grad_norm": ("aster_grad_norm", "mean over the step's updates, before clipping"),
    "actor/lr": ("aster_learning_rate", "of the last update"),
    "actor/pg_clipfrac": ("aster_clip_fraction", "share of tokens where the clip binds"),
    "actor/ppo_kl": ("aster_ppo_kl", "nats per token, old against current"),
    "actor/tis_mean": ("aster_importance_weight", "mean weight of learner against engine"),
    "training/mismatch_k3": ("aster_mismatch_k3", "KL of engine and learner, nats per token"),
    "training/staleness_k3": ("aster_staleness_k3", "KL of older weights and learner, nats per token"),
    "training/canary_max_diff": ("aster_canary_max_diff", "largest difference of the canary after a publication"),
    "training/zero_variance_groups_ratio": ("aster_zero_variance_groups", "share of groups without a signal"),
    "training/stale_groups": ("aster_stale_groups", "groups dropped for their age so far"),
    "training/no_signal_steps": ("aster_no_signal_steps", "steps without an update so far"),
    "infra_failed_rate": ("aster_infra_failed_rate", "share of attempts that ended by our own failure"),
    "collapse/calls_mean": ("aster_collapse_calls", "tool calls per trajectory"),
    "collapse/calls_ema": ("aster_collapse_calls_ema", "the moving average that the alarm looks at"),
    "collapse/ratio": ("aster_collapse_ratio", "share of trajectories with at most one call"),
    "collapse/alarm": ("aster_collapse_alarm", "1 while the collapse alarm is on"),
    "collapse/post_hoc_ratio": ("aster_collapse_post_hoc_ratio", "share of callers that call only after the answer"),
    "collapse/state_reuse_ratio": ("aster_collapse_state_reuse_ratio", "share of later calls that use earlier cells"),
    "collapse/recovery_rate": ("aster_collapse_recovery_rate", "share of failed calls followed by one that succeeds"),
    "collapse/advantage_weighted_calls": ("aster_collapse_push", "above 0: the step pushes calls up"),
}
RUN_FAMILIES = {  # prefix and suffix of metrics of the run -> (name, label that the middle becomes, what it is)
    ("timing_s/", ""): ("aster_phase_seconds", "phase", "seconds of a phase of the step"),
    ("collapse/calls_hist/", ""): ("aster_collapse_calls_share", "calls", "share of trajectories by number of calls"),
    ("collapse/entropy/", ""): (
        "aster_collapse_entropy",
        "region",
        "nats per token of thought, code, opening of a call",
    ),
    ("collapse/acc_at_calls/", ""): ("aster_collapse_accuracy", "calls", "accuracy by number of calls"),
    ("causes/", "_ratio"): ("aster_ended_ratio", "cause", "share of attempts by why they ended"),
    ("tool_use_info/tool_execution_", "_ratio"): (
        "aster_tool_ratio",
        "outcome",
        "share of calls by what became of them",
    ),
    ("val-core/", ""): ("aster_validation", "metric", "accuracies of the validation, data source first"),
}
PHASES = frozenset(  # what else is under timing_s/ are times of single trajectories, and a date
    {
        "gen",
        "step",
        "old_log_prob",
        "update_actor",
        "publish",
        "validation_wait",
        "testing",
        "save_checkpoint",
        "record",
    }
)
EVENTS = ("aster_events", "alarms, restarts, roll-backs and the like, by kind")
POOL_GAUGES = {
    "aster_pool_in_flight": "trajectories on an engine or being scored",
    "aster_pool_waiting": "trajectories that no engine has had room for yet",
    "aster_pool_engines": "engines that live",
}
ENGINE_GAUGES = {
    "aster_engine_running": "requests that the engine works on",
    "aster_engine_waiting": "requests in its queue",
    "aster_engine_kv_usage": "share of its KV cache in use",
}
ENGINE_COUNTERS = {
    "aster_engine_generated_tokens": "tokens sampled",
    "aster_engine_prompt_tokens": "tokens of prompts, cached ones included",
    "aster_engine_prefix_queries": "tokens looked up in the prefix cache",
    "aster_engine_prefix_hits": "of these, tokens that were there",
    "aster_engine_preempted": "requests thrown out of the KV cache, to be computed again",
}
NAMES = frozenset(
    {name for name, _ in RUN_GAUGES.values()}
    | {name for name, _, _ in RUN_FAMILIES.values()}
    | {EVENTS[0]}
    | POOL_GAUGES.keys()
    | ENGINE_GAUGES.keys()
    | ENGINE_COUNTERS.keys()
)
_POOL_EVERY_S = 2.0
_ENGINE_EVERY_S = 0.5


class RunGauges:
    """`tracking.Sink`: each value as it was logged last. What is in neither table stays in metrics.jsonl alone."""

    name = "prometheus"

    def __init__(self, run: str) -> None:
        self._run = {"run": run}
        self._gauges = {key: Gauge(name, words, ("run",)) for key, (name, words) in RUN_GAUGES.items()}
        self._families = {
            ends: (label, Gauge(name, words, ("run", label))) for ends, (name, label, words) in RUN_FAMILIES.items()
        }
        self._events = Counter(*EVENTS, tag_keys=("run", "event"))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            if key in self._gauges:
                self._gauges[key].set(value, self._run)
            for (begin, end), (label, gauge) in self._families.items():
                middle = key[len(begin) : len(key) - len(end)]
                if key.startswith(begin) and key.endswith(end) and (label != "phase" or middle in PHASES):
                    gauge.set(value, {**self._run, label: middle})

    def event(self, step: int, kind: str, message: str) -> None:
        self._events.inc(1, {**self._run, "event": kind})

    def close(self) -> None:
        """Nothing: the series end with the process."""


class Pool(Protocol):
    @property
    def in_flight(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def living(self) -> int: ...


@contextlib.asynccontextmanager
async def pool_gauges(pool: Pool, *, run: str) -> AsyncIterator[None]:
    """Keeps the pool's gauges while the body runs."""
    gauges = {name: Gauge(name, words, ("run",)) for name, words in POOL_GAUGES.items()}

    async def look() -> None:
        while True:
            for name, value in zip(POOL_GAUGES, (pool.in_flight, pool.waiting, pool.living), strict=True):
                gauges[name].set(value, {"run": run})
            await asyncio.sleep(_POOL_EVERY_S)

    looking = asyncio.create_task(look(), name="the pool's gauges")
    try:
        yield
    finally:
        looking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await looking  # raises what it failed with


def engine_stats(name: str, *, run: str) -> Callable[[], type]:
    """Makes a stat-logger class for vLLM's `AsyncLLM`, in the process that has vLLM."""
    return functools.partial(_engine_stats, name, run)


def _engine_stats(name: str, run: str) -> type:
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    class EngineStats(PrometheusStatLogger):
        """Sums what the scheduler says in each of its iterations, and passes it on now and then: an iteration takes a
        millisecond or two.

        A `PrometheusStatLogger` in name only, without its constructor: vLLM would add its own, with a hundred series
        that Ray does not scrape, to a list that has none.
        """

        def __init__(self, vllm_config: Any, engine_indexes: list[int] | None = None) -> None:
            tags = {"engine": name, "run": run}
            self._gauges = {g: Gauge(g, words, tuple(tags)) for g, words in ENGINE_GAUGES.items()}
            self._counters = {c: Counter(c, words, tuple(tags)) for c, words in ENGINE_COUNTERS.items()}
            for metric in (*self._gauges.values(), *self._counters.values()):
                metric.set_default_tags(tags)
            self._sums = dict.fromkeys(ENGINE_COUNTERS, 0)
            self._next = 0.0

        def record(
            self,
            scheduler_stats: Any,
            iteration_stats: Any,
            mm_cache_stats: Any = None,
            engine_idx: int = 0,
        ) -> None:
            sums = self._sums
            if iteration_stats is not None:
                sums["aster_engine_generated_tokens"] += iteration_stats.num_generation_tokens
                sums["aster_engine_prompt_tokens"] += iteration_stats.num_prompt_tokens
                sums["aster_engine_preempted"] += iteration_stats.num_preempted_reqs
            if scheduler_stats is None:
                return
            sums["aster_engine_prefix_queries"] += scheduler_stats.prefix_cache_stats.queries
            sums["aster_engine_prefix_hits"] += scheduler_stats.prefix_cache_stats.hits
            idle = not scheduler_stats.num_running_reqs
            if (now := time.monotonic()) < self._next and not idle:  # an idle engine says nothing further
                return
            self._next = now + _ENGINE_EVERY_S
            self._gauges["aster_engine_running"].set(scheduler_stats.num_running_reqs)
            self._gauges["aster_engine_waiting"].set(scheduler_stats.num_waiting_reqs)
            self._gauges["aster_engine_kv_usage"].set(scheduler_stats.kv_cache_usage)
            for counter, value in sums.items():
                if value:
                    self._counters[counter].inc(value)
                    sums[counter] = 0

        def log_engine_initialized(self) -> None:
            """Nothing to say."""

        def log(self) -> None:
            """Nothing to say."""

        def record_sleep_state(self, sleep: int = 0, level: int = 0) -> None:
            """Not exported."""

        def record_admission_rejection(self, reason: str) -> None:
            """Not exported: our requests come from our pool, which waits for room."""

    return EngineStats
