"""A row shared by two ranks against the same row on one: loss, gradients, log-probs, statistics, in fp32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gang import run_gang
from learners import gradients, learner_on, one_row, recipe, relative_gap, some_samples, write_model

from actors.context_parallel import slice_row
from actors.learner import Learner
from aster.algo.packing import denominators, pack, padding_row
from aster.errors import ConfigError
from aster.types import Sample

LOSS, GRADIENT, LOG_PROB = 1e-6, 1e-5, 5e-6  # relative, relative to the tensor's largest, absolute in nats

# name -> (stage, sections of the recipe, samples, tokens of a row)
CASES: dict[str, tuple[str, dict[str, Any], list[Sample], int]] = {
    "one long sample, cut in the middle": ("rl", {}, some_samples(1, seed=5), 1000),
    "an odd row whose samples straddle the cut": ("rl", {}, some_samples(9, seed=1), 1000),
    "many rows": ("rl", {}, some_samples(9, seed=2), 40),
    "recomputed layers and chunks": (
        "rl",
        {"model": {"gradient_checkpointing": True}, "learner": {"logprob_chunk_tokens": 5}},
        some_samples(6),
        1000,
    ),
    "sequence ratios": ("rl", {"algo": {"objective": "gspo", "aggregation": "seq-mean"}}, some_samples(5), 1000),
    "group means": ("rl", {"algo": {"aggregation": "group"}}, some_samples(8), 70),
    "conversations": ("sft", {}, some_samples(7), 90),
}


def _lopsided() -> list[Sample]:
    """All loss tokens in the first half: the second rank has nothing to learn but what attention asks of it."""
    [sample] = some_samples(1, seed=5, longest=60)
    mask = sample.mask.copy()
    mask[len(mask) // 2 :] = False
    return [replace(sample, mask=mask)]


CASES["no loss token on the second rank"] = ("rl", {}, _lopsided(), 1000)


def _results(learner: Learner, samples: list[Sample], row_tokens: int, *, dp_size: int = 1, dp_rank: int = 0) -> Any:
    scores = learner.log_probs(one_row(samples))
    tokens, groups = denominators(samples)
    total = None
    for ranks in pack(samples, row_tokens=row_tokens, dp_size=dp_size):
        stats = learner.forward_backward(ranks[dp_rank], num_loss_tokens=tokens, num_groups=groups)
        total = stats if total is None else total + stats
    grads = {name: g.copy() for name, g in gradients(learner).items()}  # the step scales them in place
    return scores, total, grads, learner.optim_step().grad_norm


def _gang(rank: int, world_size: int, port: int, path: str, size: int, cases: list[str]) -> dict[str, Any]:
    out = {}
    for offset, name in enumerate(cases):
        stage, sections, samples, row_tokens = CASES[name]
        gang = {"world_size": world_size, "context_parallel": size}
        sections = {**sections, "learner": {**sections.get("learner", {}), **gang}}
        learner = Learner(
            recipe(stage, **sections),
            model_path=path,
            total_steps=10,
            rank=rank,
            world_size=world_size,
            master=("127.0.0.1", port + offset),
        )
        out[name] = _results(learner, samples, row_tokens, dp_size=world_size // size, dp_rank=rank // size)
        assert not learner.log_probs(padding_row()).logprobs.any()
        stats = learner.forward_backward(padding_row(), num_loss_tokens=1, num_groups=1)
        assert (stats.tokens, stats.padded_tokens) == (0, size)
        assert not any(g.any() for g in gradients(learner).values())
        learner.close()
    return out


def _compare(path: Path, name: str, ranks: list[dict[str, Any]]) -> None:
    stage, sections, samples, row_tokens = CASES[name]
    with learner_on(path, recipe(stage, **sections), total_steps=10) as alone:
        scores, stats, grads, norm = _results(alone, samples, row_tokens)
    first = ranks[0][name]
    for rank in ranks:
        theirs, sums, gradient, their_norm = rank[name]
        assert len(theirs.logprobs) == sum(len(s) for s in samples)
        np.testing.assert_allclose(theirs.logprobs, scores.logprobs, atol=LOG_PROB)
        np.testing.assert_allclose(theirs.entropies, scores.entropies, atol=LOG_PROB)
        assert np.array_equal(theirs.logprobs, first[0].logprobs), "every rank is given the same row"
        assert replace(sums, seconds=0) == replace(first[1], seconds=0), "and the same sums"
        assert relative_gap(gradient, grads) < GRADIENT
        assert their_norm == pytest.approx(norm, rel=GRADIENT)
    assert first[1].loss == pytest.approx(stats.loss, rel=LOSS, abs=1e-7)
    for field in ("tokens", "clipped_sum", "clipped_lower_sum", "tis_capped_sum"):
        assert getattr(first[1], field) == getattr(stats, field), field
    for field in ("entropy_sum", "kl_sum", "tis_sum"):
        assert getattr(first[1], field) == pytest.approx(getattr(stats, field), rel=1e-5, abs=1e-4), field


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("context") / "model")


@pytest.fixture(scope="module")
def two(model_dir, tmp_path_factory) -> list[dict[str, Any]]:
    return run_gang(2, _gang, str(model_dir), 2, list(CASES), folder=tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_on_one_row_give_the_loss_and_gradient_of_one_rank(model_dir, two, name):
    _compare(model_dir, name, two)


def test_rows_in_parallel_and_key_heads_that_are_fewer_than_the_ranks(tmp_path):
    """Four ranks: two rows at once, each on two ranks; then one row on four, with two key heads for four ranks."""
    path = write_model(tmp_path / "model", tied=False)
    for size, name in ((2, "many rows"), (4, "an odd row whose samples straddle the cut")):
        _compare(
            path, name, _merged(run_gang(4, _gang, str(path), size, [name], folder=tmp_path / f"{size}"), name, size)
        )


def _merged(ranks: list[dict[str, Any]], name: str, size: int) -> list[dict[str, Any]]:
    """Sums of the mini-batch: of the first rank of each context group, as the gang's driver side adds them up."""
    total = ranks[0][name][1]
    for rank in ranks[size::size]:
        total = total + rank[name][1]
    return [{name: (scores, total, grads, norm)} for scores, _, grads, norm in (rank[name] for rank in ranks)]


def test_the_slices_of_a_row_by_hand():
    """Two samples of 3 and 2 tokens on 2 ranks: 6 places, the last one padding; the first label of a cut is known."""
    pair = [
        Sample(ids=np.array([5, 6, 7], np.int32), mask=np.array([0, 1, 1], bool)),
        Sample(ids=np.array([8, 9], np.int32), mask=np.array([0, 1], bool)),
    ]
    first, second = (slice_row(one_row(pair), rank=rank, size=2) for rank in (0, 1))
    assert first.input_ids.tolist() + second.input_ids.tolist() == [5, 6, 7, 8, 9, 0]
    assert first.position_ids.tolist() + second.position_ids.tolist() == [0, 1, 2, 0, 1, 0]
    assert first.labels.tolist() + second.labels.tolist() == [6, 7, 0, 9, 0, 0]
    assert first.loss_mask.tolist() + second.loss_mask.tolist() == [True, True, False, True, False, False]
    assert first.boundaries.tolist() == second.boundaries.tolist() == [0, 3, 5, 6]
    whole = slice_row(one_row(pair), rank=0, size=1)
    assert whole.boundaries.tolist() == [0, 3, 5]
    assert whole.input_ids.tolist() == [5, 6, 7, 8, 9]


def _refused(rank: int, world_size: int, port: int, path: str) -> str:
    section = {"world_size": world_size, "context_parallel": world_size}
    with pytest.raises(ConfigError) as caught:
        Learner(
            recipe(learner=section),
            model_path=path,
            total_steps=1,
            rank=rank,
            world_size=world_size,
            master=("127.0.0.1", port),
        )
    return str(caught.value)


def test_heads_that_cannot_be_divided_are_refused_with_both_numbers(tmp_path):
    path = write_model(tmp_path / "model", num_attention_heads=3, num_key_value_heads=1)
    for words in run_gang(2, _refused, str(path), folder=tmp_path / "gang"):
        assert "context_parallel=2 does not divide the model's 3 attention heads" in words


def test_a_world_that_is_no_multiple_of_the_context_group_is_refused():
    with pytest.raises(ValueError, match=r"world_size=4 is not a multiple of learner\.context_parallel=3"):
        recipe(learner={"world_size": 4, "context_parallel": 3})
