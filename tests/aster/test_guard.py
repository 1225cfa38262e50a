"""What `collapse.on_alarm` does, with the real tracker and real checkpoint directories."""

import io
import json
from dataclasses import replace

import pytest
from fakes import FakeLearners, FakePool, row
from rich.console import Console

from aster.checkpoints import DirectoryCheckpointer
from aster.config import Recipe
from aster.data.prompts import PromptStream
from aster.driver import GrpoLoop
from aster.errors import CollapseStopped
from aster.guard import CollapseGuard
from aster.tracking import Tracker, read_events, read_metrics
from aster.types import ToolCall, ToolOutcome, Turn

HEALTHY, DYING = (4.0, 0.0), (1.0, 0.9)


class Run:
    """The loop around a guard: an update, a line of metrics, the guard, a checkpoint after every step."""

    def __init__(self, tmp_path, *overrides, keep=9):
        self.recipe = Recipe.load(
            "rl_stage1_18k", [f"run.dir={tmp_path}", "run.name=r", "run.tensorboard=false", *overrides]
        )
        model = tmp_path / "model"
        model.mkdir(exist_ok=True)
        self.learners = FakeLearners([])
        self.checkpoints = DirectoryCheckpointer(
            tmp_path / "r" / "checkpoints", model_path=str(model), config_hash="abc", keep=keep
        )
        self.tracker = Tracker.open(self.recipe, total_steps=9, console=Console(file=io.StringIO()))
        self.guard = CollapseGuard(self.recipe.collapse, self.tracker)
        self.step = 0

    async def go(self, *steps):
        for calls, ratio in steps:
            self.step += 1
            self.learners.updates += 1
            self.tracker.log(self.step, {"collapse/calls_mean": calls, "collapse/ratio": ratio})
            back = await self.guard.after_step(self.step, checkpoints=self.checkpoints, learners=self.learners)
            if back is not None:
                self.step = back
                continue
            await self.checkpoints.save(self.step, self.learners, {})
        await self.checkpoints.finish()

    def events(self):
        return [(e["step"], e["event"]) for e in read_events(self.tracker.run_dir / "metrics.jsonl")]


async def test_by_default_the_alarm_is_a_word_and_the_run_goes_on(tmp_path):
    run = Run(tmp_path)
    await run.go(HEALTHY, DYING, DYING)
    assert (run.step, run.learners.updates) == (3, 3)
    assert run.events() == [(2, "collapse")]


async def test_stop_ends_the_run_and_says_which_checkpoints_are_healthy(tmp_path):
    run = Run(tmp_path, "collapse.on_alarm=stop")
    with pytest.raises(CollapseStopped, match=r"since step 4.* checkpoints of step 2 and before"):
        await run.go(HEALTHY, HEALTHY, HEALTHY, DYING)


async def test_a_rollback_returns_to_weights_whose_own_rollouts_were_healthy(tmp_path):
    run = Run(tmp_path, "collapse.on_alarm=rollback")
    await run.go(HEALTHY, HEALTHY, HEALTHY, DYING)
    # The alarm is on since step 4, sampled by the weights of step 3: those of step 2 are the newest healthy ones.
    assert (run.step, run.learners.updates) == (2, 2)
    assert run.events() == [(4, "collapse"), (4, "rollback")]
    assert json.loads((run.checkpoints.directory / "global_step_2" / "driver.json").read_text())["step"] == 2
    assert run.checkpoints.latest() == str(run.checkpoints.directory / "global_step_2"), "a restart begins there too"
    assert (run.checkpoints.directory / "global_step_3.rolled_back").is_dir()


async def test_after_a_rollback_the_alarm_has_forgotten_what_was_undone(tmp_path):
    run = Run(tmp_path, "collapse.on_alarm=rollback")
    await run.go(HEALTHY, HEALTHY, HEALTHY, DYING, HEALTHY, HEALTHY)
    assert (run.step, run.learners.updates) == (4, 4)
    assert run.tracker.alarm_since is None
    assert run.events() == [(4, "collapse"), (4, "rollback"), (3, "collapse_over")]
    assert [v["collapse/alarm"] for v in read_metrics(run.tracker.run_dir / "metrics.jsonl").values()] == [0, 0, 0, 0]


async def test_a_cause_that_is_still_there_ends_the_run_after_so_many_rollbacks(tmp_path):
    run = Run(tmp_path, "collapse.on_alarm=rollback", "collapse.max_rollbacks=2")
    ill_again = (HEALTHY, HEALTHY, DYING)
    with pytest.raises(CollapseStopped, match=r"again after 2 roll-back\(s\)"):
        await run.go(HEALTHY, *ill_again, *ill_again, *ill_again)
    assert run.guard.rollbacks == 2


async def test_without_a_checkpoint_from_before_the_alarm_the_run_goes_on_and_says_so_once(tmp_path):
    run = Run(tmp_path, "collapse.on_alarm=rollback")
    await run.go(DYING, DYING, DYING)
    assert (run.step, run.learners.updates) == (3, 3)
    assert run.events() == [(1, "collapse"), (1, "rollback_impossible")]


async def test_a_pruned_checkpoint_cannot_be_gone_back_to(tmp_path):
    run = Run(tmp_path, "collapse.on_alarm=rollback", keep=1)
    await run.go(HEALTHY, HEALTHY, HEALTHY, DYING)
    assert [kind for _, kind in run.events()] == ["collapse", "rollback_impossible"]
    assert "run.keep_checkpoints" in read_events(run.tracker.run_dir / "metrics.jsonl")[-1]["message"]


class DyingPool(FakePool):
    """Three calls a trajectory, and none while `poisoned` says so."""

    def __init__(self, events, poisoned):
        super().__init__(events)
        self.poisoned = poisoned

    async def groups(self):
        async for group in super().groups():
            call = ToolCall("1", "ok", ToolOutcome.SUCCESS, "1", 0.1)
            n = 0 if self.poisoned() else 3
            turns = (*(Turn(0, 2, "stop", 0.0, 0.1, call) for _ in range(n)), Turn(3, 4, "stop", 0.2, 0.3))
            yield replace(group, trajectories=tuple(replace(t, turns=turns) for t in group.trajectories))


class Poisoned(FakeLearners):
    """The update of step 3 spoils the weights; like a real learner it is well again when older ones are loaded."""

    def __init__(self, events):
        super().__init__(events)
        self.spoilt_at: int | None = None
        self.once = True

    async def optim_step(self):
        stats = await super().optim_step()
        if self.updates == 3 and self.once:
            self.once, self.spoilt_at = False, 3
        return stats

    async def load(self, path):
        version = await super().load(path)
        if self.spoilt_at is not None and version < self.spoilt_at:
            self.spoilt_at = None
        return version


async def train(tmp_path, learners, pool, *overrides):
    """The real loop over these roles with the real tracker and checkpoints; returns the run's directory."""
    recipe = Recipe.load(
        "rl_stage1_18k",
        [
            *("rollout.prompts_per_step=1", "rollout.group_size=2", "algo.mini_batch_prompts=1"),
            *("learner.micro_batch_tokens=64", "run.steps=6", "run.val_every=2", "run.val_before_train=false"),
            *("run.save_every=1", "run.keep_checkpoints=9", "run.tensorboard=false", "eval.samples=1"),
            *(f"run.dir={tmp_path}", "run.name=r", *overrides),
        ],
    )
    (tmp_path / "model").mkdir(exist_ok=True)
    with Tracker.open(recipe, total_steps=6, console=Console(file=io.StringIO())) as tracker:
        await GrpoLoop(
            recipe=recipe,
            learners=learners,
            pool=pool,
            prompts=PromptStream([row(i) for i in range(20)], batch=1, seed=1, epochs=1),
            log=tracker,
            decode=lambda ids, *, skip_special=False: " ".join(map(str, ids)),
            val_rows=[row(90)],
            checkpoints=DirectoryCheckpointer(
                tmp_path / "r" / "checkpoints", model_path=str(tmp_path / "model"), config_hash="abc", keep=9
            ),
            guard=CollapseGuard(recipe.collapse, tracker),
        ).run()
    return tmp_path / "r"


async def test_the_alarm_tells_a_policy_that_stops_calling_from_a_dense_one(tmp_path):
    """By default both train to their end, and only the first is spoken of."""
    events = {}
    for name in ("dying", "dense"):
        (tmp_path / name).mkdir()
        learners = Poisoned([])
        pool = DyingPool([], lambda name=name, it=learners: name == "dying" and it.spoilt_at is not None)
        path = await train(tmp_path / name, learners, pool)
        events[name] = [(e["step"], e["event"]) for e in read_events(path / "metrics.jsonl")]
        assert learners.updates == 6
    assert events == {"dying": [(4, "collapse")], "dense": []}


async def test_the_loop_goes_back_publishes_and_goes_on_with_the_next_prompts(tmp_path):
    events: list[str] = []
    learners = Poisoned(events)
    pool = DyingPool(events, lambda: learners.spoilt_at is not None)
    path = await train(tmp_path, learners, pool, "collapse.on_alarm=rollback")
    assert [(e["step"], e["event"]) for e in read_events(path / "metrics.jsonl")] == [
        (4, "collapse"), (4, "rollback"), (3, "collapse_over"),
    ]  # fmt: skip
    published = [e for e in events if e.startswith("publish")]
    assert published == [f"publish v{v}" for v in (0, 1, 2, 3, 4, 2, 3, 4, 5, 6)]
    asked = [w.row.row_id for w in pool.submitted if w.kind == "train"]
    assert len(asked) == len(set(asked)) == 8, (
        "six steps that stay and the two that were undone, each on its own prompt"
    )
    assert learners.updates == 6
    assert sorted(p.name for p in (path / "val_rollout_data").iterdir()) == ["2.jsonl", "4.jsonl", "6.jsonl"]
    values = read_metrics(path / "metrics.jsonl")
    assert [v["collapse/calls_mean"] for v in values.values()] == [3.0] * 6
    assert values[6]["collapse/entropy/all"] == values[6]["actor/entropy"] == 1.0


async def test_a_run_that_is_killed_after_a_rollback_goes_on_with_what_came_after_it(tmp_path):
    """Not with the prompts and the half-done trajectories that were rolled back."""

    class Killed(Poisoned):
        async def forward_backward(self, *args, **more):
            if not self.once and self.spoilt_at is None:
                raise RuntimeError("killed")
            return await super().forward_backward(*args, **more)

    learners = Killed([])
    pool = DyingPool([], lambda: learners.spoilt_at is not None)
    (tmp_path / "r" / "journal").mkdir(parents=True)
    (tmp_path / "r" / "journal" / "3.1700000000000.engine-0.jsonl").touch()
    with pytest.raises(RuntimeError, match="killed"):
        await train(tmp_path, learners, pool, "collapse.on_alarm=rollback")
    assert not (tmp_path / "r" / "journal").exists()
    asked = [w.row.row_id for w in pool.submitted if w.kind == "train"]
    assert len(asked) == 5, "steps 1 to 4, and step 3 again"
    again = FakePool([])
    await train(tmp_path, FakeLearners([]), again, "run.steps=3")
    assert [w.row.row_id for w in again.submitted if w.kind == "train"] == asked[4:]


async def test_a_group_that_began_before_a_rollback_is_not_learnt_from(tmp_path):
    """Its version may be one that there is again by the time it comes home."""
    learners = Poisoned([])

    class Slow(DyingPool):
        """The group asked for in step 4, with the ill weights of step 3, comes home two groups late."""

        async def groups(self):
            held = None
            async for group in super().groups():
                if held is None and self.poisoned() and group.kind == "train":
                    held = group
                    continue
                yield group
                if held is not None and not self.poisoned() and group.step >= 4:
                    yield held
                    held = None

    pool = Slow([], lambda: learners.spoilt_at is not None)
    path = await train(tmp_path, learners, pool, "collapse.on_alarm=rollback", "rollout.max_staleness=2")
    values = read_metrics(path / "metrics.jsonl")
    assert learners.updates == 6
    assert values[6]["training/stale_groups"] > 0
