"""Checkpoint directories of a run: atomic, numbered, pruned to the newest, found again on resume.

    checkpoints/global_step_10/actor/        the learner's shards (torch.distributed.checkpoint)
    checkpoints/global_step_10/huggingface/  config, tokenizer and template of the model directory
    checkpoints/global_step_10/driver.json   step, data position, config hash
    checkpoints/latest_checkpointed_iteration.txt

A directory carries its final name only when everything in it is on disk, so a run that is killed while saving, or whose
machine loses power, resumes from the checkpoint before. The learners write behind the training; a task of this class
waits for them, gives the directory its name and prunes. `finish` waits for that task, and so do the next save and a
restore.
What else belongs to the step (its metrics, its rollouts) has to be on disk before that: `after`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from aster.errors import DataError
from aster.roles import Checkpointer, LearnerGroup

log = logging.getLogger(__name__)

_NAME = re.compile(r"global_step_(\d+)$")
_WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth|gguf|h5|msgpack|onnx)$|\.index\.json$")
_LAST_NUMBER = re.compile(r"(?:step|checkpoint)[-_](\d+)$")
LATEST = "latest_checkpointed_iteration.txt"


class DirectoryCheckpointer:
    """`roles.Checkpointer` on a local or shared file system."""

    def __init__(self, directory: str | Path, *, model_path: str, config_hash: str, keep: int) -> None:
        self.directory = Path(directory)
        self.model_path = Path(model_path)
        self.config_hash = config_hash
        self.keep = keep
        self._saving: asyncio.Task[None] | None = None

    async def save(
        self,
        step: int,
        learners: LearnerGroup,
        driver_state: dict[str, object],
        *,
        after: Callable[[], Awaitable[None]] | None = None,
        then: Callable[[], None] | None = None,
    ) -> str:
        await self.finish()
        for ruin in self.directory.glob("global_step_*.tmp"):  # of a run that was killed; each is a whole model large
            shutil.rmtree(ruin, ignore_errors=True)
        partial = self.directory / f"global_step_{step}.tmp"
        partial.mkdir(parents=True)
        await learners.save(str((partial / "actor").resolve()))
        copy_model_files(self.model_path, partial / "huggingface")
        state = {"step": step, "config_hash": self.config_hash, **driver_state}
        (partial / "driver.json").write_text(json.dumps(state, indent=1), "utf-8")  # on disk by `_appear`, as all of it
        self._saving = asyncio.create_task(self._appear(step, learners, after, then))
        return str(self.directory / f"global_step_{step}")

    async def finish(self) -> None:
        """Wait for the save under way, if there is one. A caller that is cancelled meanwhile does not take it along."""
        saving = self._saving
        if saving is not None:
            try:
                await asyncio.shield(saving)
            finally:
                if saving.done() and self._saving is saving:
                    self._saving = None

    async def _appear(
        self,
        step: int,
        learners: LearnerGroup,
        after: Callable[[], Awaitable[None]] | None,
        then: Callable[[], None] | None,
    ) -> None:
        final, partial = self.directory / f"global_step_{step}", self.directory / f"global_step_{step}.tmp"
        try:
            await learners.saved()
            if after is not None:
                await after()
            await asyncio.to_thread(sync_tree, partial)
        except Exception as error:  # raised again by whoever waits, which may be many steps from now
            log.error("%s will not appear: %s", final, error)
            raise
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        sync(self.directory)
        _write_atomically(self.directory / LATEST, f"{step}\n")
        self._prune()
        if then is not None:
            then()

    def latest(self) -> str | None:
        found = newest(self.directory)
        return str(found) if found else None

    def set_aside(self) -> Path | None:
        """Give the checkpoints of an earlier run another name, so that none of them is taken for one of this run."""
        if newest(self.directory) is None:
            return None
        number = 1
        while (aside := self.directory.with_name(f"{self.directory.name}.{number}")).exists():
            number += 1
        return self.directory.rename(aside)

    async def roll_back(self, step: int) -> str | None:
        """The newest checkpoint of at most `step`; newer ones get the ending `.rolled_back`, so that no resume finds
        them. None, and nothing renamed, where there is none."""
        await self.finish()
        found = _complete(self.directory)
        healthy = [s for s in found if s <= step]
        if not healthy:
            return None
        for newer in (s for s in found if s > step):
            aside = found[newer].with_name(f"{found[newer].name}.rolled_back")
            shutil.rmtree(aside, ignore_errors=True)  # of an earlier roll-back
            found[newer].rename(aside)
        _write_atomically(self.directory / LATEST, f"{max(healthy)}\n")
        return str(found[max(healthy)])

    async def amend(self, step: int, driver_state: Mapping[str, object]) -> None:
        await self.finish()
        path = self.directory / f"global_step_{step}"
        _write_atomically(path / "driver.json", json.dumps({**read_state(path), **driver_state}, indent=1))

    async def restore(self, path: str, learners: LearnerGroup) -> dict[str, object]:
        await self.finish()
        state = read_state(path)
        if state["config_hash"] != self.config_hash:
            log.warning(
                "%s was saved under config %s, this run has %s: it goes on with the new values",
                path,
                state["config_hash"],
                self.config_hash,
            )
        await learners.load(str((Path(path) / "actor").resolve()))
        return state

    def _prune(self) -> None:
        steps = _complete(self.directory)
        for step in sorted(steps)[: -self.keep]:
            shutil.rmtree(steps[step], ignore_errors=True)


@contextlib.asynccontextmanager
async def finishing(checkpoints: Checkpointer) -> AsyncIterator[None]:
    """However the body ends, the save under way is finished; its failure never takes the place of the body's."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):  # logged by the checkpointer
            await checkpoints.finish()
        raise
    await checkpoints.finish()


def newest(directory: Path) -> Path | None:
    """The newest complete checkpoint under `directory`, or None. Names are the truth; the text file is for others."""
    steps = _complete(directory)
    return steps[max(steps)] if steps else None


def _complete(directory: Path) -> dict[int, Path]:
    if not directory.is_dir():
        return {}
    found = ((_NAME.search(p.name), p) for p in directory.iterdir())
    return {int(m.group(1)): p for m, p in found if m and _parses(p / "driver.json")}


def _parses(file: Path) -> bool:
    """An empty file, say, is what a power loss leaves on a file system that renames before it writes."""
    try:
        json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return True


def checkpoints_of(paths: Sequence[Path]) -> dict[int, Path]:
    """`{step: directory}` in order of step: model directories, global_step_N, and runs with several of these.

    The step is the number at the end of the directory's name, else its place among `paths`. Raises `DataError` for a
    path that holds no model, and where two have one step.
    """
    found: dict[int, Path] = {}
    for place, path in enumerate(paths):
        inside = _complete(path / "checkpoints") or _complete(path)
        if not inside:
            if not any((path / name).is_file() for name in ("config.json", "driver.json")):
                raise DataError(f"{path} is no model directory, no global_step_N, and no run with checkpoints")
            number = _LAST_NUMBER.search(path.name)
            inside = {int(number.group(1)) if number else place: path}
        for step, directory in inside.items():
            if step in found:
                raise DataError(f"{found[step]} and {directory} both stand for step {step}: evaluate one of them alone")
            found[step] = directory
    return dict(sorted(found.items()))


def copy_model_files(source: Path, target: Path) -> None:
    """Everything of a Hugging Face directory but the weights: config, generation config, tokenizer, chat template."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and not _WEIGHTS.search(file.name):
            shutil.copy2(file, target / file.name)


def read_state(path: str | Path) -> dict[str, object]:
    """`driver.json` of a checkpoint directory. Raises `DataError` when `path` is not a complete checkpoint."""
    file = Path(path) / "driver.json"
    if not file.is_file():
        raise DataError(f"{path} is not a checkpoint: {file} is missing (a directory global_step_N of a run is one)")
    try:
        state: dict[str, object] = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise DataError(
            f"{path} is not a complete checkpoint: {file} is no JSON ({error}): take an earlier one"
        ) from error
    return state


def sync(path: Path) -> None:
    """Return when this file, or this directory's list of names, would survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """`sync` for all that is in it, and itself last. Costs next to nothing for what is on disk already."""
    for path in directory.rglob("*"):
        sync(path)
    sync(directory)


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, "utf-8")
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)
