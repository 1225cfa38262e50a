"""`run.deterministic`: a run that was killed and resumed ends where an uninterrupted one ends, bit for bit.

It is killed while it samples: what its engine had finished comes back from the journal and is not sampled again.

Both are `aster.train` as a person starts it, in a process of its own, with Ray, vLLM, a learner rank and sandbox cells.
The model has learnt a conversation by heart, so that most trajectories call the tool and half of them answer right.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from learners import read_checkpoint
from taught import teach

pytest.importorskip("vllm", reason="vllm is not installed: make setup")

import psutil  # vllm's

from aster.checkpoints import LATEST, newest
from aster.data.coldstart import final_turn, tool_turn
from aster.data.prompts import user_message, write_prompts
from aster.tracking import METRICS_FILE, read_metrics
from aster.types import PromptRow

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1300)]

STEPS = 2
TURNS = 4  # of the 6 trajectories of a step, most have two
FREE = ("timing", "perf")  # what a clock decides
PROBLEMS = [f"Let x={a}*{b}. Find x." for a, b in ((3, 4), (4, 3), (2, 6), (6, 2))]


def test_a_run_that_was_killed_in_the_middle_of_a_step_ends_bit_equal_to_one_that_was_not(tmp_path):
    model = _taught_model(tmp_path / "model")
    write_prompts(
        tmp_path / "train.parquet",
        [PromptRow(text, ({"role": "user", "content": user_message(text)},), "12", "tiny") for text in PROBLEMS],
    )
    with _training(tmp_path, model, "whole") as process:
        assert process.wait(400) == 0, _log(tmp_path, "whole")
    with _training(tmp_path, model, "parts") as process:
        _wait_for_turns_of_the_second_step(process, tmp_path, "parts")
    assert newest(tmp_path / "parts" / "checkpoints").name == "global_step_1"
    finished = _journaled(tmp_path / "parts", version=1)
    assert finished >= TURNS, "the kill was to come in the middle of the sampling"
    with _training(tmp_path, model, "parts") as process:
        assert process.wait(400) == 0, _log(tmp_path, "parts")

    for step in range(1, STEPS + 1):
        whole, parts = (_trajectories(tmp_path / run, step) for run in ("whole", "parts"))
        assert whole == parts, f"trajectories of step {step}"
    whole, parts = (_metrics(tmp_path / run) for run in ("whole", "parts"))
    assert whole.keys() == parts.keys() == {1, 2}
    for step, values in whole.items():
        assert {name: parts[step].get(name) for name in values} == values, step
        assert values.keys() == parts[step].keys()
    resumed = read_metrics(tmp_path / "parts" / METRICS_FILE)[2]
    assert resumed["perf/recalled_turns"] == finished, "what was finished was not sampled again"
    assert resumed["perf/recalled_afresh"] == 0.0
    assert whole[1]["tool_use_info/avg_tool_calls_per_trajectory"] > 0.5, "the sandbox takes part"
    final, again = (read_checkpoint(newest(tmp_path / run / "checkpoints") / "actor") for run in ("whole", "parts"))
    start = read_checkpoint(tmp_path / "whole" / "checkpoints" / "global_step_1" / "actor")
    assert final.keys() == again.keys()
    for name, tensor in final.items():
        assert torch.equal(tensor, again[name]), name
    assert not all(torch.equal(tensor, start[name]) for name, tensor in final.items()), "the second step learnt"


def _taught_model(path: Path) -> Path:
    """A fresh small model that has learnt one call by heart, and to answer it with the result or one more."""
    conversations = [
        [
            {"role": "user", "content": user_message(text)},
            {"role": "assistant", "content": tool_turn("multiply", "print(3*4)")},
            {"role": "tool", "content": "12"},
            {"role": "assistant", "content": final_turn("done", answer)},
        ]
        for text in PROBLEMS
        for answer in ("12", "13")
    ]
    return teach(path, conversations)


@contextmanager
def _training(root: Path, model: Path, run: str) -> Iterator[subprocess.Popen[bytes]]:
    """The command; at the end of the body it and everything that it started is killed, all at once."""
    overrides = [
        f"model.path={model}",
        f"data.train_files=[{root / 'train.parquet'}]",
        "data.val_files=[]",
        f"run.dir={root}",
        f"run.name={run}",
        f"run.steps={STEPS}",
        "run.deterministic=true",
        "run.save_every=1",
        "run.keep_checkpoints=2",
        "rollout.max_num_seqs=1",
        "rollout.prompts_per_step=2",
        "rollout.group_size=3",
        "algo.mini_batch_prompts=1",
        "optim.lr=1e-3",
        "budget.max_response_tokens=160",
        "sandbox.backend=process",
        "tool.timeout_s=60",  # a stall is no call that timed out: its answer would differ
        "sandbox.sessions_per_cell=4",
    ]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": f"/tmp/rdet{os.getpid()}"}
    environment.pop("RAY_ADDRESS", None)
    with (root / f"{run}.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "aster.train", "--recipe", "cpu_rl_stage1", *overrides],
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        family = [psutil.Process(process.pid)] if process.poll() is None else []
        family += [child for one in family for child in one.children(recursive=True)]
        for one in family:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait(60)
        psutil.wait_procs(family, timeout=60)


def _wait_for_turns_of_the_second_step(process: subprocess.Popen[bytes], root: Path, run: str) -> None:
    """Until the checkpoint of the first one is complete, and some turns of the second are sampled."""
    deadline = time.monotonic() + 400
    while not (root / run / "checkpoints" / LATEST).exists() or _journaled(root / run, version=1) < TURNS:
        assert process.poll() is None, _log(root, run)
        assert time.monotonic() < deadline, _log(root, run)
        time.sleep(0.02)


def _journaled(run: Path, *, version: int) -> int:
    """Whole lines of the journal that hold a turn of this version; the first of each file is about the file."""
    return sum(max(f.read_bytes().count(b"\n") - 1, 0) for f in run.glob(f"journal/{version}.*.jsonl"))


def _metrics(run: Path) -> dict[int, dict[str, float]]:
    return {
        step: {name: value for name, value in values.items() if not name.startswith(FREE)}
        for step, values in read_metrics(run / METRICS_FILE).items()
    }


def _trajectories(run: Path, step: int) -> list[dict[str, object]]:
    columns = ["row_id", "sample", "ids", "mask", "behaviour_logprobs", "versions", "reward"]
    rows: list[dict[str, object]] = pq.read_table(run / "trajectories" / f"{step}.parquet", columns=columns).to_pylist()
    return rows


def _log(root: Path, run: str) -> str:
    return (root / f"{run}.log").read_text(errors="replace")[-3000:]
