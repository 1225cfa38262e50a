"""Records beside the loop: in order, bounded, never lost in silence; and the alarm that they carry."""

import asyncio
import json
import threading
from dataclasses import replace

import numpy as np
import pytest
from fakes import MemoryLog, row, trajectory, work

from aster.config import Recipe
from aster.data.rollouts import DecodeOnce
from aster.recorder import Recorder, RolloutStep, RunRecord
from aster.types import Cause, ToolCall, ToolOutcome, TrajectoryGroup

CALL = ToolCall("print(12)", "ok", ToolOutcome.SUCCESS, "12", 0.1)


def decode(ids, *, skip_special=False):
    return " ".join(map(str, ids))


def recipe(tmp_path, *more):
    return Recipe.load("rl_stage1_18k", [f"run.dir={tmp_path}", "run.name=r", *more])


def group(index=0, version=0, causes=(Cause.ANSWERED, Cause.ANSWERED)):
    members = tuple(
        trajectory(work(row(index)), i, version=version, reward=None if c.is_ours else float(i % 2), cause=c)
        for i, c in enumerate(causes)
    )
    return TrajectoryGroup(row(index), 1, members)


async def test_jobs_run_in_order_and_a_third_one_waits_outside():
    recorder, let_go, done = Recorder(ahead=2), threading.Event(), []

    def job(name):
        assert let_go.wait(60)
        done.append(name)

    await recorder.put(lambda: job("first"))
    await recorder.put(lambda: job("second"))
    third = asyncio.create_task(recorder.put(lambda: job("third")))
    await asyncio.sleep(0.05)
    assert not third.done()
    let_go.set()
    await third
    await recorder.flush()
    assert done == ["first", "second", "third"]


async def test_what_is_awaited_is_what_was_put_before():
    recorder, let_go, done = Recorder(), threading.Event(), []
    await recorder.put(lambda: done.append("first"))
    first = recorder.so_far()
    await recorder.put(lambda: let_go.wait(60))
    await asyncio.wait_for(first(), 60)
    assert done == ["first"]
    let_go.set()
    await recorder.settle()


async def test_a_job_that_fails_is_the_last_one_and_everybody_hears_why():
    recorder, done = Recorder(), []

    def full():
        raise OSError("disk full")

    await recorder.put(full)
    written = recorder.so_far()
    with pytest.raises(OSError, match="disk full") as caught:
        await asyncio.wait_for(recorder.broken(), 60)
    assert caught.traceback[-1].name == "full"
    for call in (recorder.flush, written, lambda: recorder.put(lambda: done.append("later"))):
        with pytest.raises(OSError, match="disk full"):
            await call()
    await recorder.settle()
    assert done == []


def test_what_was_decoded_for_one_reader_is_handed_to_the_next_once():
    seen = []

    def counting(ids, *, skip_special=False):
        seen.append((list(ids), skip_special))
        return decode(ids)

    once = DecodeOnce(counting, skip_special=True)
    assert once.keep(np.array([1, 2], np.int32)) == "1 2"
    for skip in (False, True, True):  # the last one was handed out already
        assert once(np.array([1, 2, 3], np.int32)[:2], skip_special=skip) == "1 2"
    assert seen == [([1, 2], True), ([1, 2], False), ([1, 2], True)]


def test_a_step_decodes_each_trajectory_once_for_metrics_and_files(tmp_path):
    seen = []

    def counting(ids, *, skip_special=False):
        seen.append((ids.tobytes(), skip_special))
        return decode(ids)

    calling = [
        replace(
            t,
            ids=t.ids + 10 * t.sample,
            turns=(replace(t.turns[0], call=CALL), *t.turns[1:]),
            verdicts=replace(t.verdicts, pred="12"),
        )
        for t in group().trajectories
    ]
    RunRecord(recipe(tmp_path), MemoryLog(), counting).step(
        1, RolloutStep([replace(group(), trajectories=tuple(calling))]), {}, seconds={}
    )
    assert sorted(len(ids) // 4 for ids, _ in seen) == [1, 1, 1, 1, 2, 2, 3]  # a prompt; two responses in three parts


def test_a_step_is_one_line_with_all_its_values_after_its_files(tmp_path):
    r = recipe(tmp_path)

    class Watching(MemoryLog):
        def log(self, step, values):
            assert (r.run.path / "rollout_data" / "3.jsonl").exists()
            assert (r.run.path / "trajectories" / "3.parquet").exists()
            super().log(step, values)

    log = Watching()
    RunRecord(r, log, decode).step(3, RolloutStep([group()]), {"actor/lr": 1e-6}, seconds={"step": 2.0})
    ((step, values),) = log.lines
    assert (step, values["actor/lr"], values["critic/score/mean"]) == (3, 1e-6, 0.5)
    assert values["timing_s/record"] > 0


def test_the_rewards_of_a_step_are_those_that_the_recipe_shapes(tmp_path):
    log = MemoryLog()
    # 3 of 4 tokens behind the beginning of the buffer: both rewards, 0 and 1, lose 3/4
    r = recipe(tmp_path, "budget.max_response_tokens=5", "algo.overlong_buffer_tokens=4")
    advantages = {t.uid: 2.0 * t.sample for t in group().trajectories}
    RunRecord(r, log, decode).step(1, RolloutStep([group()], advantages=advantages), {}, seconds={})
    values = log.lines[0][1]
    assert (values["critic/score/mean"], values["critic/rewards/mean"]) == (0.5, -0.25)
    assert (values["critic/advantages/min"], values["critic/advantages/max"]) == (0.0, 2.0)


@pytest.mark.parametrize(("placement", "gpus"), [("disaggregated", 3 + 2), ("colocated", 3)])
def test_throughput_is_per_gpu_and_a_shared_one_counts_once(tmp_path, placement, gpus):
    log = MemoryLog()
    more = ["learner.world_size=3", "rollout.engines=2", "learner.micro_batch_tokens=32768"]
    r = recipe(tmp_path, f"cluster.placement={placement}", *more)
    RunRecord(r, log, decode).step(1, RolloutStep([group()]), {}, seconds={"step": 2.0})
    assert log.lines[0][1]["perf/throughput"] == pytest.approx(2 * 7 / 2.0 / gpus)


def test_failures_of_groups_that_were_not_learnt_from_count_and_stale_ones_did_not_fail(tmp_path):
    log = MemoryLog()
    replaced, stale = (Cause.ANSWERED, Cause.ENGINE_LOST), (Cause.STALE, Cause.STALE)
    step = RolloutStep([group(0)], [group(1, causes=replaced)], [group(2, causes=stale)])
    RunRecord(recipe(tmp_path), log, decode).step(1, step, {}, seconds={})
    values = log.lines[0][1]
    assert values["infra_failed_rate"] == 1 / 6
    assert values["causes/engine_lost_count"] == 1
    assert values["causes/stale_count"] == 2
    written = (tmp_path / "r" / "rollout_data" / "1.jsonl").read_text().splitlines()
    assert {json.loads(line)["row_id"] for line in written} == {"row-0", "row-1"}


def test_the_mismatch_alarm_is_one_event_when_it_begins_and_one_when_it_ends(tmp_path):
    log = MemoryLog()
    record = RunRecord(recipe(tmp_path, "rollout.mismatch_alarm_k3=0.01"), log, decode)
    seen = [(0.001, 1.0), (0.02, 1.0), (0.03, 1.0), (0.001, 0.0), (0.001, 1.0)]
    for step, (k3, valid) in enumerate(seen, 1):
        values = {"training/mismatch_k3": k3, "training/rollout_probs_diff_valid": valid}
        record.step(step, RolloutStep([group()]), values, seconds={})
    assert [values["training/mismatch_alarm"] for _, values in log.lines] == [0, 1, 1, 1, 0]
    assert [(step, kind) for step, kind, _ in log.events] == [(2, "mismatch"), (5, "mismatch_over")]
    assert "k3 = 0.02 nats, rollout.mismatch_alarm_k3=0.01" in log.events[0][2]


def test_tokens_of_older_weights_alone_raise_no_alarm(tmp_path):
    log = MemoryLog()
    RunRecord(recipe(tmp_path), log, decode).step(1, RolloutStep([group()]), {"training/staleness_k3": 3.0}, seconds={})
    assert "training/mismatch_alarm" not in log.lines[0][1]
    assert log.events == []


def test_without_the_proximal_pass_there_is_nothing_to_compare_and_no_alarm(tmp_path):
    log = MemoryLog()
    RunRecord(recipe(tmp_path), log, decode).step(1, RolloutStep([group()]), {}, seconds={})
    assert "training/mismatch_alarm" not in log.lines[0][1]
