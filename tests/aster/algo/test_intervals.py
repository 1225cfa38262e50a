from math import comb

import numpy as np
import pytest

from aster.algo.intervals import (
    all_at_k,
    bootstrap_mean,
    majority,
    majority_at_k,
    mean_interval,
    paired_test,
    pass_at_k,
    score_bounds,
)


def test_pass_at_k_is_one_minus_the_share_of_subsets_without_a_hit() -> None:
    correct, samples = np.array([0, 1, 3, 16]), np.array([16, 16, 16, 16])
    for k in (1, 2, 8, 16):
        expected = [1 - comb(16 - c, k) / comb(16, k) for c in correct.tolist()]
        assert pass_at_k(correct, samples, k=k) == pytest.approx(expected)
        assert all_at_k(correct, samples, k=k) == pytest.approx([comb(c, k) / comb(16, k) for c in correct.tolist()])


def test_every_problem_may_have_a_k_of_its_own() -> None:
    correct, samples = np.array([1.0, 2.0, 0.0]), np.array([4, 2, 1])
    drawn = np.minimum(2, samples)
    assert pass_at_k(correct, samples, k=drawn).tolist() == [0.5, 1.0, 0.0]
    assert all_at_k(correct, samples, k=drawn).tolist() == [0.0, 1.0, 0.0]
    with pytest.raises(ValueError, match="cannot be drawn"):
        pass_at_k(correct, samples, k=np.array([2, 3, 1]))


def test_pass_at_k_refuses_more_draws_than_samples_and_names_both() -> None:
    with pytest.raises(ValueError, match="k=5 samples cannot be drawn from 4"):
        pass_at_k(np.array([1]), np.array([4]), k=5)


def test_majority_counts_answers_and_lets_empty_ones_abstain() -> None:
    assert majority(["7", "7", "8"], [True, True, False]) == 1.0
    assert majority([None, "", "", "8"], [False, False, False, True]) == 1.0
    assert majority(["7", "8"], [True, False]) == 0.5
    assert majority([None, ""], [False, False]) == 0.0


def test_majority_at_k_is_exact_at_k_equal_n_and_close_to_the_subset_mean_below() -> None:
    answers, correct = ["7", "7", "8"], [True, True, False]
    assert majority_at_k(answers, correct, k=3) == 1.0
    # subsets of two: {7,7} -> 1, {7,8} twice -> 0.5 each: mean 2/3
    assert majority_at_k(answers, correct, k=2, draws=4000) == pytest.approx(2 / 3, abs=0.02)


def test_equal_scores_have_an_interval_of_width_zero() -> None:
    interval = bootstrap_mean([[1.0, 1.0], [1.0, 1.0]], resamples=200)
    assert (interval.mean, interval.low, interval.high) == (1.0, 1.0, 1.0)


def test_bootstrap_width_matches_the_normal_theory_of_each_level() -> None:
    rng = np.random.default_rng(3)
    p = rng.uniform(0.2, 0.8, size=200)
    scores = (rng.random((200, 16)) < p[:, None]).astype(float)
    means = scores.mean(axis=1)
    for over, sd in (
        ("problems", means.std() / np.sqrt(200)),
        ("samples", np.sqrt((means * (1 - means) / 16).mean() / 200)),
        ("both", np.sqrt(means.var() / 200 + (means * (1 - means) / 16).mean() / 200)),
    ):
        interval = bootstrap_mean(list(scores), resamples=2000, seed=5, over=over)  # type: ignore[arg-type]
        assert interval.mean == pytest.approx(scores.mean())
        assert (interval.high - interval.low) / (2 * 1.96 * sd) == pytest.approx(1.0, abs=0.08), over


def test_problems_with_fewer_samples_weigh_as_much_as_the_others() -> None:
    interval = bootstrap_mean([[1.0], [0.0, 0.0, 0.0]], resamples=300)
    assert interval.mean == 0.5
    assert (interval.low, interval.high) == (0.0, 1.0)


def test_the_same_seed_gives_the_same_interval_whatever_the_chunking(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]]
    whole = bootstrap_mean(scores, resamples=101, seed=9)
    monkeypatch.setattr("aster.algo.intervals._CELLS_AT_ONCE", 20)
    assert bootstrap_mean(scores, resamples=101, seed=9) == whole


def test_pairing_sees_a_difference_that_two_separate_intervals_hide() -> None:
    rng = np.random.default_rng(0)
    hard = rng.uniform(0, 1, size=60)  # problems differ far more than the runs do
    a = (rng.random((60, 64)) < hard[:, None] * 0.9).astype(float)
    b = (rng.random((60, 64)) < np.minimum(hard[:, None] * 0.9 + 0.06, 1)).astype(float)
    first, second = bootstrap_mean(list(a), seed=1), bootstrap_mean(list(b), seed=1)
    assert first.high > second.low, "the separate intervals must overlap for this test to mean anything"
    paired = paired_test(a.mean(1), b.mean(1))
    assert paired.mean == pytest.approx(b.mean() - a.mean())
    assert 0 < paired.low < paired.mean < paired.high
    assert paired.p_value < 0.05


def test_empty_problems_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one problem"):
        bootstrap_mean([])
    with pytest.raises(ValueError, match="at least one problem"):
        bootstrap_mean([[1.0], []])


N = 16
SIMULATIONS = 2000
BETAS = ((1.0, 1.0), (0.5, 0.5), (4.0, 0.6), (1.0, 4.0), (8.0, 3.0))  # even, two-sided, near ceiling, hard, narrow


def _per_problem(correct: np.ndarray) -> dict[str, np.ndarray]:
    """The numbers of a problem with so many of N right; all wrong answers alike, so maj is right above N/2."""
    counts = np.arange(N + 1)
    tables = {
        "avg": counts / N,
        "pass@4": pass_at_k(counts, np.full(N + 1, N), k=4),
        "worst@4": all_at_k(counts, np.full(N + 1, N), k=4),
        "maj": np.where(counts * 2 > N, 1.0, np.where(counts * 2 == N, 0.5, 0.0)),
    }
    return {name: table[correct] for name, table in tables.items()}


@pytest.mark.parametrize(("problems", "least", "most"), [(30, 92.0, 98.0), (200, 93.0, 97.0)])
@pytest.mark.parametrize("beta", BETAS)
def test_95_percent_intervals_cover_the_truth_in_95_of_100_simulated_benchmarks(
    problems: int, least: float, most: float, beta: tuple[float, float]
) -> None:
    rng = np.random.default_rng([problems, int(beta[0] * 10), int(beta[1] * 10)])
    truth = {k: v.mean() for k, v in _per_problem(rng.binomial(N, rng.beta(*beta, 400_000))).items()}
    values = _per_problem(rng.binomial(N, rng.beta(*beta, (SIMULATIONS, problems))))
    for name, values_SP in values.items():
        low, high = score_bounds(values_SP)
        coverage = 100 * float(((low <= truth[name]) & (truth[name] <= high)).mean())
        assert coverage >= least, (name, truth[name])
        if name == "avg" or problems * min(truth[name], 1 - truth[name]) >= 5:
            assert coverage <= most, (name, truth[name])  # with fewer on one side the few possible values decide


def test_an_interval_never_has_width_zero_nor_leaves_the_unit_interval() -> None:
    perfect = mean_interval([1.0] * 30)
    # Wilson at 30 of 30 with t(29) = 2.045: 30 / (30 + 2.045²) = 0.878
    assert (perfect.mean, round(perfect.low, 3), perfect.high) == (1.0, 0.878, 1.0)
    assert mean_interval([0.0] * 30).high == pytest.approx(1 - perfect.low)
    alone = mean_interval([1.0])
    assert (alone.low, alone.high) == (pytest.approx(1 / (1 + 1.96**2), abs=1e-3), 1.0)
    assert mean_interval([0.5] * 12).low < 0.5 < mean_interval([0.5] * 12).high


def test_scores_outside_the_unit_interval_are_refused_with_their_range() -> None:
    with pytest.raises(ValueError, match="got -1 to 1"):
        mean_interval([-1.0, 1.0])
    with pytest.raises(ValueError, match="one number per problem"):
        mean_interval([])


def test_the_sign_flip_test_by_hand() -> None:
    # differences +1 +1 +1: of 8 sign patterns two are as far from 0 as the data, p = 1/4
    result = paired_test([0.0, 0.0, 0.0], [1.0, 1.0, 1.0], flips=20_000)
    assert result.p_value == pytest.approx(0.25, abs=0.01)
    assert (result.mean, result.problems) == (1.0, 3)
    same = paired_test([0.25, 1.0], [0.25, 1.0])
    assert (same.mean, same.p_value) == (0.0, 1.0)
    with pytest.raises(ValueError, match="same problems"):
        paired_test([0.0, 1.0], [1.0])


@pytest.mark.parametrize("problems", [30, 200])
def test_paired_intervals_cover_and_the_paired_test_keeps_its_level(problems: int) -> None:
    """Run b is another policy of equal mean: on each problem better or worse by chance. 1,000 benchmarks."""
    rng = np.random.default_rng(problems)
    p_a = rng.beta(2.0, 1.0, (1000, problems))
    p_b = rng.beta(20 * p_a + 0.5, 20 * (1 - p_a) + 0.5)
    p_b += p_a.mean() - p_b.mean()
    a, b = rng.binomial(N, p_a) / N, rng.binomial(N, np.clip(p_b, 0, 1)) / N
    truth = float((np.clip(p_b, 0, 1) - p_a).mean())
    results = [paired_test(x, y, flips=500) for x, y in zip(a, b, strict=True)]
    coverage = np.mean([r.low <= truth <= r.high for r in results])
    rejected = np.mean([r.p_value < 0.05 for r in results])
    assert 0.92 <= coverage <= 0.98
    assert 0.03 <= rejected <= 0.07
