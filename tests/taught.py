"""A small model that knows a few conversations by heart, for tests that need real calls and no ability."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from learners import learner_on, train

from aster.agent.chat import ChatRenderer
from aster.config import Recipe
from aster.data.coldstart import Messages
from aster.data.conversations import to_samples
from aster.prepare import write_tiny_model


def teach(path: Path, conversations: Sequence[Messages], *, steps: int = 60) -> Path:
    """A fresh model at `path` trained on all of `conversations` in each step; returns the taught one's directory."""
    write_tiny_model(path, [str(c) for c in conversations], seed=0)
    samples, dropped = to_samples(list(conversations), ChatRenderer.from_model_dir(path), max_length=1000)
    assert dropped == 0
    with learner_on(path, Recipe.load("cpu_sft", [f"model.path={path}", "optim.min_lr=2e-3"])) as learner:
        for _ in range(steps):
            stats, _ = train(learner, samples, row_tokens=1000)
        learner.save_hf(f"{path}-taught", dtype="float32")
    assert stats.loss < 0.3
    return Path(f"{path}-taught")
