"""An engine of two workers, one of which fails: vLLM's own worker methods, its way of collecting answers, no model."""

from __future__ import annotations

import contextlib
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vllm is not installed: make setup")

from vllm.v1.worker import gpu_worker

from actors.engine import RolloutEngine, _Gate
from actors.transfer import TransferEngine, WorkerExtension
from actors.wire import plan_buckets
from aster.errors import WeightSyncError
from aster.types import TensorMeta


class Transfer:
    """`TransferEngine` without a model: fails where `fail` says so."""

    def __init__(self) -> None:
        self.fail: dict[str, Exception] = {}
        self.calls: list[str] = []

    def __getattr__(self, method: str) -> Any:
        def call(*_: Any) -> None:
            self.calls.append(method)
            if method in self.fail:
                raise self.fail.pop(method)

        return call


class Worker(gpu_worker.Worker, WorkerExtension):
    def __init__(self) -> None:
        self.weight_transfer_engine = Transfer()
        self.vllm_config = None
        self.model_runner = SimpleNamespace(reset_lora_state=lambda: None)
        self._weight_update_active = self._weight_update_is_draft = False


class Executor:
    """As vLLM's multiproc executor: answers lie in a queue per worker, read in order up to the first failure."""

    errored = False

    def __init__(self, workers: list[Worker]) -> None:
        self.workers = workers
        self.answers: list[deque[tuple[bool, Any]]] = [deque() for _ in workers]

    async def collective_rpc(self, method: str, timeout: float | None = None, args: tuple = ()) -> list[Any]:
        for worker, queue in zip(self.workers, self.answers, strict=True):
            try:
                queue.append((True, getattr(worker, method)(*args)))
            except Exception as error:
                queue.append((False, str(error)))
        out = []
        for queue in self.answers:
            fine, answer = queue.popleft()
            if not fine:
                raise RuntimeError(answer)
            out.append(answer)
        return out

    async def pause_generation(self, **_: Any) -> None: ...
    async def update_weight_version(self, version: str) -> None: ...


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> RolloutEngine:
    monkeypatch.setattr(gpu_worker, "set_current_vllm_config", lambda _: contextlib.nullcontext())
    engine = object.__new__(RolloutEngine)
    engine.name = "e0"
    engine._gate = _Gate()
    engine._engine = Executor([Worker(), Worker()])
    return engine


async def round_of(engine: RolloutEngine) -> None:
    await engine.weight_begin(timeout_s=5)
    await engine.weight_receive([TensorMeta("a", "float32", (1,))], timeout_s=5)
    await engine.weight_commit(1, timeout_s=5)


@pytest.mark.parametrize("method", ["start_weight_update", "update_weights", "finish_weight_update"])
@pytest.mark.parametrize("which", [0, 1])
async def test_after_one_worker_of_two_failed_both_can_be_rolled_back(
    engine: RolloutEngine, method: str, which: int
) -> None:
    workers = engine._engine.workers
    workers[which].weight_transfer_engine.fail[method] = WeightSyncError("bucket 3: damaged")
    with pytest.raises(WeightSyncError, match=r"^e0: bucket 3: damaged$"):
        await round_of(engine)
    await engine.weight_close(timeout_s=5)
    assert not any(worker._weight_update_active for worker in workers)
    assert not any(engine._engine.answers), "an answer was left for the next call"
    await round_of(engine)
    for worker in workers:
        assert worker.weight_transfer_engine.calls[-3:] == [
            "update_weights",
            "finish_weight_update",
            "reset_weight_update_target",
        ]


async def test_a_session_that_cannot_be_ended_does_not_stand_in_the_way_of_the_next(engine: RolloutEngine) -> None:
    await engine.weight_begin(timeout_s=5)
    engine._engine.workers[1].weight_transfer_engine.fail["finish_weight_update"] = RuntimeError("half a layer")
    await round_of(engine)
    with pytest.raises(WeightSyncError, match="RuntimeError: finish_weight_update called without"):
        await engine.weight_commit(1, timeout_s=5)


@pytest.mark.parametrize(("count", "order"), [(0, ""), (1, "r0 w0 l0"), (3, "r0 r1 w0 l0 r2 w1 l1 w2 l2")])
def test_a_bucket_is_being_received_while_the_one_before_it_loads(count: int, order: str) -> None:
    """r: the receive is posted, w: waited for, l: the caller has the bytes."""
    events: list[str] = []

    class Wire:
        def receive(self, size: int) -> Any:
            number = sum(event.startswith("r") for event in events)
            events.append(f"r{number}")
            return SimpleNamespace(wait=lambda: events.append(f"w{number}") or number)

    buckets = plan_buckets([TensorMeta(f"t{i}", "float32", (4,)) for i in range(count)], bucket_bytes=16)
    for bucket, number in TransferEngine._received(Wire(), buckets):
        assert bucket.index == number
        events.append(f"l{number}")
    assert " ".join(events) == order
