"""The loop of `aster sft` around a real learner in this process: what it logs, validates and saves, and how it resumes.

The learner's gang of actors is replaced by one rank without Ray; everything else is what `aster sft` runs.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import torch

from actors.learner import Learner
from aster import launch, sft
from aster.config import Recipe
from aster.data.base_corpus import base_conversations
from aster.data.conversations import write_conversations
from aster.errors import DataError
from aster.prepare import write_tiny_model
from aster.types import MicroBatch, OptimStats, StepStats, TokenScores

STEPS = 6


class OneRank:
    """`roles.LearnerGroup` over one learner in this process."""

    dp_size = 1

    def __init__(self, learner: Learner, *, dies_before: int | None) -> None:
        self.learner = learner
        self.dies_before = dies_before

    async def log_probs(self, microbatch_per_rank: Sequence[MicroBatch]) -> list[TokenScores]:
        return [self.learner.log_probs(microbatch_per_rank[0])]

    async def forward_backward(
        self, microbatch_per_rank: Sequence[MicroBatch], *, num_loss_tokens: int, num_groups: int
    ) -> StepStats:
        if self.dies_before is not None and self.learner.steps + 1 == self.dies_before:
            raise KeyboardInterrupt
        return self.learner.forward_backward(
            microbatch_per_rank[0], num_loss_tokens=num_loss_tokens, num_groups=num_groups
        )

    async def optim_step(self) -> OptimStats:
        return self.learner.optim_step()

    async def save(self, path: str) -> None:
        self.learner.save(path)

    async def saved(self) -> None:
        self.learner.saved()

    async def load(self, path: str) -> int:
        return self.learner.load(path)


class Runs:
    """`await go(name, ...)` is `aster sft` on the same model and data; returns the weights at its end."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.dies_before: int | None = None
        self.weights: dict[str, torch.Tensor] = {}
        conversations = base_conversations(echoes=20, drills=20, seed=0)
        write_conversations(folder / "talks.parquet", conversations)
        write_tiny_model(folder / "model", [m["content"] for c in conversations for m in c], seed=0)

        @contextlib.asynccontextmanager
        async def learners(recipe: Recipe, *, total_steps: int) -> AsyncIterator[OneRank]:
            learner = Learner(recipe, model_path=recipe.model.path, total_steps=total_steps)
            try:
                yield OneRank(learner, dies_before=self.dies_before)
                self.weights = {key: tensor.clone() for key, tensor in learner.model.named_full_tensors("float32")}
            finally:
                learner.close()  # it would leave torch's process group to the tests that come after

        monkeypatch.setattr(launch, "learners", learners)

    async def go(self, name: str, *more: str) -> dict[str, torch.Tensor]:
        files = [f"model.path={self.folder / 'model'}", f"data.train_files=[{self.folder / 'talks.parquet'}]"]
        settings = ["run.save_every=2", "run.val_every=2", "sft.val_fraction=0.2", "sft.batch_tokens=300"]
        schedule = ["optim.schedule=cosine_with_min_lr", "optim.warmup_steps=2", f"run.steps={STEPS}", "data.epochs=9"]
        await sft.run(
            Recipe.load("cpu_sft", [f"run.dir={self.folder}", f"run.name={name}", *files, *settings, *schedule, *more])
        )
        return self.weights

    def metrics(self, name: str) -> list[dict[str, float]]:
        lines = (json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines())
        return [
            {k: v for k, v in m.items() if not k.startswith(("timing", "perf/throughput", "time", "run_id", "config"))}
            for m in lines
        ]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(tmp_path, monkeypatch)


async def test_a_run_is_validated_saved_and_follows_its_schedule(runs: Runs) -> None:
    await runs.go("whole")
    steps = [m for m in runs.metrics("whole") if "train/loss" in m]
    assert [m["step"] for m in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[-1]["train/loss"] < steps[0]["train/loss"]
    # 2e-3 after two steps of warm-up, then half a cosine towards 2e-4, which a seventh step would reach
    rates = [m["actor/lr"] for m in steps]
    assert rates[:3] == pytest.approx([1e-3, 2e-3, 2e-3])
    assert rates[3:] == pytest.approx([1.7364e-3, 1.1e-3, 4.636e-4], rel=1e-3)
    validated = [m for m in runs.metrics("whole") if "val/loss" in m]
    assert [m["step"] for m in validated] == [0, 2, 4, 6]
    assert validated[-1]["val/loss"] < validated[0]["val/loss"]
    checkpoints = runs.folder / "whole/checkpoints"
    assert (checkpoints / "latest_checkpointed_iteration.txt").read_text() == "6\n"


async def test_a_run_that_was_killed_and_started_again_is_bit_equal_to_one_that_was_not(runs: Runs) -> None:
    expected = await runs.go("whole")
    runs.dies_before = 6
    with pytest.raises(KeyboardInterrupt):
        await runs.go("killed")
    runs.dies_before = None
    weights = await runs.go("killed")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    whole, killed = runs.metrics("whole"), runs.metrics("killed")
    assert [m["step"] for m in killed if "train/loss" in m] == [1, 2, 3, 4, 5, 5, 6]
    last: dict[tuple[float, bool], dict[str, float]] = {(m["step"], "val/loss" in m): m for m in killed}
    assert list(last.values()) == whole


async def test_a_run_that_is_complete_trains_no_further(runs: Runs) -> None:
    expected = await runs.go("whole")
    lines = len(runs.metrics("whole"))
    again = await runs.go("whole")
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    (said,) = runs.metrics("whole")[lines:]
    assert (said["event"], said["message"]) == (
        "complete",
        "all 6 steps are done: raise run.steps or data.epochs for more",
    )


async def test_a_run_goes_on_only_with_the_data_and_batches_it_began_with(runs: Runs) -> None:
    await runs.go("whole", "run.steps=2")
    for setting, words in (
        ("sft.seed=7", "seed was 42, is 7"),
        ("sft.batch_tokens=500", "batch_tokens was 300, is 500"),
        ("sft.max_length=40", "samples was '[0-9a-f]{16}', is '[0-9a-f]{16}'"),
    ):
        with pytest.raises(DataError, match=rf"global_step_2 was made with other conversations or batches: .*{words}"):
            await runs.go("whole", setting)
    with pytest.raises(DataError, match=r"global_step_9 is no checkpoint of `aster sft`: name another run\.name"):
        sft.require_same_data(None, {}, "global_step_9")
    await runs.go("whole", "sft.seed=7", "run.resume=false")
    assert [m["step"] for m in runs.metrics("whole") if "train/loss" in m][-1] == STEPS
