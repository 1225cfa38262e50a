"""Run directories for the tests of the report: written by the real tracker and writers, with a real tokenizer."""

from __future__ import annotations

import io
import json
import time
from functools import cache
from pathlib import Path

import numpy as np
from rich.console import Console
from tokenizers import Tokenizer

from aster.config import Recipe
from aster.data.rollouts import write_rollouts, write_trajectories_parquet, write_validation
from aster.data.tokenizer import train_tokenizer
from aster.metrics import rollout_metrics, validation_metrics
from aster.tracking import Tracker
from aster.types import (
    Cause,
    PromptRow,
    Timing,
    ToolCall,
    ToolOutcome,
    Trajectory,
    TrajectoryGroup,
    Turn,
    Verdicts,
)

HOSTILE = "</script><img src=x onerror=alert(1)>{{SCRIPT}}<!--"

STEP_S = 8.0


@cache
def tokenizer() -> Tokenizer:
    return train_tokenizer(["What is it? The answer is a thought. first second"], merges=20)


def encode(text: str) -> np.ndarray:
    return np.array(tokenizer().encode(text, add_special_tokens=False).ids, dtype=np.int32)


def decode(ids: np.ndarray, /, *, skip_special: bool = False) -> str:
    return str(tokenizer().decode(ids.tolist(), skip_special_tokens=skip_special))


def trajectory(
    problem: str, sample: int, *, right: bool, step: int = 1, calls: int = 1, uid: str = "u", began: float = 0.0
) -> Trajectory:
    """`calls` calls of half a second, a second of generation before each, half a second for the answer."""
    ids: list[np.ndarray] = []
    mask: list[np.ndarray] = []
    turns: list[Turn] = []
    clock = 0.0

    def say(text: str, *, sampled: bool) -> None:
        ids.append(encode(text))
        mask.append(np.full(len(ids[-1]), sampled))

    def so_far() -> int:
        return sum(map(len, ids))

    for number in range(calls):
        code = f"x = {sample}\nprint(x)  # <b>{problem}</b>"
        call = json.dumps({"name": "code_interpreter", "arguments": {"code": code}})
        start = so_far()
        say(f"first thought {sample} é🙂\n</think>\n\n<tool_call>\n{call}\n</tool_call><|im_end|>", sampled=True)
        outcome = ToolOutcome.SUCCESS if right else ToolOutcome.RUNTIME_ERROR
        made = ToolCall(code, "ok" if right else "error", outcome, f"seen {sample}", 0.5)
        turns.append(Turn(start, so_far(), "stop", clock, clock + 1.0, made))
        clock += 1.5
        observed = f"\n<|im_start|>user\n<tool_response>\nseen {sample} in {number}\n</tool_response><|im_end|>\n"
        say(observed + "<|im_start|>assistant\n<think>\n", sampled=False)
    start = so_far()
    say(f"second thought\n</think>\n\nThe answer is \\boxed{{{sample}}}.<|im_end|>", sampled=True)
    turns.append(Turn(start, so_far(), "stop", clock, clock + 0.5))
    is_sampled = np.concatenate(mask)
    return Trajectory(
        uid=f"{uid}/{problem[:9]}/{sample}",
        row_id=f"row {problem[:9]}",
        sample=sample,
        prompt_ids=encode(f"<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n<think>\n"),
        ids=np.concatenate(ids),
        mask=is_sampled,
        behaviour_logprobs=np.where(is_sampled, -0.1, 0).astype(np.float32),
        versions=np.where(is_sampled, step - 1, -1).astype(np.int32),
        turns=tuple(turns),
        cause=Cause.ANSWERED,
        engine=f"engine-{sample % 2}",
        timing=Timing(began + 0.25 * sample, clock + 0.5, calls + 0.5, 0.5 * calls, 0.0, score_s=0.25),
    ).with_reward(float(right), Verdicts(right, right, str(sample)))


def group(
    problem: str, step: int, *right: bool, source: str = "math", calls: int = 1, kind: str = "train"
) -> TrajectoryGroup:
    """They began when the step did, if it is logged now and took STEP_S."""
    began = time.time() - STEP_S
    members = tuple(
        trajectory(problem, i, right=ok, step=step, calls=calls, uid=f"{kind}/{step}", began=began)
        for i, ok in enumerate(right)
    )
    return TrajectoryGroup(PromptRow(f"row {problem[:9]}", (), "1", source), step, members, kind)


def make_run(
    root: Path,
    name: str,
    *,
    problem: str = "What is 1+1?",
    steps: int = 3,
    right: int = 1,
    calls: int = 1,
    source: str = "aime",
    event: str | None = f"few calls {HOSTILE}",
) -> Path:
    """Two groups of three a step, one attempt of the first step lost and run again; a validation of nine problems."""
    model = root / "model-for-tests"
    model.mkdir(parents=True, exist_ok=True)
    tokenizer().save(str(model / "tokenizer.json"))
    overrides = [f"run.dir={root}", f"run.name={name}", "run.tensorboard=false", f"optim.lr={right}e-6"]
    recipe = Recipe.load("rl_stage1_18k", [*overrides, f"model.path={model}"])
    with Tracker.open(recipe, total_steps=steps, console=Console(file=io.StringIO())) as tracker:
        for step in range(1, steps + 1):
            train = [
                group(problem, step, True, False, True, calls=calls),
                group("other", step, False, False, True, calls=calls),
            ]
            if step == 1:
                lost = trajectory(problem, 1, right=True, calls=calls, uid="train/1/0", began=time.time() - STEP_S)
                lost = lost.failed(Cause.SANDBOX_LOST, f"node gone {HOSTILE}")
                train[0] = TrajectoryGroup(train[0].row, step, train[0].trajectories, lost=(lost,))
            timing = {"timing_s/step": STEP_S, "timing_s/gen": 5.0, "timing_s/old_log_prob": 1.0}
            timing |= {
                "timing_s/began_unix": time.time() - STEP_S,
                "timing_s/update_actor": 1.5,
                "timing_s/publish": 0.25,
            }
            tracker.log(step, rollout_metrics(train) | {"actor/lr": 1e-6, "perf/throughput": 10.0 * step} | timing)
            write_rollouts(recipe.run.path / "rollout_data", train, step=step, decode=decode)
            gaps = {t.uid: np.where(t.mask, -20, 0).astype(np.int8) for g in train for t in g.trajectories if t.sample}
            write_trajectories_parquet(recipe.run.path / "trajectories", train, step=step, gaps=gaps)
        val = [group(f"problem {i}", steps, *[i % 3 < right] * 2, source=source, kind="val") for i in range(9)]
        tracker.log(steps, validation_metrics(val, n=2))
        write_validation(recipe.run.path / "val_rollout_data", val, step=steps, decode=decode)
        if event is not None:
            tracker.event(2, "collapse", event)
    return recipe.run.path
