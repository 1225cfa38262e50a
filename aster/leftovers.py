"""The trajectories that were half done when a run was killed: where they are looked up when their prompt comes again.

A trajectory is known by the step that asked for its prompt, which also decides its seed. So a prompt that was in flight
at the checkpoint is asked for again under the number of the step that first asked for it, whatever step the resumed
run is at. Where two epochs meet it may be in flight twice, asked for by two steps. Asked for twice by one step, its
second trajectories have another name and are not found again.

A run resumes with the weights of a checkpoint, so only turns of its version and of the k before it are of use. Kept are
those of the newest checkpoint, of the one under way, and of the weights in use, which the next one may have.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Iterable

from aster.config import Recipe
from aster.data.journal import FOLDER, prune, read_journal
from aster.types import Past, PromptRow, trajectory_uid

log = logging.getLogger(__name__)


class Leftovers:
    """Of one run. `take` when a prompt is asked for, `done` when its group came home."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._folder = recipe.run.path / FOLDER
        self._asked_in: list[tuple[str, int]] = []  # row_id of each prompt in flight, and the step that asked for it
        self._to_ask: list[tuple[str, int]] = []  # the same of the checkpoint, until they are asked for again
        self._past: dict[str, Past] = {}  # by uid; each is used once
        self._saved: tuple[int, ...] = (0,)  # versions of the newest checkpoint, and of those under way

    def take(self, row: PromptRow, step: int) -> tuple[int, dict[int, Past]]:
        """(the step to ask for `row` in, what there is of its samples), when step `step` wants it."""
        known = next((one for one in self._to_ask if one[0] == row.row_id), None)
        if known is not None:
            self._to_ask.remove(known)
        asked = step if known is None else known[1]
        if (row.row_id, asked) not in self._asked_in:
            self._asked_in.append((row.row_id, asked))
        return asked, self.past_of(row, step=asked, kind="train", samples=self._recipe.rollout.group_size)

    def past_of(self, row: PromptRow, *, step: int, kind: str, samples: int) -> dict[int, Past]:
        """By sample; a past is handed out once."""
        past = {}
        for sample in range(samples if self._past else 0):
            found = self._past.pop(trajectory_uid(self._recipe.run.name, f"{kind}/{step}/{row.row_id}", sample), None)
            if found is not None:
                past[sample] = found
        return past

    def done(self, row: PromptRow, asked: int) -> None:
        """`asked`: the step that it was asked for in."""
        if (row.row_id, asked) in self._asked_in:
            self._asked_in.remove((row.row_id, asked))

    def state_dict(self) -> list[tuple[str, int]]:
        return [*self._asked_in, *self._to_ask]

    async def read(self, asked_in: Iterable[tuple[str, int]], *, version: int) -> None:
        """What the journal holds that can be gone on with under weights `version`; `asked_in` is of the checkpoint."""
        self._asked_in, self._saved = [], (version,)
        self._to_ask = [(row_id, step) for row_id, step in asked_in]
        self._past = await asyncio.to_thread(
            read_journal,
            self._folder,
            config_hash=self._recipe.config_hash,
            oldest=version - self._recipe.rollout.max_staleness,
            newest=version,
        )
        if self._past:
            turns = sum(len(past.turns) for past in self._past.values())
            log.warning("%d trajectories go on from %d turns that were finished before", len(self._past), turns)

    def published(self, version: int) -> None:
        """Forget what no checkpoint can need now that the engines have `version`."""
        k = self._recipe.rollout.max_staleness
        needed = {v for newest in (*self._saved, version) for v in range(newest - k, newest + 1)}
        prune(self._folder, useless=lambda v: v < version and v not in needed)

    def saving(self, version: int) -> None:
        self._saved = (*self._saved, version)

    def saved(self, version: int) -> None:
        """The checkpoint is complete: the ones before it are not resumed from."""
        self._saved = tuple(v for v in self._saved if v >= version)

    def rolled_back(self, version: int) -> None:
        """The run is at `version` again: what was sampled after it the first time is not gone on with."""
        self._asked_in, self._to_ask, self._past, self._saved = [], [], {}, (version,)
        self.clear()

    def clear(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
