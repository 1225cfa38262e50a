"""What a recipe's numbers become where its parts are put together; Ray and vLLM stay out."""

from __future__ import annotations

from typing import Any

import pytest

from actors import rollout, weight_sync
from aster import launch
from aster.config import Recipe


class Built(Exception):
    pass


async def test_a_publication_has_a_time_of_its_own(monkeypatch, tmp_path):
    def publisher(engines: Any, **options: Any) -> None:
        raise Built(options["timeout_s"])

    class Maker:
        def __init__(self, *args: Any, **options: Any) -> None: ...

        def start(self) -> list[Any]:
            return []

    monkeypatch.setattr(rollout, "EngineMaker", Maker)
    monkeypatch.setattr(weight_sync, "WeightSync", publisher)
    monkeypatch.setattr(launch.ChatRenderer, "from_model_dir", lambda path: None)
    (tmp_path / "config.json").touch()
    recipe = Recipe.load("cpu_quickstart", [f"model.path={tmp_path}", "rollout.publish_timeout_s=7"])
    with pytest.raises(Built) as built:
        async with launch.rollouts(recipe, sandboxes=None):
            pass
    assert built.value.args == (7,)
