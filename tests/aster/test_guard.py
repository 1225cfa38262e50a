"""What `collapse.on_alarm` does, with the real tracker and real checkpoint directories."""

import io
import json

import pytest
from fakes import FakeLearners
from rich.console import Console

from aster.checkpoints import DirectoryCheckpointer
from aster.config import Recipe
from aster.errors import CollapseStopped
from aster.guard import CollapseGuard
from aster.tracking import Tracker, read_events, read_metrics

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
