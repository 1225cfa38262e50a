from statistics import NormalDist

import numpy as np
import pytest

from aster.algo.sequential import Look, look

PLANNED, ROUND, PROBLEMS = 16, 2, 30


def decide(a_PG: np.ndarray, b_PG: np.ndarray) -> tuple[bool, int, Look]:
    """(decided, samples of each problem used, last look), looking after every ROUND samples of both runs."""
    seen = Look(0, 0, 0, 0, False)
    for n in range(ROUND, PLANNED + 1, ROUND):
        counts = np.full(len(a_PG), n)
        seen = look(a_PG[:, :n].sum(1), counts, b_PG[:, :n].sum(1), counts, planned=PLANNED)
        if seen.decided:
            return True, n, seen
    return False, PLANNED, seen


def draw(rng: np.random.Generator, p: np.ndarray) -> np.ndarray:
    return (rng.random((len(p), PLANNED)) < p[:, None]).astype(int)


def test_a_look_by_hand() -> None:
    # one problem, 2 of 4 right against 4 of 4. p(1-p) unbiased: 2·2/(4·3) = 1/3 and 0, a quarter added to each
    seen = look(np.array([2]), np.array([4]), np.array([4]), np.array([4]), planned=16)
    variance = (1 / 3 + 0.25) / 4 + 0.25 / 4
    assert seen.difference == 0.5
    assert seen.standard_error == pytest.approx(variance**0.5)
    assert seen.information == pytest.approx(4 / 16)
    assert seen.boundary == pytest.approx(NormalDist().inv_cdf(1 - 0.05 / 4) * variance**0.5 / 0.5)
    assert not seen.decided


def test_a_finished_run_keeps_its_samples_and_only_the_other_one_grows() -> None:
    finished = np.full(30, 16)
    seen = look(np.full(30, 8), finished, np.full(30, 1), np.full(30, 2), planned=16)
    # p(1-p): 8·8/(16·15) = 0.2667 and 1·1/(2·1) = 0.5, plus 1/120; the second part falls to an eighth
    a, b = 0.26667 + 0.25 / 30, 0.5 + 0.25 / 30
    assert seen.information == pytest.approx((a / 16 + b / 16) / (a / 16 + b / 2), rel=1e-4)


def test_equally_good_runs_are_told_apart_in_at_most_5_percent_of_2000_comparisons() -> None:
    """Each problem has another chance in either run, only the means over the problems are equal."""
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(2000):
        p = rng.beta(1.0, 1.0, PROBLEMS)
        wrong += decide(draw(rng, p), draw(rng, rng.permutation(p)))[0]
    assert wrong / 2000 <= 0.05
    assert wrong / 2000 >= 0.01, "a boundary that is never crossed would also pass"


def test_a_clear_difference_is_decided_early_and_with_the_right_sign() -> None:
    rng = np.random.default_rng(2)
    results = []
    for _ in range(300):
        p = rng.beta(1.0, 1.0, PROBLEMS)
        results.append(decide(draw(rng, 0.7 * p), draw(rng, 0.3 + 0.7 * p)))
    assert np.mean([decided for decided, _, _ in results]) > 0.99
    assert np.mean([n for _, n, _ in results]) < PLANNED / 2
    assert all(seen.difference > 0 for decided, _, seen in results if decided)


def test_what_cannot_be_looked_at_is_refused() -> None:
    one = np.array([1])
    with pytest.raises(ValueError, match="two samples"):
        look(one, one, one, one, planned=4)
    with pytest.raises(ValueError, match=r"alpha=1\.5"):
        look(one, np.array([2]), one, np.array([2]), planned=4, alpha=1.5)
