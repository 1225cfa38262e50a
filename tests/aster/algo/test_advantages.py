import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aster.algo.advantages import group_advantages, tree_advantages, tree_paths


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


def flat(samples):
    return tree_paths(np.asarray(samples), factor=2, splits=0)


@given(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=2, max_size=9), st.booleans())
def test_a_tree_that_never_splits_is_a_group(rewards, scale):
    trees = tree_advantages(np.array(rewards), flat(range(len(rewards))), scale_by_std=scale)
    np.testing.assert_allclose(trees[:, 0], group_advantages(np.array(rewards), scale_by_std=scale), atol=1e-12)


def test_a_tree_worked_out_by_hand():
    # two trees (values 3/4 and 1/4), two nodes each (1/2, 1 | 1/2, 0), two leaves each; G = 8, so 7/8 throughout
    rewards = np.array([1.0, 0, 1, 1, 1, 0, 0, 0])
    paths = tree_paths(np.arange(8), factor=2, splits=2)
    assert paths.tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [0, 1, 3], [1, 2, 4], [1, 2, 5], [1, 3, 6], [1, 3, 7]]
    advantages = tree_advantages(rewards, paths, scale_by_std=False)
    # against the one sibling: trees 3/4 - 1/4; nodes 1/2 - 1, 1 - 1/2, 1/2 - 0, 0 - 1/2; leaves 1 - 0, 0 - 1, 0, 0, ...
    np.testing.assert_allclose(advantages[:, 0] * 8 / 7, [0.5] * 4 + [-0.5] * 4)
    np.testing.assert_allclose(advantages[:, 1] * 8 / 7, [-0.5, -0.5, 0.5, 0.5, 0.5, 0.5, -0.5, -0.5])
    np.testing.assert_allclose(advantages[:, 2] * 8 / 7, [1, -1, 0, 0, 1, -1, 0, 0])
    np.testing.assert_allclose(tree_advantages(rewards, paths), advantages / (rewards.std(ddof=1) + 1e-6))


def test_a_lost_leaf_is_in_nobodys_mean():
    # leaf 1 was lost: tree 0 is worth what leaf 0 earned, and leaf 0 has no sibling left
    advantages = tree_advantages(
        np.array([1.0, 0.0, 1.0]), tree_paths(np.array([0, 2, 3]), factor=2, splits=1), scale_by_std=False
    )
    np.testing.assert_allclose(advantages * 3 / 2, [[0.5, 0.0], [-0.5, -1.0], [-0.5, 1.0]])


def test_without_variance_or_siblings_there_is_nothing_to_learn():
    assert not tree_advantages(np.full(4, 0.1), tree_paths(np.arange(4), factor=2, splits=1)).any()
    one_tree = tree_advantages(np.array([1.0, 0, 0, 0]), tree_paths(np.arange(4), factor=4, splits=1))
    assert not one_tree[:, 0].any(), "a single trunk has nothing to be compared with"
    with pytest.raises(ValueError, match=r"paths of shape \(3, 2\) do not belong to 4 rewards"):
        tree_advantages(np.zeros(4), tree_paths(np.arange(3), factor=2, splits=1))


@pytest.mark.parametrize("trees", [2, 3])
def test_the_gradient_of_trees_is_that_of_the_same_number_of_single_samples(trees):
    """Exactly, by enumeration of everything that can happen: (G - 1) / G times the gradient of the expected reward.

    Turn 0 chooses a of three; a = 2 ends there. Otherwise turn 1 chooses b of two. Softmax logits are the parameters:
    three for a, then two for b after a = 0 and two after a = 1. Each tree splits in two before turn 1.
    """
    logits = [np.array([0.3, -0.2, 0.1]), np.array([0.5, -0.4]), np.array([-0.1, 0.8])]
    rewards = {(0, 0): 1.0, (0, 1): 0.0, (1, 0): 0.2, (1, 1): 0.7, (2, None): 0.4}
    first, *second = [np.exp(x) / np.exp(x).sum() for x in logits]

    def score(node, choice):
        """Gradient of log pi(choice) with respect to all seven logits."""
        parts = [np.zeros(len(x)) for x in logits]
        parts[node] = -np.array([first, *second][node])
        parts[node][choice] += 1
        return np.concatenate(parts)

    outcomes = []  # of one tree: (probability, a, (b of leaf 0, b of leaf 1))
    for a in (0, 1):
        for b in itertools.product((0, 1), repeat=2):
            outcomes.append((first[a] * second[a][b[0]] * second[a][b[1]], a, b))
    outcomes.append((first[2], 2, (None, None)))

    G = 2 * trees
    paths = tree_paths(np.arange(G), factor=2, splits=1)
    expected = np.zeros(7)
    for happened in itertools.product(outcomes, repeat=trees):
        leaves = [(a, b) for _, a, both in happened for b in both]
        advantages = tree_advantages(np.array([rewards[leaf] for leaf in leaves]), paths, scale_by_std=False)
        gradient = np.zeros(7)
        for (a, b), (trunk, own) in zip(leaves, advantages, strict=True):
            gradient += trunk * score(0, a) + (0 if b is None else own * score(1 + a, b))
        expected += np.prod([p for p, *_ in happened]) * gradient / G

    exact = np.zeros(7)
    for (a, b), reward in rewards.items():
        p = first[a] * (1 if b is None else second[a][b])
        exact += p * reward * (score(0, a) + (0 if b is None else score(1 + a, b)))
    np.testing.assert_allclose(expected, (G - 1) / G * exact, atol=1e-12)
