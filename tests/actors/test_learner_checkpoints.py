"""Checkpoints of one learner rank: bits come back, also after SIGKILL, and a failed save says so."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from learners import (
    accumulate,
    learner_on,
    one_row,
    recipe,
    some_samples,
    train,
    weights,
    write_model,
)

from actors import persist, saver
from actors.learner import Learner
from aster.errors import AsterError, DataError


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tied")


def test_a_resumed_run_is_bit_equal(model_dir, tmp_path):
    batches = [some_samples(seed=i) for i in range(5)]
    schedule = {"lr": 1e-2, "schedule": "cosine_with_min_lr", "warmup_steps": 2}
    with learner_on(model_dir, recipe(optim=schedule), total_steps=5) as learner:
        for batch in batches[:3]:
            train(learner, batch)
        learner.save(str(tmp_path / "ck"))
        tail = [train(learner, batch) for batch in batches[3:]]
        straight = weights(learner)
    with learner_on(model_dir, recipe(optim=schedule), total_steps=5) as learner:
        train(learner, batches[4])  # whatever it was before must not matter
        assert learner.load(str(tmp_path / "ck")) == 3
        again = [train(learner, batch) for batch in batches[3:]]
        for name, tensor in weights(learner).items():
            assert torch.equal(tensor, straight[name]), name
    for (stats, optim), (stats_again, optim_again) in zip(tail, again, strict=True):
        assert (stats.loss, stats.entropy_sum) == (stats_again.loss, stats_again.entropy_sum)
        assert (optim.grad_norm, optim.lr) == (optim_again.grad_norm, optim_again.lr)


def test_saving_does_not_disturb_the_run(model_dir, tmp_path):
    results = []
    for save in (True, False):
        with learner_on(model_dir, recipe()) as learner:
            if save:
                learner.save(str(tmp_path / "fresh"))  # before any step: Adam's state must not count this as one
            train(learner, some_samples())
            results.append(weights(learner))
    assert all(torch.equal(a, b) for a, b in zip(results[0].values(), results[1].values(), strict=True))


def test_log_probs_see_loaded_weights_at_once(model_dir, tmp_path):
    row = one_row(some_samples())
    with learner_on(model_dir, recipe()) as learner:
        before = learner.log_probs(row).logprobs
        learner.save(str(tmp_path / "ck"))
        train(learner, some_samples())
        after = learner.log_probs(row).logprobs
        assert not np.array_equal(before, after)
        learner.load(str(tmp_path / "ck"))
        np.testing.assert_array_equal(learner.log_probs(row).logprobs, before)


def test_loading_after_a_forward_that_failed_reaches_the_next_one(model_dir, tmp_path):
    samples = some_samples()
    with learner_on(model_dir, recipe()) as learner:
        learner.save(str(tmp_path / "ck"))
        before = learner.log_probs(one_row(samples)).logprobs
        train(learner, samples)
        with pytest.raises(ValueError, match="no old_logprobs"):  # the full weights stay in memory without a backward
            accumulate(learner, [replace(s, old_logprobs=None) for s in samples])
        learner.load(str(tmp_path / "ck"))
        np.testing.assert_array_equal(learner.log_probs(one_row(samples)).logprobs, before)


def test_random_state_comes_back(model_dir, tmp_path):
    with learner_on(model_dir, recipe()) as learner:
        torch.rand(3)
        learner.save(str(tmp_path / "ck"))
        expected = torch.rand(4)
        learner.load(str(tmp_path / "ck"))
        assert torch.equal(torch.rand(4), expected)


def test_a_save_that_fails_leaves_the_checkpoint_before_it_and_says_so_at_the_next_call(
    model_dir, tmp_path, monkeypatch
):
    path = str(tmp_path / "ck")

    def disk_full(*_):
        raise OSError("no space left")

    with learner_on(model_dir, recipe()) as learner:
        learner.save(path)
        learner.saved()
        train(learner, some_samples())
        for call in (
            learner.saved,
            lambda: learner.load(path),
            lambda: learner.save(path),
            lambda: learner.save_hf(str(tmp_path / "hf")),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(persist, "replace_directory", disk_full)
                learner.save(path)
                for asked in (call, learner.saved, learner.saved):  # whoever asks first does not answer for the others
                    with pytest.raises(AsterError, match=rf"checkpoint {path} was not written: .*no space left"):
                        asked()
            assert learner.load(path) == 0
        assert not (tmp_path / "hf").exists()
        learner.save(path)  # over the ruins of the last attempt and the old checkpoint
        learner.saved()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["ck"]
    learner = Learner(recipe(), model_path=str(model_dir), total_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(persist, "replace_directory", disk_full)
        learner.save(str(tmp_path / "late"))
        with pytest.raises(AsterError, match="no space left"):  # closing is a call too, and closes
            learner.close()
    assert not torch.distributed.is_initialized()


def test_a_save_holds_what_was_when_it_was_asked_for_while_training_goes_on(model_dir, tmp_path, monkeypatch):
    path, go = tmp_path / "ck", threading.Event()
    write = saver.dcp.save

    def slow(*args, **kwargs):
        assert go.wait(30)
        write(*args, **kwargs)

    monkeypatch.setattr(saver.dcp, "save", slow)
    with learner_on(model_dir, recipe()) as learner:
        train(learner, some_samples())
        before = weights(learner)
        learner.save(str(path))
        train(learner, some_samples(seed=1))  # while the files are not even begun
        torch.rand(3)
        learner.rest()
        learner.rise()
        assert not path.exists()
        assert not learner.saved(wait=False)
        go.set()
        assert learner.saved()
        assert not all(torch.equal(a, b) for a, b in zip(before.values(), weights(learner).values(), strict=True))
        assert learner.load(str(path)) == 1
        assert all(torch.equal(a, b) for a, b in zip(before.values(), weights(learner).values(), strict=True))


def test_counters_and_random_states_are_on_disk_before_a_checkpoint_has_its_name(model_dir, tmp_path, monkeypatch):
    synced, at_rename = [], []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda *names: at_rename.append(set(synced)) or replace(*names))
    with learner_on(model_dir, recipe()) as learner:
        learner.save(str(tmp_path / "ck"))
        learner.saved()
    partial = tmp_path / "ck.tmp"
    assert {str(partial / name) for name in ("", "learner.json", "rng", "rng/0.pt", ".metadata")} <= at_rename[-1]
    assert synced[-1] == str(tmp_path)


def _save_twice_and_hang(_rank: int, _world_size: int, model: str, root: str) -> None:
    """Complete one checkpoint, then stop for ever in the middle of the next one's files."""
    with learner_on(Path(model), recipe()) as learner:
        train(learner, some_samples())
        learner.save(f"{root}/first")
        learner.saved()
        write = saver.dcp.save

        def half(*args, **kwargs):
            write(*args, **kwargs)
            Path(root, "now").touch()
            time.sleep(600)

        saver.dcp.save = half
        train(learner, some_samples(seed=1))
        learner.save(f"{root}/second")
        time.sleep(600)


def test_sigkill_in_the_middle_of_a_write_leaves_the_checkpoint_before_it(model_dir, tmp_path):
    process = multiprocessing.get_context("spawn").Process(
        target=_save_twice_and_hang, args=(0, 1, str(model_dir), str(tmp_path)), daemon=True
    )
    process.start()
    deadline = time.monotonic() + 240
    while not (tmp_path / "now").exists():
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()
    process.join(10)
    assert {p.name for p in tmp_path.iterdir()} == {"first", "second.tmp", "now"}
    with learner_on(model_dir, recipe()) as learner:
        train(learner, some_samples())
        straight = weights(learner)
        assert learner.load(str(tmp_path / "first")) == 1
        assert all(torch.equal(a, b) for a, b in zip(straight.values(), weights(learner).values(), strict=True))
        learner.save(str(tmp_path / "second"))  # over the ruin
        learner.saved()
    assert {p.name for p in tmp_path.iterdir()} == {"first", "second", "now"}


def test_what_is_no_checkpoint_or_another_models_is_named(model_dir, tmp_path):
    other = write_model(tmp_path / "other", num_hidden_layers=3)
    with learner_on(model_dir, recipe()) as learner:
        with pytest.raises(DataError, match=r"not a learner checkpoint.*learner\.json"):
            learner.load(str(tmp_path / "nothing"))
        learner.save(str(tmp_path / "ck"))
    with learner_on(other, recipe()) as learner:
        with pytest.raises(DataError, match=r"lacks \d+ tensors.*layers\.2"):
            learner.load(str(tmp_path / "ck"))
        learner.save(str(tmp_path / "deeper"))
    with (
        learner_on(model_dir, recipe()) as learner,
        pytest.raises(DataError, match=r"has 11 tensors that this .*layers\.2"),
    ):
        learner.load(str(tmp_path / "deeper"))
