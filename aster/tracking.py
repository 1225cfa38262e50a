"""Where a run's metrics go: metrics.jsonl (the record), TensorBoard, W&B if asked for, and a line for the person.

A sink that fails does not end the training, and does not fail in silence either: it is counted, its first traceback is
printed, and `tracking/{sink}_failures` appears in the other sinks' metrics. What the values mean is `metrics`' job.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
import secrets
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from aster.algo.alarm import AlarmWatch, CollapseAlarm
from aster.config import Recipe
from aster.errors import ConfigError

METRICS_FILE = "metrics.jsonl"
LATEST = 1e11  # unix seconds, in the year 5138: a reader takes no time for one that is not below
_LOG_LINE_EVERY_S = 2.0
_ABOUT_LINE = frozenset({"run_id", "config_hash", "step", "time", "event", "message"})


class Sink(Protocol):
    name: str

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def event(self, step: int, kind: str, message: str) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """Logs one run to all its sinks, and watches for interaction collapse on the way.

    >>> with Tracker.open(recipe, total_steps=405) as tracker:      # doctest: +SKIP
    ...     tracker.log(1, {"critic/score/mean": 0.25})
    """

    def __init__(self, run_dir: Path, recipe: Recipe, *, sinks: Sequence[Sink], watch: AlarmWatch | None = None):
        self.run_dir = run_dir
        self.config_hash = recipe.config_hash
        self.failures: dict[str, int] = {}
        self._sinks = tuple(sinks)
        self._watch = watch or AlarmWatch(_alarm_of(recipe))
        self._alarmed: frozenset[str] = frozenset()

    @classmethod
    def open(
        cls,
        recipe: Recipe,
        *,
        total_steps: int | None,
        console: Console | None = None,
        extra: Sequence[Sink] = (),
        goes_on: bool = False,
    ) -> Tracker:
        """The sinks that the recipe names and `extra` ones, in its run directory, which also gets the resolved
        `config.yaml`. Without `total_steps` the terminal gets no `Progress` but one that `extra` brings.

        A resumed run goes on in the same metrics.jsonl under the same run id, and the collapse alarm remembers where
        calls began. With `run.resume=false` an older metrics.jsonl is kept aside as `metrics.RUN_ID.jsonl`, unless
        this process wrote it and `goes_on`.
        """
        run_dir = recipe.run.path
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / METRICS_FILE
        run_id, watch = _continue_run(path, _alarm_of(recipe), resume=recipe.run.resume or goes_on)
        run_id = run_id or f"{recipe.run.name}-{secrets.token_hex(4)}"
        (run_dir / "config.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        sinks: list[Sink] = [JsonlSink(path, run_id=run_id, config_hash=recipe.config_hash)]
        if total_steps is not None:
            sinks.append(Progress(total_steps, stage=recipe.run.name, console=console))
        if recipe.run.tensorboard:
            sinks.append(TensorBoardSink(run_dir / "tensorboard"))
        if recipe.run.wandb_project:
            sinks.append(WandbSink(recipe, run_id=run_id))
        return cls(run_dir, recipe, sinks=[*sinks, *extra], watch=watch)

    @property
    def alarm_since(self) -> int | None:
        """The step at which the collapse alarm went on; None while it is off. Of what was logged so far."""
        return self._watch.since

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics. May be called again for a step: readers merge its lines, the last value wins."""
        values = dict(values)
        seen = self._watch.observe(step, values)
        if seen is not None and seen.alarm.ema_calls is not None:
            values["collapse/calls_ema"] = seen.alarm.ema_calls
            values["collapse/alarm"] = float(bool(seen.reasons))
        for name, count in self.failures.items():
            values[f"tracking/{name}_failures"] = float(count)
        for sink in self._sinks:
            self._guard(sink, lambda sink=sink: sink.write(step, values))
        if seen is not None:
            self._raise_alarm(step, seen.reasons)

    def event(self, step: int, kind: str, message: str) -> None:
        """Something a person should read: an alarm, a restart, a dropped batch."""
        for sink in self._sinks:
            self._guard(sink, lambda sink=sink: sink.event(step, kind, message))

    def close(self) -> None:
        for sink in self._sinks:
            self._guard(sink, sink.close)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _raise_alarm(self, step: int, reasons: Mapping[str, str]) -> None:
        """One event when a rule of the alarm begins to hold, one when none holds any more; not one per step."""
        rules = frozenset(reasons)
        if not rules <= self._alarmed:
            self.event(step, "collapse", "interaction collapse: " + "; ".join(reasons.values()))
        elif self._alarmed and not rules:
            self.event(step, "collapse_over", "tool use is back within the limits of the collapse alarm")
        self._alarmed = rules

    def _guard(self, sink: Sink, action: Any) -> None:
        try:
            action()
        except Exception as error:  # policy: a sink may be full, slow or offline; the training goes on, and says so
            self.failures[sink.name] = self.failures.get(sink.name, 0) + 1
            if self.failures[sink.name] == 1:
                console = Console(stderr=True)
                console.print(
                    f"metrics sink {sink.name!r} failed ({type(error).__name__}: {error}); the run goes on, further "
                    f"failures are only counted in tracking/{sink.name}_failures",
                    style="yellow",
                    markup=False,
                )
                traceback.print_exception(error)


def _alarm_of(recipe: Recipe) -> CollapseAlarm:
    c = recipe.collapse
    return CollapseAlarm(decay=c.ema_decay, max_drop=c.max_drop, max_ratio=c.max_ratio)


def _continue_run(path: Path, alarm: CollapseAlarm, *, resume: bool) -> tuple[str | None, AlarmWatch]:
    """The run id and alarm state that an existing metrics.jsonl carries; moves the file aside if not resuming."""
    watch = AlarmWatch(alarm)
    if not path.exists():
        return None, watch
    run_id: str | None = None
    for line in read_lines(path):
        run_id = line.get("run_id", run_id)
        if "event" not in line:
            watch.observe(line["step"], _numbers(line))
    if resume:
        return run_id, watch
    path.rename(path.with_name(f"metrics.{run_id or 'unnamed'}.jsonl"))
    return None, AlarmWatch(alarm)


# sinks ---------------------------------------------------------------------------------------------------------------


class JsonlSink:
    """`metrics.jsonl`: one strict-JSON object per call, with run id, config hash, step and unix time; flushed.

    A value that is not finite is written as the string "nan", "inf" or "-inf", which `float()` reads back.
    """

    name = "jsonl"

    def __init__(self, path: Path, *, run_id: str, config_hash: str) -> None:
        self.run_id = run_id
        self._about = {"run_id": run_id, "config_hash": config_hash}
        torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        self._file = path.open("a", encoding="utf-8")
        if torn:  # the last process died while writing; its half line must not swallow ours
            self._file.write("\n")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._line(step, {name: _strict(value) for name, value in values.items()})

    def event(self, step: int, kind: str, message: str) -> None:
        self._line(step, {"event": kind, "message": message})

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def _line(self, step: int, body: Mapping[str, Any]) -> None:
        line = {**self._about, "step": step, "time": round(time.time(), 3), **body}
        self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()


class TensorBoardSink:
    """Scalars through the tensorboard package's own event writer; torch is not imported."""

    name = "tensorboard"

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboard.compat.proto.event_pb2 import Event
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError:
            raise ConfigError(
                "run.tensorboard=true needs the package tensorboard: make setup installs it (EXTRA=cpu or gpu), "
                "or set run.tensorboard=false"
            ) from None
        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(folder))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        items = [self._summary.Value(tag=name, simple_value=float(value)) for name, value in values.items()]
        self._writer.add_event(self._event(step=step, wall_time=time.time(), summary=self._summary(value=items)))
        self._writer.flush()

    def event(self, step: int, kind: str, message: str) -> None:
        self.write(step, {f"events/{kind}": 1.0})

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Weights & Biases, only when `run.wandb_project` is set; a resumed run continues its W&B run."""

    name = "wandb"

    def __init__(self, recipe: Recipe, *, run_id: str) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                f"run.wandb_project={recipe.run.wandb_project!r} needs the package wandb, which no lock has: "
                "uv pip install wandb, or leave run.wandb_project empty"
            ) from None
        self._run = wandb.init(
            project=recipe.run.wandb_project,
            name=recipe.run.name,
            id=run_id,
            resume="allow",
            dir=str(recipe.run.path),
            config=recipe.flat() | {"config_hash": recipe.config_hash},
        )
        self._alert = wandb.AlertLevel.WARN
        # An axis of ours: W&B drops what is logged for a step below its own, and a step may come again (a roll-back).
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def event(self, step: int, kind: str, message: str) -> None:
        self._run.alert(title=kind, text=f"step {step}: {message}", level=self._alert)

    def close(self) -> None:
        self._run.finish()


class Progress:
    """What a person sees: a live line on a terminal; in a log file a plain line per step, `every_s` apart at least.

    Validations and the last step are always written. `unit` is what is counted, where it is not steps.
    """

    name = "console"

    def __init__(
        self,
        total: int,
        *,
        stage: str,
        unit: str = "",
        every_s: float = _LOG_LINE_EVERY_S,
        console: Console | None = None,
    ) -> None:
        self._console = console or Console(stderr=True)
        self._stage = stage
        self._total = total
        self._unit = f" {unit}" if unit else ""
        self._every_s = every_s
        self._began: tuple[int, float] | None = None  # first step seen, and when
        self._next_line = 0.0  # in time.monotonic() seconds
        self._live: RichProgress | None = None
        if self._console.is_terminal:
            self._live = RichProgress(
                SpinnerColumn(),
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[summary]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._live.add_task(stage, total=total, summary="")
            self._live.start()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if summary := summary_line(values):  # empty for a checkpoint's timing, say
            validation = any(key.startswith(("val-core/", "val/")) for key in values)
            self.show(step, summary, always=validation)

    def show(self, done: int, summary: str, *, always: bool = False) -> None:
        """`done` of the total are done; `always` also where the last line is not `every_s` old."""
        if self._live is not None:
            self._live.update(self._task, completed=done, summary=summary)
            return
        now = time.monotonic()
        self._began = self._began or (done, now)
        if now < self._next_line and done < self._total and not always:
            return
        self._next_line = now + self._every_s
        self._line(done, f"{summary}{self._eta(done)}")

    def event(self, step: int, kind: str, message: str) -> None:
        self._line(step, f"{kind}: {message}", style="yellow")

    def _line(self, done: int, text: str, *, style: str | None = None) -> None:
        line = f"{self._stage} {done}/{self._total}{self._unit}  {text}"
        self._console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()

    def _eta(self, step: int) -> str:
        first, began = self._began or (step, time.monotonic())
        if step <= first or step >= self._total:
            return ""
        left = (time.monotonic() - began) / (step - first) * (self._total - step)
        hours, minutes = divmod(round(left) // 60, 60)
        return f"  eta {hours}h{minutes:02d}m" if hours else f"  eta {round(left) // 60}m{round(left) % 60:02d}s"


def summary_line(values: Mapping[str, float]) -> str:
    """The few numbers worth watching.

    >>> summary_line({"critic/score/mean": 0.5, "perf/throughput": 1234.5})
    'reward 0.500  1234 tok/s'
    """
    parts = []
    for key, form in (
        ("critic/score/mean", "reward {:.3f}"),
        ("train/loss", "loss {:.4f}"),
        ("val/loss", "validation loss {:.4f}"),
        ("val/tool_format_accuracy", "calls well formed {:.1%}"),
        ("tool_use_info/avg_tool_calls_per_trajectory", "calls {:.2f}"),
        ("actor/entropy", "entropy {:.3f}"),
        ("perf/throughput", "{:.0f} tok/s"),
    ):
        if key in values:
            parts.append(form.format(values[key]))
    for key, value in values.items():
        if key.startswith("val-core/") and "/acc/mean@" in key and not key.endswith(("/ci_low", "/ci_high")):
            interval = [values.get(f"{key}/{end}") for end in ("ci_low", "ci_high")]
            spread = "" if None in interval else f" [{interval[0]:.3f}, {interval[1]:.3f}]"
            source, _, mean = key.removeprefix("val-core/").rpartition("/acc/")
            parts.append(f"{source} {mean} {value:.3f}{spread}")
    return "  ".join(parts)


# reading -------------------------------------------------------------------------------------------------------------


def read_lines(path: Path, *, on_bad_line: Callable[[str], None] = lambda _: None) -> Iterator[dict[str, Any]]:
    """The lines of a metrics.jsonl in order: `step` and `time` are numbers, an event has a message, metrics are numbers
    or the text of one. What is wrong with another line, which a killed process may have torn, goes to `on_bad_line`."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
                problem = _problem(line)
            except RecursionError:
                problem = "nested too deeply"
            except ValueError as error:
                problem = f"not JSON ({error})"
            if problem:
                on_bad_line(f"{path}, line {number}: {problem}")
            else:
                yield line


def _problem(line: object) -> str:
    """Of a line that was read; empty where there is none."""
    if not isinstance(line, dict):
        return f"a JSON {type(line).__name__}, not an object"
    if not isinstance(line.get("step"), int):
        return f"step is {reprlib.repr(line.get('step'))}, not a whole number"
    if "time" in line and not (isinstance(line["time"], int | float) and abs(line["time"]) < LATEST):
        return f"time is {reprlib.repr(line['time'])}, not unix seconds"
    if "event" in line:
        texts = (line["event"], line.get("message"))
        return "" if all(isinstance(text, str) for text in texts) else "event and message must be text"
    odd = next((name for name, value in line.items() if name not in _ABOUT_LINE and not _is_number(value)), None)
    return "" if odd is None else f"{odd} is {reprlib.repr(line[odd])}, not a number"


def _is_number(value: object) -> bool:
    """What `_numbers` can take: "nan" and "inf" are written as text."""
    if not isinstance(value, int | float | str):
        return False
    try:
        float(value)
    except (ValueError, OverflowError):
        return False
    return True


def read_metrics(path: Path) -> dict[int, dict[str, float]]:
    """`{step: {name: value}}`, steps in order; of several lines for a step the last value wins."""
    steps: dict[int, dict[str, float]] = {}
    for line in read_lines(path):
        if "event" not in line:
            steps.setdefault(line["step"], {}).update(_numbers(line))
    return dict(sorted(steps.items()))


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a metrics.jsonl: step, time, event, message."""
    return [line for line in read_lines(path) if "event" in line]


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in line.items() if name not in _ABOUT_LINE}


def _strict(value: float) -> float | str:
    number = float(value)
    return number if math.isfinite(number) else str(number)
