import numpy as np
import pytest

from aster.algo.advantages import group_advantages


@pytest.mark.parametrize(
    ("correct", "of_a_correct", "of_a_wrong"),
    [
        (1, 2.4749, -0.3536),
        (2, 1.6202, -0.5401),
        (3, 1.2076, -0.7246),
        (4, 0.9354, -0.9354),
        (5, 0.7246, -1.2076),
        (6, 0.5401, -1.6202),
        (7, 0.3536, -2.4749),
    ],
)
def test_golden_table_of_groups_of_eight(correct, of_a_correct, of_a_wrong):
    rewards = np.array([1.0] * correct + [0.0] * (8 - correct))
    advantages = group_advantages(rewards)
    np.testing.assert_allclose(advantages[:correct], of_a_correct, atol=5e-5)
    np.testing.assert_allclose(advantages[correct:], of_a_wrong, atol=5e-5)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1])
def test_a_group_without_variance_has_advantage_exactly_zero(reward):
    # 0.1 * 7 / 7 is not 0.1 in floating point: the mean alone would leave 1e-17 / 1e-6
    assert (group_advantages(np.full(7, reward)) == 0.0).all()


def test_a_group_of_one_has_mean_zero_and_std_one():
    assert group_advantages(np.array([1.0]))[0] == 1.0 / (1.0 + 1e-6)
    assert group_advantages(np.array([0.0]))[0] == 0.0


def test_without_scaling_only_the_mean_is_taken_off():
    np.testing.assert_array_equal(
        group_advantages(np.array([1.0, 0, 0, 1]), scale_by_std=False), [0.5, -0.5, -0.5, 0.5]
    )


def test_an_unscored_trajectory_is_refused():
    with pytest.raises(ValueError, match="leave unscored trajectories out"):
        group_advantages(np.array([1.0, np.nan]))


def test_an_empty_group_gives_nothing():
    assert group_advantages(np.array([])).shape == (0,)
