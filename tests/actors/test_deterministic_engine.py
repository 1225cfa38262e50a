"""A deterministic engine is another engine (one seat, whole prompts, seeded requests); hence a file of its own."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import numpy as np
import publishing
import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # read when Ray is imported

import ray

from actors.rollout import RayEngine, spawn_engines
from aster.types import Sampling

pytestmark = [pytest.mark.e2e, pytest.mark.long]


def test_a_deterministic_engine_repeats_itself_for_the_same_seed(tmp_path: Path) -> None:
    folder = publishing.save_model(tmp_path)
    recipe = publishing.recipe(folder, max_num_seqs=1)
    recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"deterministic": True})})
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=f"/tmp/rd{os.getpid()}")

    async def draw(engine: RayEngine) -> list[Any]:
        prompt = np.arange(3, 27, dtype=np.int32)
        request = {"max_tokens": 40, "sampling": Sampling(), "stop_token_ids": (), "deadline_s": 60}
        runs = [
            await engine.call("generate", prompt, seed=seed, request_id=str(i), **request)
            for i, seed in enumerate((3, 3, 4))
        ]
        await engine.close()
        return runs

    try:
        one, same, other = asyncio.run(draw(spawn_engines(recipe, model_path=str(folder), sandboxes=None)[0]))
    finally:
        ray.shutdown()
    np.testing.assert_array_equal(one.ids, same.ids)
    np.testing.assert_array_equal(one.logprobs, same.logprobs)
    assert not np.array_equal(one.ids, other.ids)
