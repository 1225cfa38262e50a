"""Checkpoint directories: complete or not there, pruned, found again, and honest about a directory that is none."""

import asyncio
import json
import os
from pathlib import Path

import pytest
from waiting import until

from aster.checkpoints import LATEST, DirectoryCheckpointer, finishing, read_state
from aster.errors import DataError


class FileLearners:
    """A learner whose state is one number in a file, written when `let_go` says so."""

    dp_size = 1

    def __init__(self, value: int = 0, *, held: bool = False) -> None:
        self.value = value
        self.let_go = asyncio.Event()
        self.pending: tuple[str, int] | None = None
        if not held:
            self.let_go.set()

    async def save(self, path: str) -> None:
        assert self.pending is None, "a save began while another was under way"
        self.pending = path, self.value

    async def saved(self) -> None:
        await self.let_go.wait()
        (path, value), self.pending = self.pending, None
        Path(path).mkdir()
        if value < 0:
            raise OSError(f"checkpoint {path} was not written: disk full")
        (Path(path) / "value").write_text(str(value))

    async def load(self, path: str) -> int:
        self.value = int((Path(path) / "value").read_text())
        return self.value


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    for name in (
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "model.safetensors",
        "model.safetensors.index.json",
    ):
        (path / name).write_text(name)
    return path


def checkpointer(tmp_path, model, keep=2):
    return DirectoryCheckpointer(tmp_path / "checkpoints", model_path=str(model), config_hash="abc", keep=keep)


async def test_saves_restores_and_keeps_the_newest(tmp_path, model):
    points = checkpointer(tmp_path, model)
    for step in (1, 2, 10):
        await points.save(step, FileLearners(step * 100), {"prompts": {"position": step}})
    await points.finish()
    assert sorted(p.name for p in points.directory.iterdir()) == ["global_step_10", "global_step_2", LATEST]
    assert (points.directory / LATEST).read_text() == "10\n"
    learners = FileLearners()
    state = await points.restore(points.latest(), learners)
    assert (learners.value, state["step"], state["prompts"], state["config_hash"]) == (
        1000,
        10,
        {"position": 10},
        "abc",
    )


async def test_training_goes_on_while_the_files_are_written_and_the_name_comes_last(tmp_path, model):
    points = checkpointer(tmp_path, model)
    learners = FileLearners(1, held=True)
    path = await points.save(1, learners, {})
    learners.value = 2  # trained on
    await asyncio.sleep(0)
    assert not Path(path).exists()
    assert points.latest() is None
    learners.let_go.set()
    await points.finish()
    assert (Path(path) / "actor" / "value").read_text() == "1"
    assert points.latest() == path


async def test_the_name_appears_without_anybody_asking(tmp_path, model):
    path = await checkpointer(tmp_path, model).save(1, FileLearners(1), {})
    await until((Path(path) / "driver.json").is_file, seconds=60)  # a busy disk takes its time for every fsync


async def test_the_next_save_and_a_restore_wait_for_the_one_under_way(tmp_path, model):
    points = checkpointer(tmp_path, model, keep=9)
    first = await points.save(1, FileLearners(1), {})
    await points.finish()
    restored = FileLearners()
    for step, call in ((2, lambda: points.save(9, FileLearners(9), {})), (3, lambda: points.restore(first, restored))):
        learners = FileLearners(step, held=True)
        path = await points.save(step, learners, {})
        waiting = asyncio.create_task(call())
        await asyncio.sleep(0.05)
        assert not waiting.done()
        learners.let_go.set()
        await waiting
        assert (Path(path) / "driver.json").is_file()
        await points.finish()
    assert restored.value == 1


async def test_a_write_that_fails_is_raised_by_the_next_call_and_leaves_the_one_before(tmp_path, model, caplog):
    points = checkpointer(tmp_path, model, keep=1)
    await points.save(1, FileLearners(1), {})
    await points.save(2, FileLearners(-1), {})  # the copy was taken; only the writing fails
    with pytest.raises(OSError, match=r"global_step_2\.tmp/actor was not written: disk full"):
        await points.save(3, FileLearners(3), {})
    assert "global_step_2 will not appear" in caplog.text
    assert points.latest().endswith("global_step_1"), "keep=1 counts complete ones only"
    await points.save(3, FileLearners(3), {})
    await points.finish()
    assert [p.name for p in sorted(points.directory.iterdir())] == ["global_step_3", LATEST]


async def test_a_run_that_fails_still_completes_its_checkpoint_and_keeps_its_own_error(tmp_path, model):
    points = checkpointer(tmp_path, model)

    async def run(step: int, value: int, *, fails: bool) -> None:
        async with finishing(points):
            await points.save(step, FileLearners(value), {})
            if fails:
                raise RuntimeError("the run")

    with pytest.raises(RuntimeError, match="the run"):
        await run(1, 1, fails=True)
    assert points.latest().endswith("global_step_1")
    with pytest.raises(RuntimeError, match="the run"):
        await run(2, -1, fails=True)
    with pytest.raises(OSError, match="disk full"):
        await run(2, -1, fails=False)


async def test_who_is_cancelled_while_it_waits_does_not_take_the_checkpoint_along(tmp_path, model):
    points = checkpointer(tmp_path, model)
    learners = FileLearners(1, held=True)
    path = await points.save(1, learners, {})
    waiting = asyncio.create_task(points.finish())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    learners.let_go.set()
    await points.finish()
    assert points.latest() == path


async def test_the_model_files_travel_without_the_weights(tmp_path, model):
    points = checkpointer(tmp_path, model)
    path = await points.save(1, FileLearners(), {})
    await points.finish()
    names = {p.name for p in (Path(path) / "huggingface").iterdir()}
    assert names == {"config.json", "tokenizer.json", "chat_template.jinja"}


def test_a_directory_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(DataError, match=r"driver\.json is missing"):
        read_state(tmp_path)


def test_an_incomplete_directory_is_not_resumed_from(tmp_path, model):
    (tmp_path / "checkpoints" / "global_step_5").mkdir(parents=True)
    (tmp_path / "checkpoints" / "global_step_4.tmp").mkdir()
    (tmp_path / "checkpoints" / "global_step_4.tmp" / "driver.json").write_text(json.dumps({"step": 4}))
    assert checkpointer(tmp_path, model).latest() is None


async def test_an_empty_driver_json_is_what_a_power_loss_left_and_the_checkpoint_before_it_is_taken(tmp_path, model):
    points = checkpointer(tmp_path, model)
    for step in (1, 2):
        await points.save(step, FileLearners(step), {})
    await points.finish()
    torn = points.directory / "global_step_2" / "driver.json"
    torn.write_text("")
    assert points.latest().endswith("global_step_1")
    with pytest.raises(DataError, match=r"global_step_2 is not a complete checkpoint: .*driver\.json is no JSON"):
        read_state(torn.parent)


async def test_all_of_a_checkpoint_is_on_disk_before_it_has_its_name(tmp_path, model, monkeypatch):
    events: list[tuple[str, Path]] = []
    replace, fsync = os.replace, os.fsync

    def noting_replace(source, target):
        events.append(("replace", Path(target)))
        replace(source, target)

    def noting_fsync(descriptor):
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    monkeypatch.setattr(os, "replace", noting_replace)
    monkeypatch.setattr(os, "fsync", noting_fsync)
    points = checkpointer(tmp_path, model)
    path = Path(await points.save(1, FileLearners(1), {}))
    await points.finish()
    named = events.index(("replace", path))
    partial = path.with_name("global_step_1.tmp")
    inside = {partial / file.relative_to(path) for file in path.rglob("*")}
    assert {p for what, p in events[:named] if what == "sync"} == {partial, *inside}
    assert events[named + 1 :] == [
        ("sync", path.parent),
        ("sync", path.with_name(f"{LATEST}.tmp")),
        ("replace", path.with_name(LATEST)),
        ("sync", path.parent),
    ]


async def test_checkpoints_set_aside_are_neither_lost_nor_resumed_from(tmp_path, model):
    points = checkpointer(tmp_path, model)
    assert points.set_aside() is None
    for _ in range(2):
        await points.save(7, FileLearners(7), {})
        await points.finish()
        aside = points.set_aside()
        assert (aside / "global_step_7" / "driver.json").is_file()
        assert points.latest() is None
    assert {p.name for p in tmp_path.iterdir()} == {"model", "checkpoints.1", "checkpoints.2"}


async def test_resuming_under_another_config_says_so(tmp_path, model, caplog):
    points = checkpointer(tmp_path, model)
    await points.save(1, FileLearners(1), {})
    await points.finish()
    other = DirectoryCheckpointer(tmp_path / "checkpoints", model_path=str(model), config_hash="new", keep=2)
    await other.restore(other.latest(), FileLearners())
    assert "saved under config abc, this run has new" in caplog.text
