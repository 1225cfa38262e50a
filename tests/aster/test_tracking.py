import io
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from aster.config import Recipe
from aster.errors import ConfigError
from aster.tracking import JsonlSink, Progress, Tracker, read_events, read_lines, read_metrics, summary_line


def recipe(tmp_path: Path, *overrides: str) -> Recipe:
    return Recipe.load("rl_stage1_18k", [f"run.dir={tmp_path}", "run.name=r", "run.tensorboard=false", *overrides])


def plain() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=200)


def test_every_line_names_run_config_and_step(tmp_path: Path) -> None:
    r = recipe(tmp_path)
    with Tracker.open(r, total_steps=2, console=plain()) as tracker:
        tracker.log(1, {"critic/score/mean": 0.5})
        tracker.log(1, {"timing_s/save_checkpoint": 3.0})
        tracker.event(1, "restart", "rank 2 died")
    lines = list(read_lines(tmp_path / "r" / "metrics.jsonl"))
    assert len(lines) == 3
    assert {line["config_hash"] for line in lines} == {r.config_hash}
    assert len({line["run_id"] for line in lines}) == 1
    assert lines[0]["run_id"].startswith("r-")
    assert [line["step"] for line in lines] == [1, 1, 1]
    assert (tmp_path / "r" / "config.yaml").read_text() == r.to_yaml()
    assert read_metrics(tmp_path / "r" / "metrics.jsonl") == {
        1: {"critic/score/mean": 0.5, "timing_s/save_checkpoint": 3.0}
    }
    assert [(e["event"], e["message"]) for e in read_events(tmp_path / "r" / "metrics.jsonl")] == [
        ("restart", "rank 2 died")
    ]


def test_a_line_is_on_disk_before_log_returns(tmp_path: Path) -> None:
    tracker = Tracker.open(recipe(tmp_path), total_steps=2, console=plain())
    tracker.log(1, {"a": 1.0})
    assert read_metrics(tmp_path / "r" / "metrics.jsonl") == {1: {"a": 1.0}}
    tracker.close()


def test_values_that_are_not_finite_survive_in_strict_json(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "m.jsonl", run_id="r", config_hash="h")
    sink.write(1, {"a": math.inf, "b": -math.inf, "c": math.nan})
    sink.close()

    def refuse(constant: str) -> float:
        raise AssertionError(constant)

    json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=refuse)
    values = read_metrics(tmp_path / "m.jsonl")[1]
    assert (values["a"], values["b"]) == (math.inf, -math.inf)
    assert math.isnan(values["c"])


def test_a_resumed_run_keeps_its_id_and_its_last_word_on_a_step(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        with Tracker.open(recipe(tmp_path), total_steps=2, console=plain()) as tracker:
            tracker.log(1, {"a": value})
    lines = list(read_lines(tmp_path / "r" / "metrics.jsonl"))
    assert len({line["run_id"] for line in lines}) == 1
    assert read_metrics(tmp_path / "r" / "metrics.jsonl") == {1: {"a": 2.0}}


def test_a_run_that_does_not_resume_keeps_the_old_metrics_aside(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        with Tracker.open(recipe(tmp_path, "run.resume=false"), total_steps=2, console=plain()) as tracker:
            tracker.log(1, {"a": value})
    (old,) = (tmp_path / "r").glob("metrics.r-*.jsonl")
    assert read_metrics(old) == {1: {"a": 1.0}}
    assert read_metrics(tmp_path / "r" / "metrics.jsonl") == {1: {"a": 2.0}}


def test_a_line_torn_by_a_killed_process_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "r" / "metrics.jsonl"
    with Tracker.open(recipe(tmp_path), total_steps=2, console=plain()) as tracker:
        tracker.log(1, {"a": 1.0})
    with path.open("a") as file:
        file.write('{"run_id": "r", "step": 2, "a"')
    with Tracker.open(recipe(tmp_path), total_steps=2, console=plain()) as tracker:
        tracker.log(2, {"a": 3.0})
    assert read_metrics(path) == {1: {"a": 1.0}, 2: {"a": 3.0}}


class Broken:
    name = "broken"

    def __init__(self) -> None:
        self.calls = 0

    def write(self, step: int, values: object) -> None:
        self.calls += 1
        raise OSError("disk full")

    def event(self, step: int, kind: str, message: str) -> None:
        raise OSError("disk full")

    def close(self) -> None:
        raise OSError("disk full")


def test_a_failing_sink_is_counted_warned_of_once_and_harms_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.jsonl"
    broken = Broken()
    tracker = Tracker(tmp_path, recipe(tmp_path), sinks=[broken, JsonlSink(path, run_id="r", config_hash="h")])
    for step in (1, 2, 3):
        tracker.log(step, {"a": float(step)})
    tracker.close()
    assert broken.calls == 3, "it is tried again: a disk may be full for a while only"
    assert tracker.failures == {"broken": 4}
    assert read_metrics(path)[3] == {"a": 3.0, "tracking/broken_failures": 2.0}
    err = capsys.readouterr().err
    assert err.count("Traceback") == 1
    assert "'broken' failed (OSError: disk full)" in err.replace("\n", " ")


def collapse(calls: float, ratio: float = 0.0) -> dict[str, float]:
    return {"collapse/calls_mean": calls, "collapse/ratio": ratio}


def test_a_collapse_alarm_is_one_event_when_it_begins_and_one_when_it_ends(tmp_path: Path) -> None:
    console = plain()
    with Tracker.open(recipe(tmp_path), total_steps=9, console=console) as tracker:
        for step, ratio in enumerate([0.1, 0.4, 0.5, 0.2], start=1):
            tracker.log(step, collapse(4.0, ratio))
    path = tmp_path / "r" / "metrics.jsonl"
    assert [(e["step"], e["event"]) for e in read_events(path)] == [(2, "collapse"), (4, "collapse_over")]
    assert "40% of trajectories" in read_events(path)[0]["message"]
    assert [v["collapse/alarm"] for v in read_metrics(path).values()] == [0, 1, 1, 0]
    assert "interaction collapse" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_resumed_run_remembers_where_calls_began(tmp_path: Path) -> None:
    with Tracker.open(recipe(tmp_path), total_steps=99, console=plain()) as tracker:
        tracker.log(0, collapse(4.0))
    with Tracker.open(recipe(tmp_path), total_steps=99, console=plain()) as tracker:
        for step in range(1, 13):
            tracker.log(step, collapse(1.0))
    (event,) = read_events(tmp_path / "r" / "metrics.jsonl")
    assert "below 50% of 4.00" in event["message"]


def test_tensorboard_reads_back_what_was_logged_and_torch_stays_out(tmp_path: Path) -> None:
    script = f"""
import sys
from aster.config import Recipe
from aster.tracking import Tracker
r = Recipe.load("rl_stage1_18k", ["run.dir={tmp_path}", "run.name=tb"])
with Tracker.open(r, total_steps=2) as t:
    t.log(1, {{"critic/score/mean": 0.25}})
    t.log(2, {{"critic/score/mean": 0.75}})
assert "torch" not in sys.modules, "tracking must not import torch"
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=240)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tb" / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("critic/score/mean")] == [(1, 0.25), (2, 0.75)]


class _Wandb:
    """As much of the package as we call, which is not among the test's own."""

    class AlertLevel:
        WARN = "warn"

    def __init__(self) -> None:
        self.calls: list[tuple[str, object]] = []

    def init(self, **options: object) -> "_Wandb":
        return self

    def __getattr__(self, name: str) -> object:
        return lambda *a, **k: self.calls.append((name, a or k))


def test_wandb_counts_our_steps_and_takes_one_that_comes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = _Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with Tracker.open(recipe(tmp_path, "run.wandb_project=p"), total_steps=2, console=plain()) as tracker:
        tracker.log(2, {"critic/score/mean": 0.5})
        tracker.log(1, {"critic/score/mean": 0.25})
        tracker.event(2, "collapse", "few calls")
    assert [what for name, what in wandb.calls if name == "log"] == [
        ({"critic/score/mean": 0.5, "step": 2},),
        ({"critic/score/mean": 0.25, "step": 1},),
    ]
    assert ("define_metric", ("*",)) in wandb.calls
    assert ("alert", {"title": "collapse", "text": "step 2: few calls", "level": "warn"}) in wandb.calls


def test_wandb_that_is_asked_for_but_missing_is_a_config_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"run\.wandb_project='p' needs the package wandb.*uv pip install wandb"):
        Tracker.open(recipe(tmp_path, "run.wandb_project=p"), total_steps=1, console=plain())


def test_progress_writes_one_plain_line_per_step_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    console = plain()
    progress = Progress(4, stage="rl", console=console)
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for step in (1, 2):
        progress.write(step, {"critic/score/mean": 0.5, "tool_use_info/avg_tool_calls_per_trajectory": 2.25})
        now[0] += 90
    progress.write(2, {"timing_s/save_checkpoint": 1.0})
    progress.close()
    assert console.file.getvalue().splitlines() == [  # type: ignore[attr-defined]
        "rl 1/4  reward 0.500  calls 2.25",
        "rl 2/4  reward 0.500  calls 2.25  eta 3m00s",
    ]


def test_fast_steps_share_a_line_in_a_log_but_validations_and_the_last_step_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    console = plain()
    progress = Progress(100, stage="sft", console=console)
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for step in range(1, 101):
        progress.write(step, {"train/loss": 1.0})
        if step == 50:
            progress.write(step, {"val-core/x/acc/mean@1": 0.5})
        now[0] += 0.125
    progress.close()
    steps = [line.split("/")[0] for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert steps == ["sft 1", "sft 17", "sft 33", "sft 49", "sft 50", "sft 66", "sft 82", "sft 98", "sft 100"]


def test_progress_is_a_live_line_on_a_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    progress = Progress(4, stage="rl", console=console)
    progress.write(3, {"critic/score/mean": 0.5, "perf/throughput": 1234.0})
    progress.close()
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "3/4" in text
    assert "reward 0.500  1234 tok/s" in text


def test_a_validation_of_sft_is_shown_and_never_left_out_of_a_log() -> None:
    console = plain()
    progress = Progress(100, stage="sft", console=console)
    progress.write(1, {"train/loss": 1.0})
    progress.write(1, {"val/loss": 0.25, "val/tool_format_accuracy": 0.875, "val/tokens": 10.0})
    progress.close()
    last = console.file.getvalue().splitlines()[-1]  # type: ignore[attr-defined]
    assert last == "sft 1/100  validation loss 0.2500  calls well formed 87.5%"


def test_the_summary_shows_validation_with_its_interval() -> None:
    values = {"val-core/aime/acc/mean@16": 0.5, "val-core/aime/acc/mean@16/ci_low": 0.4}
    values["val-core/aime/acc/mean@16/ci_high"] = 0.6
    assert summary_line(values) == "aime mean@16 0.500 [0.400, 0.600]"
    assert summary_line({"val-core/openai/gsm8k/acc/mean@1": 0.5}) == "openai/gsm8k mean@1 0.500"
