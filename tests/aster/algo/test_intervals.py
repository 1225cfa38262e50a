from math import comb

import numpy as np
import pytest

from aster.algo.intervals import (
    all_at_k,
    bootstrap_mean,
    majority,
    majority_at_k,
    paired_bootstrap,
    pass_at_k,
)


def test_pass_at_k_is_one_minus_the_share_of_subsets_without_a_hit() -> None:
    correct, samples = np.array([0, 1, 3, 16]), np.array([16, 16, 16, 16])
    for k in (1, 2, 8, 16):
        expected = [1 - comb(16 - c, k) / comb(16, k) for c in correct.tolist()]
        assert pass_at_k(correct, samples, k=k) == pytest.approx(expected)
        assert all_at_k(correct, samples, k=k) == pytest.approx([comb(c, k) / comb(16, k) for c in correct.tolist()])


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
    paired = paired_bootstrap(list(a), list(b), seed=1)
    assert paired.mean == pytest.approx(b.mean() - a.mean())
    assert 0 < paired.low < paired.mean < paired.high
    assert paired.p_value < 0.05


def test_a_run_paired_with_itself_is_no_difference() -> None:
    scores = [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
    paired = paired_bootstrap(scores, scores, resamples=500)
    assert paired.mean == 0.0
    assert paired.p_value > 0.5
    with pytest.raises(ValueError, match="3 and 2"):
        paired_bootstrap(scores, scores[:2])


def test_empty_problems_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one problem"):
        bootstrap_mean([])
    with pytest.raises(ValueError, match="at least one problem"):
        bootstrap_mean([[1.0], []])
