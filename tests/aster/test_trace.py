"""trace.json as Perfetto reads it: parsed back, cut off by a kill, bounded, and around the real loop."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from fakes import FakeLearners, FakePool, MemoryLog, row, trajectory, work

from aster.config import Recipe
from aster.data.prompts import PromptStream
from aster.driver import GrpoLoop
from aster.trace import Lanes, TracedLearners, Tracer
from aster.trace_file import TraceFile
from aster.types import Cause, PublishReport, Timing, ToolCall, ToolOutcome, TrajectoryGroup, Turn


def events(path):
    """As Perfetto takes it: an array whose end may be missing."""
    text = path.read_text()
    return json.loads(text if text.rstrip().endswith("]") else text.rstrip().rstrip(",") + "]")


def spans(path):
    """[(process, thread, name, begin in s, seconds, args)]."""
    found = events(path)
    processes = {e["pid"]: e["args"]["name"] for e in found if e["name"] == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in found if e["name"] == "thread_name"}
    return [
        (processes[e["pid"]], threads[e["pid"], e["tid"]], e["name"], e["ts"] / 1e6, e["dur"] / 1e6, e.get("args", {}))
        for e in found
        if e["ph"] == "X"
    ]


def test_a_closed_trace_is_strict_json_and_a_restart_goes_on_in_it(tmp_path):
    for name in ("first", "second"):
        file = TraceFile(tmp_path / "trace.json")
        file.span("engine-0", "lane 0", name, begin_s=1.5, seconds=0.25, args={"tokens": 3})
        file.close()
        json.loads((tmp_path / "trace.json").read_text())
    assert [(s[2], s[3], s[4]) for s in spans(tmp_path / "trace.json")] == [("first", 1.5, 0.25), ("second", 1.5, 0.25)]


def test_a_killed_writer_leaves_a_trace_that_opens_and_can_be_gone_on_with(tmp_path):
    path = tmp_path / "trace.json"
    script = f"""
import os, pathlib
from aster.trace_file import TraceFile
file = TraceFile(pathlib.Path({str(path)!r}))
for i in range(100):
    file.span("p", "t", f"span {{i}}", begin_s=i, seconds=0.5)
file.flush()
os.write(file._file.fileno(), b'{{"ph":"X","name":"to')
os.kill(os.getpid(), {int(signal.SIGKILL)})
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, env=os.environ)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes().endswith(b'"to'), "the kill came in the middle of a line"
    file = TraceFile(path)
    assert len(spans(path)) == 100
    file.span("p", "t", "after", begin_s=100, seconds=1)
    file.close()
    assert [s[2] for s in spans(path)] == [*(f"span {i}" for i in range(100)), "after"]


def test_a_full_file_makes_room_and_keeps_the_newest(tmp_path):
    file = TraceFile(tmp_path / "trace.json", max_bytes=2_000)
    for i in range(100):
        file.span("p", "t", f"span {i}", begin_s=i, seconds=1)
        file.flush()
    file.close()
    kept = [s[2] for s in spans(tmp_path / "trace.old.json") + spans(tmp_path / "trace.json")]
    assert kept == [f"span {i}" for i in range(100 - len(kept), 100)]
    assert len(kept) > 20
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) < 2 * 2_200


def test_intervals_of_one_lane_never_overlap():
    lanes = Lanes()
    assert [lanes.place(*i) for i in ((0, 4), (1, 2), (2, 3), (4, 5), (3.5, 4.5), (5, 6))] == [
        "lane 0", "lane 1", "lane 1", "lane 0", "lane 1", "lane 0",
    ]  # fmt: skip


def test_a_trajectory_is_turns_and_calls_inside_a_lane_and_the_calls_again_where_they_ran(tmp_path):
    tracer = Tracer(TraceFile(tmp_path / "trace.json"))
    call = ToolCall("1", "ok", ToolOutcome.SUCCESS, "1", seconds=0.75, queue_s=0.25)
    done = replace(
        trajectory(work(row(0)), 0, version=0, reward=1.0),
        engine="engine-1",
        sandbox="node-a",
        turns=(Turn(0, 2, "stop", 0.0, 1.0, call), Turn(3, 4, "stop", 1.75, 2.0)),
        timing=Timing(began_unix=100.0, total_s=2.0, score_s=0.1),
    )
    never_ran = replace(done, timing=Timing(), cause=Cause.ENGINE_LOST)
    tracer.group(TrajectoryGroup(row(0), 1, (done,), lost=(never_ran,)))
    tracer.close()
    assert [s[:5] for s in spans(tmp_path / "trace.json")] == [
        ("engine-1", "lane 0", "row-0 #0", 100.0, 2.0),
        ("engine-1", "lane 0", "generate", 100.0, 1.0),
        ("engine-1", "lane 0", "tool", 101.0, 0.75),
        ("sandbox node-a", "lane 0", "ok", 101.25, 0.5),
        ("engine-1", "lane 0", "generate", 101.75, 0.25),
        ("scoring", "lane 0", "score", 102.0, 0.1),
    ]


class TimedPool(FakePool):
    """Its trajectories carry times, its publications phases."""

    async def groups(self):
        async for group in super().groups():
            timed = [
                replace(t, engine="engine-0", timing=Timing(began_unix=1.0 + i, total_s=1.0))
                for i, t in enumerate(group.trajectories)
            ]
            yield replace(group, trajectories=tuple(timed))

    async def publish(self, source, version):
        report = await super().publish(source, version)
        await asyncio.sleep(0.05)
        return replace(report, phases={"begin": 0.01, "send": 0.02, "receive": 0.02, "accept": 0.001})


async def run_traced(tmp_path, *overrides):
    tiny = ("rollout.prompts_per_step=2", "rollout.group_size=2", "algo.mini_batch_prompts=1")
    short = ("learner.micro_batch_tokens=64", "run.steps=3", "run.val_every=0", "eval.samples=1")
    recipe = Recipe.load("rl_stage1_18k", [*tiny, *short, f"run.dir={tmp_path}", "run.name=r", *overrides])
    tracer = Tracer.open(recipe)
    seen: list[str] = []
    await GrpoLoop(
        recipe=recipe,
        learners=tracer.learners(FakeLearners(seen, dp_size=2)),
        pool=tracer.pool(TimedPool(seen)),
        prompts=PromptStream([row(i) for i in range(8)], batch=2, seed=1, epochs=3),
        log=MemoryLog(),
        decode=lambda ids, *, skip_special=False: " ".join(map(str, ids)),
        val_rows=[row(90)],
    ).run()
    tracer.close()
    return spans(tmp_path / "r" / "trace.json")


async def test_a_run_shows_its_steps_ranks_publications_and_validation(tmp_path):
    found = await run_traced(tmp_path)
    names = [(s[0], s[1], s[2]) for s in found]
    assert [n for n in names if n[1] == "step"] == [("driver", "step", f"step {i}") for i in (1, 2, 3)]
    assert names.count(("driver", "validation", "validation at step 0")) == 1
    assert [n[2] for n in names if n[1] == "publication"] == [f"publish v{i}" for i in range(4)]
    for rank in ("rank 0", "rank 1"):
        mine = [n[2] for n in names if n[:2] == ("learner", rank)]
        assert mine.count("optimizer step") == 6, "two mini-batches a step"
        assert mine.count("forward, backward") == 6
    assert sum(s[0] == "engine-0" and s[2] != "generate" for s in found) == 3 * 4 + 1


async def test_spans_of_a_track_nest_or_lie_apart(tmp_path):
    found = await run_traced(tmp_path)
    for track in {s[:2] for s in found}:
        open_ends: list[float] = []
        for _, _, name, begin, seconds, _ in sorted((s for s in found if s[:2] == track), key=lambda s: (s[3], -s[4])):
            while open_ends and open_ends[-1] <= begin + 1e-6:
                open_ends.pop()
            assert not open_ends or begin + seconds <= open_ends[-1] + 1e-6, (track, name)
            open_ends.append(begin + seconds)


async def test_a_publication_of_what_was_loaded_ends_no_step(tmp_path):
    """The first of a restarted process, and one after a roll-back."""
    tracer = Tracer(TraceFile(tmp_path / "trace.json"))
    pool = tracer.pool(FakePool([]))
    for version in (4, 5, 2, 3):
        await pool.publish(None, version)
    tracer.close()
    found = [s[2] for s in spans(tmp_path / "trace.json")]
    assert [name for name in found if name.startswith("step")] == ["step 5", "step 3"]


async def test_every_so_many_steps_are_traced_and_none_on_request(tmp_path):
    found = await run_traced(tmp_path, "run.trace_every=2")
    assert [s[2] for s in found if s[1] == "step"] == ["step 1", "step 3"]
    assert sum(s[0] == "engine-0" and s[2].startswith("row") for s in found) == 2 * 4 + 1
    never = Tracer.open(Recipe.load("rl_stage1_18k", [f"run.dir={tmp_path / 'other'}", "run.trace_every=0"]))
    pool = FakePool([])
    assert never.pool(pool) is pool
    assert not (tmp_path / "other").exists()


async def test_a_trace_that_cannot_be_written_ends_alone(tmp_path, caplog):
    file = TraceFile(tmp_path / "trace.json")
    tracer = Tracer(file)
    learners = TracedLearners(FakeLearners([]), tracer)
    file._file.close()  # as a full disk would do it
    assert (await learners.optim_step()).grad_norm == 1.0
    await learners.optim_step()
    tracer.published(PublishReport(1, 0, 0.0, 1), 0.0, 1.0)
    tracer.close()
    assert len([r for r in caplog.records if "not written any further" in r.message]) == 1


@pytest.mark.parametrize("text", ["", "[\n", '[\n{"torn', "not json at all"])
def test_a_file_that_is_no_trace_is_begun_again(tmp_path, text):
    (tmp_path / "trace.json").write_text(text)
    file = TraceFile(tmp_path / "trace.json")
    file.span("p", "t", "x", begin_s=0, seconds=1)
    file.close()
    assert [s[2] for s in spans(tmp_path / "trace.json")] == ["x"]
