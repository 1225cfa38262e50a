import numpy as np
import pytest

from aster.algo.importance import k3, mismatch, tis_weights


def test_weights_are_capped_above_and_free_below():
    old, behaviour = np.log([0.5, 0.9, 0.001]), np.log([0.25, 0.1, 0.1])
    np.testing.assert_allclose(tis_weights(old, behaviour, cap=2.0), [2.0, 2.0, 0.01])
    np.testing.assert_allclose(tis_weights(old, behaviour, cap=100.0), [2.0, 9.0, 0.01])


def test_equal_streams_have_no_mismatch():
    logp = np.log([0.1, 0.5, 0.9])
    m = mismatch(logp, logp, np.ones(3, bool))
    assert (m.tokens, m.k1, m.k3, m.max_abs, m.mean_ratio) == (3, 0.0, 0.0, 0.0, 1.0)
    assert m.pearson == pytest.approx(1.0)


def test_mismatch_by_hand_and_under_the_mask():
    behaviour, old = np.array([-1.0, -2.0, 7.0]), np.array([-1.5, -1.5, -7.0])
    m = mismatch(behaviour, old, np.array([True, True, False]))
    assert m.k1 == pytest.approx(0.0)  # +0.5 and -0.5
    assert m.k3 == pytest.approx(np.cosh(0.5) - 1)  # (e^-0.5 + 0.5 + e^0.5 - 0.5) / 2 - 1
    assert (m.mean_abs, m.max_abs) == (0.5, 0.5)


def test_k3_is_never_negative_and_stays_exact_near_zero():
    gap = np.array([-1e-9, 1e-9, -3.0, 3.0])
    assert (k3(gap, np.zeros(4)) >= 0).all()


def test_an_empty_mask_says_so():
    assert mismatch(np.zeros(2), np.zeros(2), np.zeros(2, bool)).tokens == 0
