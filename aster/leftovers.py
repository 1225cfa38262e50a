"""The trajectories that were half done when a run was killed: where they are looked up when their prompt comes again.

A trajectory is known by the step that asked for its prompt, which also decides its seed. So a prompt that was in flight
at the checkpoint is asked for as it was then, whatever step the resumed run is at.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Mapping

from aster.config import Recipe
from aster.data.journal import FOLDER, prune, read_journal
from aster.types import Past, PromptRow, trajectory_uid

log = logging.getLogger(__name__)


class Leftovers:
    """Of one run. `take` when a prompt is asked for, `done` when its group came home."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._folder = recipe.run.path / FOLDER
        self._asked_in: dict[str, int] = {}  # row_id of a prompt in flight -> the step that asked for it
        self._past: dict[str, Past] = {}  # by uid; each is used once

    def take(self, row: PromptRow, step: int) -> tuple[int, dict[int, Past]]:
        """(the step to ask for `row` in, what there is of its samples), when step `step` wants it."""
        asked = self._asked_in.setdefault(row.row_id, step)
        return asked, self.past_of(row, step=asked, kind="train", samples=self._recipe.rollout.group_size)

    def past_of(self, row: PromptRow, *, step: int, kind: str, samples: int) -> dict[int, Past]:
        """By sample; a past is handed out once."""
        past = {}
        for sample in range(samples if self._past else 0):
            found = self._past.pop(trajectory_uid(self._recipe.run.name, f"{kind}/{step}/{row.row_id}", sample), None)
            if found is not None:
                past[sample] = found
        return past

    def done(self, row: PromptRow) -> None:
        self._asked_in.pop(row.row_id, None)

    def state_dict(self) -> dict[str, int]:
        return dict(self._asked_in)

    async def read(self, asked_in: Mapping[str, int], *, version: int) -> None:
        """What the journal holds that can be gone on with under weights `version`; `asked_in` is of the checkpoint."""
        self._asked_in = dict(asked_in)
        self._past = await asyncio.to_thread(
            read_journal,
            self._folder,
            config_hash=self._recipe.config_hash,
            oldest=self._oldest(version),
            newest=version,
        )
        if self._past:
            turns = sum(len(past.turns) for past in self._past.values())
            log.warning("%d trajectories go on from %d turns that were finished before", len(self._past), turns)

    def forget(self, *, version: int) -> None:
        """What a run that begins with a checkpoint of `version` has no use for."""
        prune(self._folder, below=self._oldest(version))

    def clear(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def _oldest(self, version: int) -> int:
        return version - self._recipe.rollout.max_staleness
