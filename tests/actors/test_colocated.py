"""Who has the devices when: the real driver and the real order of events, over learners and an engine that write down
what happens to them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

import pytest
from clock import Clock
from fakes import FakeLearners, FakePool, MemoryLog, row
from waiting import until

from actors.colocated import KV_CACHE, WEIGHTS, ColocatedLearners, ColocatedPool, DeviceTurn
from actors.rollout import share_devices
from aster.config import Recipe
from aster.data.prompts import PromptStream
from aster.driver import GrpoLoop
from aster.errors import ConfigError, WeightSyncError
from aster.types import PublishReport, TrajectoryGroup


class Device:
    """One GPU's memory, in words: what is on it. Refuses what could not fit a real one."""

    def __init__(self) -> None:
        self.on = {WEIGHTS, KV_CACHE}  # the engine has just started; the learner rests
        self.events: list[str] = []

    def put(self, event: str, *, add: tuple[str, ...] = (), remove: tuple[str, ...] = ()) -> None:
        self.events.append(event)
        self.on = (self.on | set(add)) - set(remove)
        large = self.on & {KV_CACHE, "parameters", "optimizer"}
        assert not (KV_CACHE in self.on and large - {KV_CACHE}), f"{event}: {sorted(self.on)} do not fit together"
        assert not ({WEIGHTS, "optimizer"} <= self.on), f"{event}: {sorted(self.on)} do not fit together"


class Engine:
    def __init__(self, device: Device) -> None:
        self.device, self.lost = device, ""

    async def sleep(self) -> None:
        self.device.put("engine sleeps", remove=(WEIGHTS, KV_CACHE))

    async def wake(self, what: str) -> None:
        self.device.put(f"engine wakes {what}", add=(what,))


class Learners(FakeLearners):
    """Its every call needs all of it on the device."""

    def __init__(self, device: Device) -> None:
        super().__init__(device.events)
        self.device = device

    async def rest(self, *, optimizer_only: bool = False) -> None:
        if optimizer_only:
            self.device.put("optimizer rests", remove=("optimizer",))
        else:
            self.device.put("learners rest", remove=("optimizer", "parameters"))

    async def rise(self) -> None:
        self.device.put("learners rise", add=("optimizer", "parameters"))

    def _check(self) -> None:
        assert self.device.on == {"optimizer", "parameters"}, self.device.on

    async def log_probs(self, *args, **kwargs):
        self._check()
        return await super().log_probs(*args, **kwargs)

    async def forward_backward(self, *args, **kwargs):
        self._check()
        return await super().forward_backward(*args, **kwargs)

    async def optim_step(self):
        self._check()
        return await super().optim_step()

    async def save(self, path: str) -> None:
        self._check()
        self.device.events.append("save")


class Pool(FakePool):
    """Samples only on an engine that is awake, and publishes as `WeightSync` does with a hand-over."""

    def __init__(self, device: Device, turn: DeviceTurn) -> None:
        super().__init__(device.events)
        self.device, self.turn = device, turn
        self.failures: list[BaseException] = []

    async def publish(self, source: object, version: int) -> PublishReport:
        await self.turn.before_weights()
        assert self.device.on == {WEIGHTS, "parameters"}, self.device.on
        if self.failures:
            raise self.failures.pop(0)
        self.device.events.append("weights")
        await self.turn.after_weights()
        return await super().publish(source, version)

    async def groups(self) -> AsyncIterator[TrajectoryGroup]:
        async for group in super().groups():
            while self.device.on != {WEIGHTS, KV_CACHE}:  # noqa: ASYNC110  # frozen; a device raises no event
                await asyncio.sleep(0.005)
            self.device.events.append("sampled")
            yield group


def build(tmp_path, *more: str, idle_s: float = 0.05, **loop) -> tuple[Device, Pool, DeviceTurn, GrpoLoop]:
    device = Device()
    learners = Learners(device)
    turn = DeviceTurn(learners, lambda: [Engine(device)], idle_s=idle_s)
    pool = Pool(device, turn)
    recipe = Recipe.load(
        "rl_stage1_18k",
        [
            "rollout.prompts_per_step=1", "rollout.group_size=2", "algo.mini_batch_prompts=1", "run.val_every=0",
            "run.val_before_train=false", "learner.micro_batch_tokens=64", f"run.dir={tmp_path}", "run.steps=2", *more,
        ],
    )  # fmt: skip
    prompts = PromptStream([row(i) for i in range(8)], batch=1, seed=1, epochs=3)
    return (
        device,
        pool,
        turn,
        GrpoLoop(
            recipe=recipe,
            learners=ColocatedLearners(learners, turn),
            pool=ColocatedPool(pool, turn),
            prompts=prompts,
            log=MemoryLog(),
            decode=lambda ids, *, skip_special=False: "",
            **loop,
        ),
    )


HAND_OVER = ["optimizer rests", "engine wakes weights", "weights", "learners rest", "engine wakes kv_cache"]


async def test_the_same_driver_runs_in_this_order(tmp_path) -> None:
    device, _, _, loop = build(tmp_path, idle_s=3600)  # a slow machine is not idle
    await asyncio.wait_for(loop.run(), 60)
    step = ["sampled", "engine sleeps", "learners rise", "log_probs", "forward_backward", "optim_step", *HAND_OVER]
    happened = [event for event in device.events if not event.startswith("submit")]
    assert [e.split(" v")[0] if e.startswith("publish") else e for e in happened] == [
        *["engine sleeps", "learners rise", *HAND_OVER, "publish"],
        *[*step, "publish"],
        *[*step, "publish"],
    ]


async def test_a_validation_beside_the_step_gets_the_devices_back_before_the_weights_change(tmp_path) -> None:
    device, pool, _, loop = build(tmp_path, "run.val_every=1", "eval.samples=1", val_rows=[row(100)])
    held = asyncio.Event()
    inner = FakePool.groups

    async def slow_validation(self) -> AsyncIterator[TrajectoryGroup]:
        async for group in inner(self):
            if group.kind == "val" and group.step == 1:
                await held.wait()
            yield group

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakePool, "groups", slow_validation)
        running = asyncio.ensure_future(loop.run())
        await until(lambda: device.events.count("optim_step") == 2, seconds=60)
        held.set()
        await asyncio.wait_for(running, 60)
    last = device.events[device.events.index("submit val row-100 at v1") :]
    update, after = last.index("optim_step"), last[last.index("optim_step") :]
    assert "sampled" in after[: after.index("weights")], "what was frozen during the update went on before the weights"
    assert last[update + 1 : update + 4] == ["learners rest", "engine wakes weights", "engine wakes kv_cache"]
    assert pool.version == 2


async def test_a_publication_that_failed_in_the_middle_can_be_made_again(tmp_path) -> None:
    device, pool, _, loop = build(tmp_path, "run.steps=1")
    pool.failures.append(WeightSyncError("bucket 2", restored=0))
    await asyncio.wait_for(loop.run(), 60)
    assert pool.version == 1
    assert device.on == {WEIGHTS, KV_CACHE}


async def test_a_dead_engine_is_left_alone(tmp_path) -> None:
    device, _, turn, _ = build(tmp_path)
    engines = turn._engines()
    engines[0].lost, device.on = "OOM killed", set()
    turn._engines = lambda: engines
    async with turn.learning():
        pass
    assert device.events == ["learners rise"]


async def test_a_reader_of_groups_does_not_take_the_devices_between_two_calls_of_a_step(tmp_path, monkeypatch) -> None:
    device, _, turn, _ = build(tmp_path, idle_s=1000)
    clock, waiting = Clock(monkeypatch), None
    for _ in range(5):
        async with turn.learning():
            waiting = waiting or asyncio.ensure_future(turn.sampling())
            clock.move(5000)
            await asyncio.sleep(0.02)
        clock.move(400)
        await asyncio.sleep(0.02)
    assert not waiting.done()
    assert device.events == ["engine sleeps", "learners rise"]
    clock.move(1000)
    await asyncio.wait_for(waiting, 60)
    assert turn.engines_can_sample


async def test_calls_that_are_cancelled_leave_nobody_waiting(tmp_path) -> None:
    _, _, turn, _ = build(tmp_path)
    entered = asyncio.Event()

    async def call() -> None:
        async with turn.learning():
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.ensure_future(call())
    await entered.wait()
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    await asyncio.wait_for(turn.sampling(), 60)


@pytest.fixture
def recipe_of() -> Callable[..., Recipe]:
    return lambda *more: Recipe.load(
        "rl_stage1_18k", ["cluster.placement=colocated", "learner.world_size=4", "rollout.engines=2", *more]
    )


N0, N1 = "a" * 56, "b" * 56  # Ray's node ids are 28 bytes in hex


def test_engines_live_on_the_gpus_of_consecutive_ranks(recipe_of) -> None:
    ranks = [(N0, "0"), (N0, "1"), (N1, "0"), (N1, "3")]
    options = share_devices(ranks, recipe_of("rollout.tensor_parallel=2"))
    assert [o["runtime_env"]["env_vars"]["CUDA_VISIBLE_DEVICES"] for o in options] == ["0,1", "0,3"]
    assert [o["scheduling_strategy"].node_id for o in options] == [N0, N1]
    with pytest.raises(ConfigError, match=r"engine-0 needs .*tensor_parallel=2 .* ranks 0 to 1 have 2 on 2 nodes"):
        share_devices([ranks[0], *ranks[2:], ranks[1]], recipe_of("rollout.tensor_parallel=2"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.tensor_parallel=4", r"engines=2 x rollout.tensor_parallel=4 = 8 GPUs onto learner.world_size=4"),
        ("rollout.max_staleness=1", r"colocated needs rollout.max_staleness=0, got 1"),
        ("rollout.weight_backend=nccl", r"weight_backend=nccl is for disaggregated: use auto"),
    ],
)
def test_what_cannot_share_devices_is_refused(recipe_of, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe_of(override)
