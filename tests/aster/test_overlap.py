"""What runs beside the loop, on fakes: records, and a validation that has the weights of the step it runs beside."""

import asyncio
import json
import threading
from dataclasses import replace

import numpy as np
import pytest
from fakes import FakeLearners, FakePool, MemoryLog, row, trajectory, work
from test_driver import loop, recipe
from waiting import until

from aster.checkpoints import DirectoryCheckpointer, read_state
from aster.data.journal import JournalPlace, TurnJournal
from aster.errors import CircuitOpen
from aster.leftovers import Leftovers
from aster.types import Budget, Cause, FinishedTurn, Sampling, Task, TrajectoryGroup, Turn

VAL = ["run.val_every=1", "run.val_before_train=true", "eval.samples=2"]


def validating(tmp_path, *more):
    return recipe(tmp_path, "run.steps=2", *VAL, *more)


class LateValidation(FakePool):
    """Training groups at once; validation groups of version 0 after `updates` more optimizer steps."""

    def __init__(self, events, learners, updates=1):
        super().__init__(events)
        self.learners, self.updates = learners, updates
        self.held = []
        self.asked_at = {}

    def submit(self, work):
        self.asked_at[work.kind, work.step] = self.learners.updates
        super().submit(work)

    async def groups(self):
        ready = super().groups()
        answer = None
        while True:
            answer = answer or asyncio.ensure_future(anext(ready))
            await asyncio.wait({answer}, timeout=0.002)
            if answer.done():
                group, answer = answer.result(), None
                if group.kind == "train":
                    yield group
                else:
                    self.held.append(group)
            elif self.held and (self.version or self.learners.updates >= self.asked_at["val", 0] + self.updates):
                group = self.held.pop(0)
                self.events.append(f"validated {group.row.row_id} at v{self.version}")
                yield group


async def test_the_learner_updates_while_validation_finishes_and_the_publication_waits_for_it(tmp_path):
    events = []
    learners = FakeLearners(events)
    pool, log = LateValidation(events, learners), MemoryLog()
    r = validating(tmp_path, "run.val_every=2")
    await loop(r, events, pool=pool, learners=learners, val_rows=[row(i, "aime") for i in range(2)], log=log).run()
    first = events[: events.index("publish v1")]
    assert [e.split(" row")[0] for e in first if e.startswith("submit")] == ["submit train"] * 2 + ["submit val"] * 2
    assert first.index("optim_step") < first.index("validated row-0 at v0")
    assert events[-1] == "validated row-1 at v2", "the last one ends before the run does"
    assert [step for step, values in log.lines if "timing_s/testing" in values] == [0, 2]
    assert all(values["timing_s/validation_wait"] >= 0 for _, values in log.lines if "actor/lr" in values)


@pytest.mark.parametrize("staleness", [0, 1, 2])
async def test_every_validation_token_is_of_the_version_it_is_logged_under(tmp_path, staleness):
    events = []
    learners = FakeLearners(events)
    pool = LateValidation(events, learners, updates=0)
    r = validating(tmp_path, f"rollout.max_staleness={staleness}", "run.steps=3")
    await loop(r, events, pool=pool, learners=learners, val_rows=[row(i, "aime") for i in range(3)]).run()
    asked = [int(e.rsplit("v", 1)[1]) for e in events if e.startswith("submit val")]
    answered = [int(e.rsplit("v", 1)[1]) for e in events if e.startswith("validated")]
    assert (
        [w.step for w in pool.submitted if w.kind == "val"]
        == asked
        == answered
        == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    )


@pytest.mark.parametrize("option", ["run.val_overlap=false", "run.deterministic=true"])
async def test_without_overlap_the_next_step_begins_when_validation_is_over(tmp_path, option):
    events = []
    learners = FakeLearners(events)
    more = ["rollout.max_num_seqs=1", "rollout.engines=1"] if "deterministic" in option else []
    pool = LateValidation(events, learners, updates=0)
    await loop(
        validating(tmp_path, option, *more), events, pool=pool, learners=learners, val_rows=[row(0, "aime")]
    ).run()
    kinds = [e.split(" ")[0] + e.split(" ")[1][:5] for e in events if e.startswith(("submit", "validated"))]
    assert kinds == [
        "submitval", "validatedrow-0", "submittrain", "submittrain",
        "submitval", "validatedrow-0", "submittrain", "submittrain",
        "submitval", "validatedrow-0",
    ]  # fmt: skip


class BrokenValidation(FakePool):
    """Its engines die under the validation, while the training waits for groups that never come."""

    async def groups(self):
        while True:
            work, _ = await self.queue.get()
            if work.kind == "val":
                raise CircuitOpen("every engine is dead")
            if work.step < 0:
                yield


async def test_a_validation_that_fails_ends_the_run_with_its_own_error(tmp_path):
    with pytest.raises(CircuitOpen, match="every engine is dead"):
        await asyncio.wait_for(
            loop(validating(tmp_path), [], pool=BrokenValidation([]), val_rows=[row(0, "aime")]).run(), 60
        )


async def test_a_validation_that_a_kill_cut_short_is_made_by_the_resumed_run(tmp_path):
    r = validating(tmp_path, "run.steps=1", "run.save_every=1")
    steps = []
    for _ in range(3):
        log = MemoryLog()
        points = DirectoryCheckpointer(r.run.path / "checkpoints", model_path=str(tmp_path), config_hash="x", keep=2)
        await loop(r, [], val_rows=[row(0, "aime")], log=log, checkpoints=points).run()
        steps.append([step for step, values in log.lines if "timing_s/testing" in values])
        (r.run.path / "val_rollout_data" / "1.jsonl").unlink(missing_ok=len(steps) > 1)
    assert steps == [[0, 1], [1], [1]]


class Slow:
    """A decoder that waits until it is let go: a disk or a tokenizer that is slower than the loop."""

    def __init__(self):
        self.let_go = threading.Event()

    def __call__(self, ids, *, skip_special=False):
        assert self.let_go.wait(60)
        return " ".join(map(str, ids))


async def test_the_next_steps_go_on_while_a_step_is_written_two_at_most(tmp_path):
    events, log, slow = [], MemoryLog(), Slow()
    running = loop(recipe(tmp_path, "run.steps=6"), events, log=log)
    running._record._decode = slow
    task = asyncio.create_task(running.run())
    await until(lambda: "publish v3" in events, seconds=60)
    await asyncio.sleep(0.05)
    assert "submit train" not in " ".join(events[events.index("publish v3") :]), "the third step waits for room"
    assert log.lines == []
    slow.let_go.set()
    await task
    assert [step for step, _ in log.lines] == [1, 2, 3, 4, 5, 6]


async def test_a_checkpoint_is_complete_when_the_records_of_its_step_are(tmp_path):
    r, log, slow = recipe(tmp_path, "run.steps=1", "run.save_every=1"), MemoryLog(), Slow()
    points = DirectoryCheckpointer(r.run.path / "checkpoints", model_path=str(tmp_path), config_hash="x", keep=2)
    running = loop(r, [], log=log, checkpoints=points)
    running._record._decode = slow
    task = asyncio.create_task(running.run())
    await until(lambda: (points.directory / "global_step_1.tmp" / "driver.json").exists(), seconds=60)
    await asyncio.sleep(0.05)
    assert points.latest() is None
    slow.let_go.set()
    await task
    assert read_state(points.latest())["step"] == 1
    assert (r.run.path / "rollout_data" / "1.jsonl").exists()


class SilentAfterOne(FakePool):
    async def groups(self):
        stream = super().groups()
        for _ in range(2):
            yield await anext(stream)
        await asyncio.sleep(3600)


async def test_a_writer_that_fails_ends_the_run_that_waits_for_rollouts(tmp_path):
    def full(ids, *, skip_special=False):
        raise OSError("disk full")

    running = loop(recipe(tmp_path), [], pool=SilentAfterOne([]))
    running._record._decode = full
    with pytest.raises(OSError, match="disk full") as caught:
        await asyncio.wait_for(running.run(), 60)
    assert caught.traceback[-1].name == "full"


class DiesInStepTwo(FakePool):
    async def groups(self):
        stream = super().groups()
        for _ in range(2):
            yield await anext(stream)
        raise CircuitOpen("the sandbox is gone")


async def test_a_run_that_fails_still_writes_the_steps_before(tmp_path):
    log = MemoryLog()
    with pytest.raises(CircuitOpen, match="the sandbox is gone"):
        await loop(recipe(tmp_path), [], pool=DiesInStepTwo([]), log=log).run()
    assert [step for step, _ in log.lines] == [1]


def a_task(kind, step, row_id, sample):
    return Task(f"r/{kind}/{step}/{row_id}/{sample}", row_id, sample, (), "", Budget(8, 8, 1), Sampling(), seed=0)


def a_turn(*, version):
    return FinishedTurn(
        Turn(0, 1, "stop", 0.0, 1.0),
        ids=np.array([5], np.int32),
        mask=np.array([True]),
        logprobs=np.array([-1.0], np.float32),
        versions=np.array([version], np.int32),
    )


async def test_prompts_in_flight_at_a_kill_are_asked_for_as_then_and_bring_their_past(tmp_path):
    """With staleness 1 the checkpoint of step 1 has two prompts in flight, which step 1 asked for."""
    r = recipe(tmp_path, "rollout.max_staleness=1", "run.steps=1", "run.save_every=1")

    def points():
        return DirectoryCheckpointer(r.run.path / "checkpoints", model_path=str(tmp_path), config_hash="x", keep=2)

    first, again = FakePool([]), FakePool([])
    await loop(r, [], pool=first, checkpoints=points()).run()
    in_flight = [w.row.row_id for w in first.submitted[2:]]
    journal = TurnJournal(JournalPlace(r.run.path / "journal", r.config_hash), engine="e0")
    for row_id, sample, version in ((in_flight[0], 1, 0), (in_flight[1], 0, 1), (in_flight[1], 1, 2)):
        journal.append(a_task("train", 1, row_id, sample), "prompt", 0, a_turn(version=version))
    r = recipe(tmp_path, "rollout.max_staleness=1", "run.steps=2", "run.save_every=1")
    await loop(r, [], pool=again, checkpoints=points()).run()
    asked = {w.row.row_id: (w.step, sorted(w.past)) for w in again.submitted}
    assert [asked.pop(row_id) for row_id in in_flight] == [(1, [1]), (1, [0])], "version 2 is of a lost future"
    assert list(asked.values()) == [(2, [])] * len(asked)


async def test_a_row_that_is_in_flight_for_two_steps_is_asked_for_in_both_again(tmp_path):
    """Where two epochs meet; whichever of them came home before the checkpoint is not asked for."""
    r = recipe(tmp_path)
    leftovers, again = Leftovers(r), Leftovers(r)
    assert [leftovers.take(row(0), step)[0] for step in (5, 6)] == [5, 6]
    await again.read(json.loads(json.dumps(leftovers.state_dict())), version=6)
    assert [again.take(row(0), 7)[0] for _ in range(3)] == [5, 6, 7]
    for home in (5, 6):
        again.done(row(0), home)
    await leftovers.read(again.state_dict(), version=7)
    assert [leftovers.take(row(0), 8)[0] for _ in range(2)] == [7, 8]


async def test_a_row_asked_for_twice_in_one_step_is_not_found_under_the_other_s_name(tmp_path):
    leftovers, again = Leftovers(recipe(tmp_path)), Leftovers(recipe(tmp_path))
    for _ in range(2):
        leftovers.take(row(0), 5)
    leftovers.done(row(0), 5)
    await again.read(leftovers.state_dict(), version=6)
    assert again.take(row(0), 7)[0] == 7


async def test_the_journal_keeps_what_a_checkpoint_can_need_and_nothing_else(tmp_path):
    """Checkpoints of versions 0 (the start) and 4, staleness 1, while the engines go from version to version."""
    r = recipe(tmp_path, "rollout.max_staleness=1")
    journal = TurnJournal(JournalPlace(r.run.path / "journal", r.config_hash), engine="e0")
    leftovers, kept = Leftovers(r), []
    for version in range(8):
        leftovers.published(version)
        journal.append(a_task("train", 1, "row", 0), "prompt", 0, a_turn(version=version))
        if version == 4:
            leftovers.saving(4)
        if version == 6:
            leftovers.saved(4)
        kept.append(sorted(int(p.name.split(".")[0]) for p in (r.run.path / "journal").iterdir()))
    assert kept == [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4], [0, 3, 4, 5], [0, 3, 4, 5, 6], [3, 4, 6, 7]]


async def test_a_checkpoint_that_is_asked_for_while_another_is_written_keeps_its_turns_too(tmp_path):
    r = recipe(tmp_path)
    journal = TurnJournal(JournalPlace(r.run.path / "journal", r.config_hash), engine="e0")
    leftovers, kept = Leftovers(r), []
    for version in range(9):
        leftovers.published(version)
        journal.append(a_task("train", 1, "row", 0), "prompt", 0, a_turn(version=version))
        if version in (2, 4):
            leftovers.saving(version)
        if version in (5, 7):
            leftovers.saved(version - 3)
        kept.append(sorted(int(p.name.split(".")[0]) for p in (r.run.path / "journal").iterdir()))
    assert kept[5:] == [[0, 2, 4, 5], [2, 4, 6], [2, 4, 7], [4, 8]]


async def test_a_validation_that_was_cut_short_goes_on_from_its_turns(tmp_path):
    r = validating(tmp_path, "run.steps=1", "run.save_every=1")

    def points():
        return DirectoryCheckpointer(r.run.path / "checkpoints", model_path=str(tmp_path), config_hash="x", keep=2)

    await loop(r, [], val_rows=[row(0, "aime")], checkpoints=points()).run()
    (r.run.path / "val_rollout_data" / "1.jsonl").unlink()
    kept = TurnJournal(JournalPlace(r.run.path / "journal", r.config_hash), engine="e0")
    kept.append(a_task("val", 1, "row-0", 1), "prompt", 0, a_turn(version=1))
    again = FakePool([])
    await loop(r, [], pool=again, val_rows=[row(0, "aime")], checkpoints=points()).run()
    assert [(w.kind, w.step, sorted(w.past)) for w in again.submitted] == [("val", 1, [1])]


@pytest.mark.parametrize("staleness", [0, 1, 2])
async def test_staleness_is_exact(tmp_path, staleness):
    """Asked for (k+1)P prompts ahead and never more; a token k versions old is learnt from, an older one is not."""
    pool = FakePool([])
    r = recipe(tmp_path, f"rollout.max_staleness={staleness}", "run.steps=4")
    running = loop(r, [], pool=pool)
    await running.run()
    born = [int(e.rsplit("v", 1)[1]) for e in pool.events if e.startswith("submit")]
    assert born == [0] * 2 * (staleness + 1) + [1, 1, 2, 2, 3, 3]
    running.step = 9  # begins with the weights of version 8
    for version, too_old in ((8, False), (8 - staleness, False), (7 - staleness, True)):
        members = (trajectory(work(row(0)), 0, version=8, reward=1.0),)
        members += (trajectory(work(row(0)), 1, version=version, reward=0.0),)
        assert running._is_too_old(TrajectoryGroup(row(0), 9, members)) is too_old, version


async def test_a_run_that_does_not_resume_forgets_what_was_half_done(tmp_path):
    r = recipe(tmp_path, "run.steps=1", "run.resume=false")
    folder = r.run.path / "journal"
    folder.mkdir(parents=True)
    (folder / "0.1.e0.jsonl").write_text("{}")
    points = DirectoryCheckpointer(r.run.path / "checkpoints", model_path=str(tmp_path), config_hash="x", keep=2)
    await loop(r, [], checkpoints=points).run()
    assert not folder.exists()


class StalePool(FakePool):
    """Its first group was given up as too old while it ran."""

    async def groups(self):
        first = True
        async for group in super().groups():
            if first:
                members = tuple(t.failed(Cause.STALE, "began under version -2") for t in group.trajectories)
                group = replace(group, trajectories=members)
            first = False
            yield group


async def test_a_group_that_was_given_up_as_too_old_is_counted_and_replaced(tmp_path):
    log, pool = MemoryLog(), StalePool([])
    await loop(recipe(tmp_path, "run.steps=1"), [], pool=pool, log=log).run()
    values = dict(log.lines)[1]
    assert len(pool.submitted) == 3
    assert (values["training/stale_groups"], values["causes/stale_count"], values["infra_failed_rate"]) == (1, 2, 0)
