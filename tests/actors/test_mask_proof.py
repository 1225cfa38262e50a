"""Observation tokens cannot teach: through the real learner, for every objective and aggregation.

A trajectory's stream goes trajectory -> `Sample` -> packed row -> loss. What stands under mask 0 may be read by the
model, as context, but no label, log-prob or advantage of it may reach the loss, and no gradient may leave its logits.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from learners import VOCAB, gradients, learner_on, one_row, recipe, some_samples, write_model

from actors.learner import Learner
from aster.algo.packing import denominators
from aster.types import MicroBatch, Sample, StepStats

OBJECTIVES = ["ppo", "gspo", "cispo"]
AGGREGATIONS = ["token", "group", "seq-mean", "constant"]
OPTIONS = [{"kl_coef": 0.3}, {"tis_outside": "mask", "tis_cap": 1.05, "tis_floor": 0.95}, {"proximal_pass": False}]
ALGOS = [{"objective": o, "aggregation": a} for o in OBJECTIVES for a in AGGREGATIONS] + OPTIONS


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tied")


def some_trajectories() -> list[Sample]:
    return [replace(s, reference_logprobs=s.behaviour_logprobs) for s in some_samples(7)]


def other_observations(row: MicroBatch, *, seed: int = 3) -> MicroBatch:
    """The same row and the same model tokens; everything that is recorded about observations is something else."""
    rng = np.random.default_rng(seed)
    off = ~row.loss_mask

    def changed(values: np.ndarray, with_what: np.ndarray) -> np.ndarray:
        return np.where(off, with_what, values).astype(values.dtype)

    R = len(row.labels)
    return replace(
        row,
        labels=changed(row.labels, rng.integers(0, VOCAB, R)),
        advantages=changed(row.advantages, rng.normal(0, 100, R)),
        old_logprobs=changed(row.old_logprobs, np.full(R, np.nan)),
        behaviour_logprobs=changed(row.behaviour_logprobs, rng.normal(0, 100, R)),
        reference_logprobs=changed(row.reference_logprobs, np.full(R, np.nan)),
    )


def backward(
    learner: Learner, row: MicroBatch, samples: list[Sample]
) -> tuple[StepStats, dict[str, np.ndarray], torch.Tensor]:
    """Sums, gradients, and the gradient of the last hidden states [R, H]: each feeds the logits of its own position
    and nothing else, so it is zero where the gradient of the logits is."""
    seen: list[torch.Tensor] = []

    def keep(module: object, inputs: object, output: object) -> None:
        hidden = output.last_hidden_state
        hidden.retain_grad()
        seen.append(hidden)

    hook = learner.model.policy.hf.base_model.register_forward_hook(keep)
    tokens, groups = denominators(samples)
    try:
        stats = learner.forward_backward(row, num_loss_tokens=tokens, num_groups=groups)
    finally:
        hook.remove()
    found = gradients(learner)
    learner.optimizer.zero_grad(set_to_none=True)
    assert seen[0].grad is not None
    return replace(stats, seconds=0.0), found, seen[0].grad[0]


@pytest.mark.parametrize("algo", ALGOS, ids=lambda algo: "-".join(map(str, algo.values())))
def test_observations_reach_neither_the_loss_nor_a_gradient(model_dir: Path, algo: dict) -> None:
    samples = some_trajectories()
    row = one_row(samples)
    other = other_observations(row)
    assert (~row.loss_mask).sum() > 20
    assert (row.labels != other.labels).sum() > 20
    with learner_on(model_dir, recipe(algo=algo)) as learner:
        stats, grads, at_logits = backward(learner, row, samples)
        stats_again, grads_again, _ = backward(learner, other, samples)
    assert stats == stats_again, "bit for bit"
    assert grads.keys() == grads_again.keys()
    assert all((grads[name] == grads_again[name]).all() for name in grads)
    assert (at_logits[torch.from_numpy(~row.loss_mask)] == 0).all()
    assert (at_logits[torch.from_numpy(row.loss_mask)] != 0).any(), "model tokens that no clip or mask holds do learn"


def test_the_proof_would_see_a_model_token(model_dir: Path) -> None:
    """The same comparison with one label under mask 1 changed does not hold."""
    samples = some_trajectories()
    row = one_row(samples)
    at = int(np.flatnonzero(row.loss_mask)[0])
    labels = row.labels.copy()
    labels[at] = (labels[at] + 1) % VOCAB
    with learner_on(model_dir, recipe()) as learner:
        stats, grads, _ = backward(learner, row, samples)
        changed, others, _ = backward(learner, replace(row, labels=labels), samples)
    assert stats.loss != changed.loss
    assert any((grads[name] != others[name]).any() for name in grads)


def test_sft_trains_on_the_masked_turns_alone(model_dir: Path) -> None:
    samples = some_trajectories()
    row = one_row(samples)
    with learner_on(model_dir, recipe("sft")) as learner:
        stats, grads, at_logits = backward(learner, row, samples)
        again, grads_again, _ = backward(learner, other_observations(row), samples)
    assert stats == again
    assert all((grads[name] == grads_again[name]).all() for name in grads)
    assert (at_logits[torch.from_numpy(~row.loss_mask)] == 0).all()
