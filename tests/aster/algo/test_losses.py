"""The policy loss against the public reference's numbers, and the aggregations against brute force."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from aster.algo.advantages import group_advantages
from aster.algo.losses import aggregate, kl_penalty, policy_loss, token_weights
from aster.algo.packing import denominators, pack
from aster.config import AlgoConfig
from aster.types import Sample

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "grpo.json").read_text("utf-8"))
INPUTS = {key: np.asarray(value) for key, value in GOLDEN["inputs"].items() if key != "seed"}
MASK = torch.tensor(INPUTS["mask"], dtype=torch.bool)
LOSS_CASES = [name for name in GOLDEN["cases"] if "clip_0.2_0.28_c" in name]


def _golden_loss(current, *, dual_clip, tis):
    """Losses in the shape of `current`, 0 where the mask is off; the reference's inputs are [sequence, token]."""
    losses_N, sums = policy_loss(
        current[MASK],
        old_N=torch.tensor(INPUTS["old_logp"])[MASK],
        behaviour_N=torch.tensor(INPUTS["rollout_logp"])[MASK],
        advantages_N=torch.tensor(INPUTS["advantages_used_in_loss"])[:, None].expand_as(current)[MASK],
        algo=AlgoConfig(dual_clip=dual_clip, tis_cap=tis if tis > 0 else None),
    )
    return torch.zeros_like(current).masked_scatter(MASK, losses_N), sums


@pytest.mark.parametrize("name", LOSS_CASES)
def test_loss_gradient_and_clip_fractions_equal_the_reference(name):
    expected = GOLDEN["cases"][name]
    _, clip, tis, aggregation = name.split("/")
    current = torch.tensor(INPUTS["cur_logp"], requires_grad=True)
    losses, sums = _golden_loss(current, dual_clip=float(clip.split("_c")[1]), tis=float(tis.split("=")[1]))
    if aggregation == "token-mean":
        loss = losses.sum() / MASK.sum()
        tolerance = {"rtol": 0, "atol": 1e-9}
    else:
        loss = (losses.sum(-1) / MASK.sum(-1)).mean()
        tolerance = {"rtol": 0, "atol": 1e-8}  # the reference adds 1e-8 to each length
    loss.backward()
    grad = current.grad.numpy()
    np.testing.assert_allclose(loss.item(), expected["loss"], **tolerance)
    np.testing.assert_allclose(grad.sum(), expected["grad_sum"], **tolerance)
    np.testing.assert_allclose(np.abs(grad).sum(), expected["grad_abs_sum"], **tolerance)
    np.testing.assert_allclose(grad[0], expected["grad_row0"], **tolerance)
    np.testing.assert_allclose(grad[4], expected["grad_row4"], **tolerance)
    tokens = int(MASK.sum())
    np.testing.assert_allclose(sums.clipped.item() / tokens, expected["pg_clipfrac"], atol=1e-9)
    np.testing.assert_allclose(sums.clipped_lower.item() / tokens, expected["pg_clipfrac_lower"], atol=1e-9)
    np.testing.assert_allclose(sums.kl.item() / tokens, expected["ppo_kl"], atol=1e-8)


def test_there_are_golden_loss_cases():
    assert len(LOSS_CASES) == 4


def test_micro_batches_over_two_ranks_add_up_to_the_golden_single_batch():
    case = GOLDEN["cases"]["verl_main/global_token_mean/2ranks_x_2micro"]
    losses, _ = _golden_loss(torch.tensor(INPUTS["cur_logp"]), dual_clip=10.0, tis=2.0)
    weights = torch.full_like(losses, 1.0 / int(MASK.sum()))
    parts = [aggregate(losses[i : i + 2], weights[i : i + 2]).item() for i in range(0, 8, 2)]
    np.testing.assert_allclose(sum(parts), case["mean_over_ranks_of_sum"], atol=1e-12)


@pytest.mark.parametrize("std", [True, False])
def test_golden_advantages(std):
    expected = GOLDEN["cases"][f"verl_main/adv1/std={std}"]
    rewards, groups = INPUTS["rewards_1"], INPUTS["uid_1"]
    ours = np.concatenate([group_advantages(rewards[groups == g], scale_by_std=std) for g in ("a", "b")])
    np.testing.assert_allclose(ours, expected, atol=1e-12)


@pytest.mark.parametrize(("case", "estimator"), [("kl", "k1"), ("k1", "k1"), ("low_var_kl", "k3"), ("k3", "k3")])
def test_golden_kl_estimates(case, estimator):
    expected = np.asarray(GOLDEN["cases"][f"verl_main/kl_penalty/{case}"])
    current, old = torch.tensor(INPUTS["cur_logp"][0]), torch.tensor(INPUTS["old_logp"][0])
    np.testing.assert_allclose(kl_penalty(current, old, estimator=estimator).numpy(), expected, atol=1e-12)


# by hand ------------------------------------------------------------------------------------------------------------


def _one(ratio, advantage, *, gap=0.0, cap=2.0):
    """Loss and gradient of one token whose ratio to the old policy is `ratio`, old / behaviour = exp(gap)."""
    current = torch.tensor([np.log(ratio)], dtype=torch.float64, requires_grad=True)
    losses, sums = policy_loss(
        current,
        old_N=torch.zeros(1, dtype=torch.float64),
        behaviour_N=torch.full((1,), -gap, dtype=torch.float64),
        advantages_N=torch.tensor([advantage], dtype=torch.float64),
        algo=AlgoConfig(tis_cap=cap),
    )
    losses.sum().backward()
    return losses.item(), current.grad.item(), sums


def test_inside_the_clip_the_gradient_is_the_policy_gradient():
    loss, grad, sums = _one(1.1, 2.0)
    assert (loss, grad) == pytest.approx((-2.2, -2.2))  # d(-A r)/d log p = -A r
    assert sums.clipped.item() == 0


@pytest.mark.parametrize(("ratio", "advantage", "loss"), [(1.5, 1.0, -1.28), (0.5, -1.0, 0.8)])
def test_past_the_clip_there_is_no_gradient(ratio, advantage, loss):
    got, grad, sums = _one(ratio, advantage)
    assert (got, grad) == pytest.approx((loss, 0.0))
    assert sums.clipped.item() == 1


def test_the_clip_is_asymmetric():
    assert _one(1.27, 1.0)[1] != 0.0  # 1 + 0.28 is not reached
    assert _one(0.79, -1.0)[1] == 0.0  # 1 - 0.2 is passed


def test_the_dual_clip_binds_only_below_zero():
    loss, grad, sums = _one(15.0, -1.0)
    assert (loss, grad) == pytest.approx((10.0, 0.0))
    assert sums.clipped_lower.item() == 1
    loss, grad, sums = _one(15.0, 1.0)
    assert loss == pytest.approx(-1.28)
    assert sums.clipped_lower.item() == 0


def test_the_importance_weight_multiplies_and_has_no_lower_bound():
    assert _one(1.0, 1.0, gap=np.log(1.5))[:2] == pytest.approx((-1.5, -1.5))
    assert _one(1.0, 1.0, gap=np.log(0.01))[:2] == pytest.approx((-0.01, -0.01))
    loss, grad, sums = _one(1.0, 1.0, gap=np.log(7.0))
    assert (loss, grad, sums.tis.item(), sums.tis_capped.item()) == pytest.approx((-2.0, -2.0, 2.0, 1))


def test_the_importance_weight_carries_no_gradient():
    old = torch.zeros(1, requires_grad=True)
    losses, _ = policy_loss(
        torch.zeros(1),
        old_N=old,
        behaviour_N=torch.full((1,), -0.3),
        advantages_N=torch.ones(1),
        algo=AlgoConfig(),
    )
    losses.sum().backward()
    # through the ratio r = exp(0 - old) only: -A * w * dr/dold = A * w = exp(0.3); through w it would cancel to 0
    assert old.grad.item() == pytest.approx(np.exp(0.3), rel=1e-6)


def test_a_token_that_drifted_far_stays_finite():
    loss, grad, _ = _one(np.exp(300.0), 1.0, gap=500.0)
    assert np.isfinite([loss, grad]).all()


# options ------------------------------------------------------------------------------------------------------------


def _run(log_ratios, advantages, *, segments=None, gaps=None, **algo):
    """Losses and gradients of tokens whose log ratio to the old policy is given, and the sums."""
    current = torch.tensor(log_ratios, dtype=torch.float64, requires_grad=True)
    losses, sums = policy_loss(
        current,
        old_N=torch.zeros_like(current),
        behaviour_N=-torch.tensor(gaps or [0.0] * len(log_ratios), dtype=torch.float64),
        advantages_N=torch.tensor(advantages, dtype=torch.float64),
        segments_N=None if segments is None else torch.tensor(segments),
        algo=AlgoConfig(**algo),
    )
    losses.sum().backward()
    return losses.tolist(), current.grad.tolist(), sums


def test_cispo_caps_the_weight_and_keeps_every_gradient():
    at = np.log([1.5, 9.0])
    losses, grads, sums = _run(at.tolist(), [2.0, 2.0], objective="cispo", clip_high=4.0, dual_clip=10.0)
    assert grads == pytest.approx([-1.5 * 2.0, -5.0 * 2.0])  # -min(r, 5) A, the second capped but not cut off
    assert losses == pytest.approx([-1.5 * 2 * at[0], -5 * 2 * at[1]])
    assert sums.clipped.item() == 1


def test_gspo_gives_all_tokens_of_a_sequence_one_ratio():
    # sequence 0: mean log ratio 0.1; sequence 1: mean -0.3, past the lower clip with a negative advantage
    losses, grads, sums = _run([0.0, 0.2, -0.3, -0.3], [1.0, 1.0, -1.0, -1.0], segments=[0, 0, 1, 1], objective="gspo")
    assert losses == pytest.approx([-np.exp(0.1)] * 2 + [0.8] * 2)
    # d/d log pi_t of (sum over tokens) s_i A = s_i A for each token: |o_i| times GSPO's own mean
    assert grads == pytest.approx([-np.exp(0.1)] * 2 + [0.0] * 2)
    assert sums.clipped.item() == 2
    with pytest.raises(ValueError, match="gspo needs segments_N"):
        _run([0.0], [1.0], objective="gspo")


def test_masked_importance_sampling_takes_the_token_out_and_truncation_its_bound():
    gaps = np.log([1.0, 3.0, 0.1]).tolist()
    bounds = {"tis_cap": 2.0, "tis_floor": 0.5}
    assert _run([0.0] * 3, [1.0] * 3, gaps=gaps, **bounds)[1] == pytest.approx([-1.0, -2.0, -0.5])
    _, grads, sums = _run([0.0] * 3, [1.0] * 3, gaps=gaps, tis_outside="mask", **bounds)
    assert grads == pytest.approx([-1.0, 0.0, 0.0])
    assert sums.tis_capped.item() == 2


@pytest.mark.parametrize(
    ("estimator", "value", "slope"), [("k1", 0.5, 1.0), ("k2", 0.125, 0.5), ("k3", 0.1065, 0.3935)]
)
def test_kl_estimates_by_hand(estimator, value, slope):
    """log pi - log ref = 0.5: k1 = 0.5; k2 = 0.5^2 / 2; k3 = exp(-0.5) - 1 + 0.5, its slope 1 - exp(-0.5)."""
    logprobs = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    kl = kl_penalty(logprobs, torch.tensor([-1.5], dtype=torch.float64), estimator=estimator)
    kl.backward()
    assert (kl.item(), logprobs.grad.item()) == pytest.approx((value, slope), abs=1e-4)


def test_k3_is_never_negative_and_stays_exact_near_zero():
    distance = torch.tensor([-1e-9, 1e-9, -3.0, 3.0], dtype=torch.float64)
    kl = kl_penalty(distance, torch.zeros(4, dtype=torch.float64), estimator="k3")
    assert (kl >= 0).all()
    assert kl[:2].tolist() == pytest.approx([5e-19, 5e-19], rel=1e-6, abs=0)  # d^2 / 2


# aggregation --------------------------------------------------------------------------------------------------------


def _mini_batch():
    """Seven sequences of three groups, with different lengths and masks; one sequence trains on nothing."""
    rng = np.random.default_rng(3)
    samples = []
    for index, length in enumerate([9, 4, 12, 7, 3, 15, 5]):
        mask = rng.random(length) < 0.7
        mask[0] = False
        if index == 4:
            mask[:] = False
        samples.append(
            Sample(ids=rng.integers(0, 99, length).astype(np.int32), mask=mask, group=[0, 0, 1, 1, 1, 2, 2][index])
        )
    losses = [rng.normal(size=len(s)) for s in samples]  # aligned with ids
    return samples, losses


def _brute_force(samples, losses, aggregation):
    per_sequence = [loss[s.mask] for s, loss in zip(samples, losses, strict=True)]
    sequences = [x for x in per_sequence if len(x)]
    if aggregation == "token":
        return np.concatenate(sequences).mean()
    if aggregation == "seq-mean":
        return np.mean([x.mean() for x in sequences])
    if aggregation == "constant":
        return np.mean([x.sum() / 20 for x in sequences])
    groups = sorted({s.group for s in samples})
    return np.mean(
        [np.concatenate([x for x, s in zip(per_sequence, samples, strict=True) if s.group == g]).mean() for g in groups]
    )


@pytest.mark.parametrize("aggregation", ["token", "group", "seq-mean", "constant"])
@pytest.mark.parametrize(("row_tokens", "dp_size"), [(1000, 1), (16, 1), (16, 2), (20, 3), (1, 4)])
def test_aggregation_is_the_mini_batch_mean_however_it_is_packed(aggregation, row_tokens, dp_size):
    samples, losses = _mini_batch()
    tokens, groups = denominators(samples)
    total = 0.0
    for ranks in pack(samples, row_tokens=row_tokens, dp_size=dp_size):
        for micro in ranks:
            aligned = np.concatenate([[*losses[i][1:], 0.0] for i in micro.sample_index] or [[0.0]])
            weights = token_weights(
                micro, aggregation=aggregation, num_loss_tokens=tokens, num_groups=groups, constant=20
            )
            total += aggregate(torch.tensor(aligned), torch.tensor(weights)).item()
    assert total == pytest.approx(_brute_force(samples, losses, aggregation), rel=1e-12)


def test_the_aggregations_are_four_different_numbers():
    samples, losses = _mini_batch()
    values = [_brute_force(samples, losses, a) for a in ("token", "group", "seq-mean", "constant")]
    assert len({round(v, 6) for v in values}) == 4


def test_a_row_with_loss_tokens_but_no_denominator_is_refused():
    samples, _ = _mini_batch()
    row = pack(samples, row_tokens=1000, dp_size=1)[0][0]
    with pytest.raises(ValueError, match="num_loss_tokens=0"):
        token_weights(row, aggregation="token", num_loss_tokens=0, num_groups=1)
    with pytest.raises(ValueError, match="unknown aggregation"):
        token_weights(row, aggregation="mean", num_loss_tokens=5, num_groups=1)
    with pytest.raises(ValueError, match="constant"):
        token_weights(row, aggregation="constant", num_loss_tokens=5, num_groups=1)
