"""Checkpoint directories: complete or not there, pruned, found again, and honest about a directory that is none."""

import json
from pathlib import Path

import pytest

from aster.checkpoints import LATEST, DirectoryCheckpointer, read_state
from aster.errors import DataError


class FileLearners:
    """A learner whose state is one number in a file."""

    dp_size = 1

    def __init__(self, value: int = 0) -> None:
        self.value = value

    async def save(self, path: str) -> None:
        if self.value < 0:
            Path(path).mkdir()
            raise OSError("disk full")
        Path(path).mkdir()
        (Path(path) / "value").write_text(str(self.value))

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


async def test_a_save_that_fails_leaves_the_one_before(tmp_path, model):
    points = checkpointer(tmp_path, model)
    await points.save(1, FileLearners(1), {})
    with pytest.raises(OSError, match="disk full"):
        await points.save(2, FileLearners(-1), {})
    assert points.latest().endswith("global_step_1")
    await points.save(2, FileLearners(2), {})
    assert points.latest().endswith("global_step_2")


async def test_the_model_files_travel_without_the_weights(tmp_path, model):
    points = checkpointer(tmp_path, model)
    path = await points.save(1, FileLearners(), {})
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


async def test_checkpoints_set_aside_are_neither_lost_nor_resumed_from(tmp_path, model):
    points = checkpointer(tmp_path, model)
    assert points.set_aside() is None
    for _ in range(2):
        await points.save(7, FileLearners(7), {})
        aside = points.set_aside()
        assert (aside / "global_step_7" / "driver.json").is_file()
        assert points.latest() is None
    assert {p.name for p in tmp_path.iterdir()} == {"model", "checkpoints.1", "checkpoints.2"}


async def test_resuming_under_another_config_says_so(tmp_path, model, caplog):
    await checkpointer(tmp_path, model).save(1, FileLearners(1), {})
    other = DirectoryCheckpointer(tmp_path / "checkpoints", model_path=str(model), config_hash="new", keep=2)
    await other.restore(other.latest(), FileLearners())
    assert "saved under config abc, this run has new" in caplog.text
