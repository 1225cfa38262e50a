"""The loop on fakes: order of events, denominators, failures that stay out of the statistics, resume, staleness."""

import asyncio
import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from fakes import FakeLearners, FakePool, MemoryLog, row, trajectory, work

from aster.checkpoints import DirectoryCheckpointer
from aster.config import Recipe
from aster.data.prompts import PromptStream
from aster.data.trajectories import read_trajectories
from aster.driver import GrpoLoop
from aster.errors import AsterError, WeightSyncError
from aster.recorder import RolloutStep
from aster.types import Cause, TrajectoryGroup

TINY = [
    "rollout.prompts_per_step=2",
    "rollout.group_size=2",
    "algo.mini_batch_prompts=1",
    "run.val_every=0",
    "run.val_before_train=false",
    "learner.micro_batch_tokens=64",
]


def recipe(tmp_path, *more):
    return Recipe.load("rl_stage1_18k", [*TINY, f"run.dir={tmp_path}", "run.name=r", "run.steps=2", *more])


def loop(r, events, *, pool=None, learners=None, checkpoints=None, val_rows=(), log=None):
    return GrpoLoop(
        recipe=r,
        learners=learners or FakeLearners(events),
        pool=pool or FakePool(events),
        prompts=PromptStream([row(i) for i in range(8)], batch=r.rollout.prompts_per_step, seed=1, epochs=3),
        log=log or MemoryLog(),
        decode=lambda ids, *, skip_special=False: " ".join(map(str, ids)),
        val_rows=val_rows,
        checkpoints=checkpoints,
    )


async def test_one_step_is_sample_proximal_pass_two_updates_publish(tmp_path):
    events = []
    await loop(recipe(tmp_path, "run.steps=1"), events).run()
    assert [e.split(" row")[0] for e in events] == [
        "publish v0",
        "submit train",
        "submit train",
        "log_probs",
        "forward_backward",
        "optim_step",
        "forward_backward",
        "optim_step",
        "publish v1",
    ]


class FailingPool(FakePool):
    """Its publications of version 1 fail with these errors, in turn, before one succeeds."""

    def __init__(self, events, *errors):
        super().__init__(events)
        self.errors = list(errors)

    async def publish(self, source, version):
        if version == 1 and self.errors:
            self.events.append("failed v1")
            raise self.errors.pop(0)
        return await super().publish(source, version)


async def test_a_publication_that_was_rolled_back_is_tried_once_more(tmp_path):
    events = []
    await loop(recipe(tmp_path, "run.steps=1"), events, pool=FailingPool(events, WeightSyncError("bucket 2", 0))).run()
    assert events[-2:] == ["failed v1", "publish v1"]


@pytest.mark.parametrize(
    "errors",
    [
        (WeightSyncError("bucket 2", 0), WeightSyncError("bucket 7", 0)),  # twice is no flipped bit
        (WeightSyncError("bucket 7; the engines stay shut"),),
    ],
)
async def test_a_publication_that_fails_twice_or_leaves_the_engines_shut_ends_the_run(tmp_path, errors):
    events = []
    with pytest.raises(WeightSyncError, match="bucket 7"):
        await loop(recipe(tmp_path, "run.steps=1"), events, pool=FailingPool(events, *errors)).run()
    assert [e for e in events if e.startswith(("failed", "publish"))] == ["publish v0"] + ["failed v1"] * len(errors)


async def test_no_sample_is_born_stale_when_synchronous(tmp_path):
    events = []
    await loop(recipe(tmp_path, "run.steps=3"), events).run()
    born = [e.rsplit(" ", 1)[1] for e in events if e.startswith("submit")]
    assert born == ["v0", "v0", "v1", "v1", "v2", "v2"]


async def test_with_staleness_one_the_next_step_is_sampled_ahead_and_never_further(tmp_path):
    events = []
    pool = FakePool(events)
    await loop(recipe(tmp_path, "run.steps=3", "rollout.max_staleness=1"), events, pool=pool).run()
    assert [e.rsplit(" ", 1)[1] for e in events if e.startswith("submit")] == ["v0"] * 4 + ["v1"] * 2 + ["v2"] * 2


class BackwardsPool(FakePool):
    """The prompt that was asked for last is finished first."""

    async def groups(self):
        while True:
            asked = [await asyncio.wait_for(self.queue.get(), timeout=60)]
            while not self.queue.empty():
                asked.append(self.queue.get_nowait())
            for of, version in reversed(asked):
                members = tuple(trajectory(of, i, version=version, reward=float(i)) for i in range(of.group_size))
                yield TrajectoryGroup(of.row, of.step, members, of.kind, place=of.place)


async def test_a_row_that_is_in_a_step_twice_keeps_both_its_places(tmp_path):
    """Asked for at the end of one epoch and at the beginning of the next, by two steps."""
    r = recipe(tmp_path, "run.steps=4", "rollout.prompts_per_step=3", "rollout.max_staleness=1")
    pool = BackwardsPool([])
    running = loop(r, [], pool=pool)
    running.prompts = PromptStream([row(i) for i in range(4)], batch=3, seed=1, epochs=5)
    learnt = []
    learn = running.learn
    running.learn = lambda step: learnt.append([g.place for g in step.groups]) or learn(step)
    await running.run()
    assert learnt == [sorted(places) for places in learnt]


async def test_who_is_finished_first_does_not_decide_on_the_mini_batches(tmp_path):
    written = []
    for kind in (FakePool, BackwardsPool):
        r = recipe(tmp_path / kind.__name__, "run.steps=3")
        await loop(r, [], pool=kind([])).run()
        lines = (r.run.path / "rollout_data" / "2.jsonl").read_text().splitlines()
        written.append([json.loads(line)["row_id"] for line in lines])
    assert written[0] == written[1]
    assert len(set(written[0])) == 2


async def test_denominators_are_the_tokens_and_groups_of_the_whole_mini_batch(tmp_path):
    events = []
    learners = FakeLearners(events)
    await loop(recipe(tmp_path, "run.steps=1", "algo.mini_batch_prompts=2"), events, learners=learners).run()
    # 2 prompts x 2 samples x 3 model tokens each
    assert learners.denominators == [(12, 2)]


async def test_advantages_reach_the_learner_with_their_sign(tmp_path):
    events = []
    learners = FakeLearners(events)
    await loop(recipe(tmp_path, "run.steps=1"), events, learners=learners).run()
    values = np.concatenate(learners.advantages)
    # rewards (1, 0): (1 - 0.5) / (std(ddof=1) = 0.7071) = 0.7071, for 3 tokens each, in 2 groups
    np.testing.assert_allclose(np.sort(values), [-0.70710] * 6 + [0.70710] * 6, atol=1e-4)


async def test_leaves_of_trees_have_an_advantage_for_each_stretch_between_two_splits(tmp_path):
    events, learners = [], FakeLearners([])
    more = ["run.steps=1", "rollout.group_size=4", "rollout.tree_turns=[1]", "algo.mini_batch_prompts=2"]
    pool, log = FakePool(events, lambda _, i: float(i == 0)), MemoryLog()
    await loop(recipe(tmp_path, *more), events, learners=learners, pool=pool, log=log).run()
    assert [(w.tree_turns, w.tree_factor) for w in pool.submitted] == [((1,), 2)] * 2
    # a fake trajectory: turn 0 has two model tokens, turn 1 (after the split) one. Two trees, rewards (1, 0) and
    # (0, 0), std 0.5: before the split 3/4 * 2 * (0.5 - 0.25) / 0.5 = 0.75 and -0.75, after it 1.5, -1.5, 0, 0
    values = np.concatenate(learners.advantages)
    expected = sorted([*[0.75] * 4, *[-0.75] * 4, 1.5, -1.5, 0.0, 0.0] * 2)
    np.testing.assert_allclose(np.sort(values), expected, atol=1e-4)
    logged = [log.lines[0][1][f"critic/advantages/{s}"] for s in ("mean", "max", "min")]
    np.testing.assert_allclose(logged, [np.mean(expected), 1.5, -1.5], atol=1e-4)


async def test_validation_never_grows_trees(tmp_path):
    events = []
    pool = FakePool(events)
    more = ["run.steps=1", "run.val_every=1", "rollout.tree_turns=[1]", "eval.samples=3"]
    await loop(recipe(tmp_path, *more), events, pool=pool, val_rows=[row(90)]).run()
    assert [w.tree_turns for w in pool.submitted if w.kind == "val"] == [()]


async def test_what_we_lost_stays_out_of_its_groups_statistics(tmp_path):
    events = []
    learners = FakeLearners(events)
    # three samples: right, wrong, lost by us. Scored as 0 the mean would be 1/3; masked it is 1/2
    pool = FakePool(events, reward=lambda _, i: (1.0, 0.0, None)[i])
    r = recipe(tmp_path, "run.steps=1", "rollout.group_size=3")
    await loop(r, events, pool=pool, learners=learners).run()
    np.testing.assert_allclose(np.unique(np.concatenate(learners.advantages)), [-0.70710, 0.70710], atol=1e-4)


async def test_a_group_with_one_survivor_is_masked_whole(tmp_path):
    events, learners, log = [], FakeLearners([]), MemoryLog()
    pool = FakePool(events, reward=lambda _, i: (1.0, None)[i])
    await loop(recipe(tmp_path, "run.steps=1"), events, pool=pool, learners=learners, log=log).run()
    assert learners.updates == 0
    assert "2 of 4 trajectories have a reward, in 2 of 2 groups no two differ" in log.events[0][2]


async def test_a_step_without_a_single_reward_ends_the_run_and_says_what_was_lost(tmp_path):
    pool = FakePool([], reward=lambda *_: None)
    with pytest.raises(AsterError, match=r"step 1: none of its 4 trajectories has a reward \(sandbox_lost 4\)"):
        await loop(recipe(tmp_path, "run.steps=1"), [], pool=pool).run()


class CutPool(FakePool):
    """Every trajectory of its first step ran out of tokens."""

    async def groups(self):
        async for group in super().groups():
            if group.step == 1:
                group = replace(
                    group, trajectories=tuple(replace(t, cause=Cause.MAX_TOKENS) for t in group.trajectories)
                )
            yield group


ONE_ROW = ["learner.micro_batch_tokens=128"]  # of a mini-batch


def _alike_at_first(events):
    """The first six prompts that are asked for have no variance."""
    asked = []

    def reward(row, i):
        asked.append(row.row_id)
        return 0.0 if len(asked) <= 12 else float(i)

    return FakePool(events, reward)


@pytest.mark.parametrize(
    ("options", "pool", "flat", "cut"),
    [
        (["algo.drop_zero_variance=true", "rollout.prompts_per_step=6", *ONE_ROW], _alike_at_first, 6, 0),
        (["algo.drop_zero_variance=true", "algo.dynamic_sampling=true"], _alike_at_first, 2, 0),
        (["algo.overlong=mask"], CutPool, 0, 4),
    ],
)
async def test_a_step_that_options_leave_without_a_signal_is_counted_and_the_next_one_learns(
    tmp_path, options, pool, flat, cut
):
    events, log = [], MemoryLog()
    r = recipe(tmp_path, "run.steps=2", "algo.mini_batch_prompts=2", *options)
    await loop(r, events, pool=pool(events), log=log).run()
    steps = [e for e in events if not e.startswith("submit")]
    updates = ["forward_backward", "optim_step"] * (r.rollout.prompts_per_step // 2)
    assert steps == ["publish v0", "publish v1", "log_probs", *updates, "publish v2"]
    (first, second), ((step, kind, message),) = [v for _, v in log.lines], log.events
    assert (first["training/no_signal_steps"], second["training/no_signal_steps"]) == (1, 1)
    assert "critic/score/mean" in first
    assert not [name for name in first if name.startswith(("actor/", "training/mismatch", "critic/advantages"))]
    assert (step, kind) == (1, "no_signal")
    assert f"in {flat} of {r.rollout.prompts_per_step} groups no two differ" in message
    assert f"{cut} are not trained on" in message


async def test_a_resumed_run_counts_on_from_a_step_without_a_signal(tmp_path):
    events, pools = [], []
    for until in (1, 2):
        r, log = recipe(tmp_path, f"run.steps={until}", "run.save_every=1", "algo.overlong=mask"), MemoryLog()
        pools.append(CutPool(events))
        await loop(r, events, pool=pools[-1], log=log, checkpoints=_checkpoints(r, tmp_path)).run()
    assert [e for e in events if e.startswith("publish")] == ["publish v0", "publish v1", "publish v1", "publish v2"]
    assert events.count("optim_step") == 2  # of step 2
    assert {w.row.row_id for w in pools[0].submitted}.isdisjoint(w.row.row_id for w in pools[1].submitted)
    assert log.lines[0][1]["training/no_signal_steps"] == 1


async def test_zero_variance_groups_count_in_the_denominator_unless_dropped(tmp_path):
    for drop, expected in ((False, [(6, 1), (6, 1)]), (True, [(6, 1)])):
        events = []
        learners = FakeLearners(events)
        first = {}
        pool = FakePool(
            events, reward=lambda r, i, first=first: 1.0 if first.setdefault("row", r.row_id) == r.row_id else float(i)
        )
        r = recipe(tmp_path, "run.steps=1", f"algo.drop_zero_variance={str(drop).lower()}")
        await loop(r, events, pool=pool, learners=learners).run()
        assert learners.denominators == expected


async def test_with_a_kl_penalty_the_reference_is_asked_before_the_first_update(tmp_path):
    events = []
    await loop(recipe(tmp_path, "run.steps=1", "algo.kl_coef=0.01"), events).run()
    assert [e for e in events if e in ("log_probs", "reference", "forward_backward")] == [
        "log_probs",
        "reference",
        "forward_backward",
        "forward_backward",
    ]


async def test_dynamic_sampling_replaces_groups_without_variance_and_still_writes_them(tmp_path):
    events, log = [], MemoryLog()
    alike = {"row-0", "row-5", "row-6"}
    pool = FakePool(events, reward=lambda r, i: 1.0 if r.row_id in alike else float(i % 2))
    learners = FakeLearners(events)
    r = recipe(tmp_path, "run.steps=1", "algo.dynamic_sampling=true", "rollout.prompts_per_step=4")
    await loop(r, events, pool=pool, learners=learners, log=log).run()
    shown = [w.row.row_id for w in pool.submitted]
    replaced = [name for name in shown if name in alike]
    assert len(shown) == 4 + len(replaced)
    assert all(a.any() for a in learners.advantages)
    assert log.lines[0][1]["training/replaced_groups"] == len(replaced) > 0
    written = (r.run.path / "rollout_data" / "1.jsonl").read_text().splitlines()
    assert len(written) == 2 * len(shown)


async def test_dynamic_sampling_gives_up_at_its_limit(tmp_path):
    events = []
    pool = FakePool(events, reward=lambda _, i: 0.0)
    await loop(recipe(tmp_path, "run.steps=1", "algo.dynamic_sampling=true"), events, pool=pool).run()
    assert len(pool.submitted) == 3 * 2  # dynamic_sampling_limit times the prompts of a step
    assert events[-1] == "publish v1"


async def test_overlong_trajectories_can_count_without_being_trained_on(tmp_path):
    events, learners = [], FakeLearners([])
    group = TrajectoryGroup(
        row(0),
        1,
        (
            trajectory(work(row(0)), 0, version=0, reward=1.0),
            trajectory(work(row(0)), 1, version=0, reward=0.0, cause=Cause.MAX_TOKENS),
        ),
    )
    r = recipe(tmp_path, "algo.overlong=mask")
    (sample,) = loop(r, events, learners=learners).samples_of(group, 0)
    assert sample.advantage == pytest.approx(0.5 / (np.sqrt(0.5) + 1e-6))  # against the one that is not trained on


async def test_the_soft_overlong_penalty_enters_the_advantages(tmp_path):
    members = tuple(trajectory(work(row(0)), i, version=0, reward=1.0) for i in range(2))
    long = replace(members[1], ids=np.zeros(16384, np.int32), mask=np.ones(16384, bool))
    long = replace(long, behaviour_logprobs=np.zeros(16384, np.float32))
    r = recipe(tmp_path, "algo.overlong_buffer_tokens=512")
    short, punished = loop(r, []).samples_of(TrajectoryGroup(row(0), 1, (members[0], long)), 0)
    assert short.advantage == pytest.approx(0.5 / (np.sqrt(0.5) + 1e-6))  # rewards 1, and 1 - 1 at the whole budget
    assert punished.advantage == -short.advantage


def _checkpoints(r, tmp_path):
    return DirectoryCheckpointer(r.run.path / "checkpoints", model_path=str(tmp_path), config_hash="x", keep=2)


async def test_a_resumed_run_sees_the_prompts_of_an_uninterrupted_one(tmp_path):
    async def prompts_of(directory, *steps):
        seen = []
        for until in steps:
            r = recipe(directory, f"run.steps={until}", "run.save_every=1")
            events = []
            learners = FakeLearners(events)
            await loop(r, events, learners=learners, checkpoints=_checkpoints(r, tmp_path)).run()
            seen += [e.split(" ")[2] for e in events if e.startswith("submit")]
        return seen, learners.updates

    whole = await prompts_of(tmp_path / "a", 6)
    parts = await prompts_of(tmp_path / "b", 2, 3, 6)
    assert parts == whole
    assert whole[1] == 12  # two updates a step


@pytest.mark.parametrize("option", ["rollout.max_staleness=1", "algo.dynamic_sampling=true"])
async def test_prompts_in_flight_or_drawn_in_advance_at_a_kill_are_shown_by_the_resumed_run(tmp_path, option):
    """Of 8 rows, 4 a step, one has no variance. Two steps and, resumed, two more learn from what four at once do."""

    async def learnt(directory, *steps):
        rows_of_steps = []
        for until in steps:
            r = recipe(directory, option, f"run.steps={until}", "run.save_every=1", "rollout.prompts_per_step=4")
            pool = FakePool([], reward=lambda row, i: 1.0 if row.row_id == "row-3" else float(i % 2))
            await loop(r, [], pool=pool, checkpoints=_checkpoints(r, tmp_path)).run()
            for step in range(len(rows_of_steps) + 1, until + 1):
                lines = (r.run.path / "rollout_data" / f"{step}.jsonl").read_text().splitlines()
                rows_of_steps.append([json.loads(line)["row_id"] for line in lines])
        return rows_of_steps

    whole = await learnt(tmp_path / "a", 4)
    assert await learnt(tmp_path / "b", 2, 4) == whole
    assert max(len(set(step)) for step in whole) == (5 if "dynamic" in option else 4)


async def test_the_count_of_stale_groups_goes_on_after_a_restart(tmp_path):
    for until in (1, 2):
        r, log = recipe(tmp_path, f"run.steps={until}", "run.save_every=1"), MemoryLog()
        run = loop(r, [], log=log, checkpoints=_checkpoints(r, tmp_path))
        run.stale_groups = 7 * (2 - until)  # as if the first had dropped seven; the second begins with none
        await run.run()
    assert log.lines[0][1]["training/stale_groups"] == 7


async def test_validation_uses_the_evaluation_budget_and_is_written(tmp_path):
    events, log = [], MemoryLog()
    r = recipe(
        tmp_path, "run.steps=1", "run.val_before_train=true", "run.val_every=1", "eval.samples=2", "eval.preset=paper"
    )
    pool = FakePool(events)
    await loop(r, events, pool=pool, val_rows=[row(i, "aime") for i in range(3)], log=log).run()
    val = [w for w in pool.submitted if w.kind == "val"]
    assert {(w.sampling.temperature, w.sampling.top_p, w.group_size) for w in val} == {(0.6, 0.95, 2)}
    assert [step for step, values in log.lines if any(k.startswith("val-core/aime/acc") for k in values)] == [0, 1]
    rows = [json.loads(x) for x in (tmp_path / "r" / "val_rollout_data" / "1.jsonl").read_text().splitlines()]
    assert len(rows) == 6


async def test_the_files_say_of_each_token_how_the_learner_differs_from_the_engine(tmp_path):
    class Doubting(FakeLearners):
        async def log_probs(self, microbatch_per_rank, *, reference=False):
            scores = await super().log_probs(microbatch_per_rank, reference=reference)
            loss_masks = [m.loss_mask for m in microbatch_per_rank]
            return [replace(s, logprobs=s.logprobs - 0.25 * m) for s, m in zip(scores, loss_masks, strict=True)]

    r = recipe(tmp_path, "run.steps=1")
    await loop(r, [], learners=Doubting([])).run()
    table = pq.read_table(r.run.path / "trajectories" / "1.parquet")
    gaps, masks = table.column("learner_gap").to_pylist(), table.column("mask").to_pylist()
    assert len(gaps) == 4
    for gap, mask in zip(gaps, masks, strict=True):
        assert gap == [-25 if sampled else 0 for sampled in mask]
    assert len(list(read_trajectories(r.run.path / "trajectories" / "1.parquet"))) == 4


async def test_mismatch_is_of_tokens_of_the_learners_own_version_and_staleness_of_older_ones(tmp_path):
    class Moved(FakeLearners):
        """By its log-prob each token is known: the first is 0.8 times as likely now, the third twice."""

        async def log_probs(self, microbatch_per_rank, *, reference=False):
            scores = await super().log_probs(microbatch_per_rank, reference=reference)
            shift = {-0.5: np.log(0.8), -0.25: 0.0, -1.0: np.log(2)}
            return [
                replace(s, logprobs=np.array([x + shift.get(float(x), 0.0) for x in s.logprobs], np.float32))
                for s in scores
            ]

    members = [trajectory(work(row(0)), i, version=1, reward=float(i)) for i in range(2)]
    mixed = [replace(t, versions=np.array([1, 1, -1, 0], np.int32)) for t in members]
    running = loop(recipe(tmp_path, "rollout.max_staleness=1"), [], learners=Moved([]))
    running.step = 2  # begins with the weights of version 1
    values = await running.learn(RolloutStep([TrajectoryGroup(row(0), 2, tuple(mixed))]))
    assert values["training/mismatch_k1"] == pytest.approx(-np.log(0.8) / 2, abs=1e-6)
    assert values["training/mismatch_k3"] == pytest.approx((0.8 - 1 - np.log(0.8)) / 2, abs=1e-6)
    most = np.exp(-0.5) * (1 - 0.8)
    assert values["training/rollout_probs_diff_max"] == pytest.approx(most, abs=1e-6)
    assert values["training/staleness_k1"] == pytest.approx(-np.log(2), abs=1e-6)
    assert values["training/staleness_k3"] == pytest.approx(2 - 1 - np.log(2), abs=1e-6)

    old = [replace(t, versions=np.array([0, 0, -1, 0], np.int32)) for t in members]
    values = await running.learn(RolloutStep([TrajectoryGroup(row(0), 2, tuple(old))]))
    assert not [name for name in values if "mismatch" in name or "rollout_probs" in name or "pearson" in name]
    k3 = ((0.8 - 1 - np.log(0.8)) + 0.0 + (2 - 1 - np.log(2))) / 3
    assert values["training/staleness_k3"] == pytest.approx(k3, abs=1e-6)


async def test_each_step_leaves_rollouts_trajectories_and_metrics(tmp_path):
    events, log = [], MemoryLog()
    await loop(recipe(tmp_path), events, log=log).run()
    run = tmp_path / "r"
    assert {p.name for p in (run / "rollout_data").iterdir()} == {"1.jsonl", "2.jsonl"}
    assert {p.name for p in (run / "trajectories").iterdir()} == {"1.parquet", "2.parquet"}
    values = dict(log.lines)[1]
    for name in (
        "critic/score/mean",
        "actor/grad_norm",
        "actor/lr",
        "training/rollout_probs_diff_mean",
        "training/rollout_actor_probs_pearson_corr",
        "tool_use_info/avg_tool_calls_per_trajectory",
        "response_length/mean",
        "timing_s/gen",
        "timing_s/update_actor",
        "perf/throughput",
        "infra_failed_rate",
    ):
        assert name in values, name
    assert values["critic/score/mean"] == 0.5
