"""Thought, code and the token that decides to call, worked out by hand."""

import numpy as np
import pytest

from aster.algo.regions import Markers, Sums, region_means, regions_of

CALL, END, THOUGHT, DONE, OBSERVED = 90, 91, 92, 2, 0
TAGS = Markers((CALL,), (END,), (THOUGHT,))


def regions(ids: list[int], mask: list[int], markers: Markers = TAGS) -> dict[str, list[int]]:
    found = regions_of(np.array(ids, np.int32), np.array(mask, bool), markers)
    return {name: np.flatnonzero(chosen).tolist() for name, chosen in found.items()}


def test_a_turn_with_a_call_is_thought_then_the_call_token_then_code() -> None:
    ids = [11, 12, THOUGHT, 13, CALL, 21, 22, END, DONE]
    assert regions(ids, [1] * 9) == {"think": [0, 1], "code": [5, 6], "call_start": [4]}


def test_an_observation_belongs_to_no_region_and_ends_the_turn() -> None:
    ids = [11, CALL, 21, END, DONE, OBSERVED, CALL, OBSERVED, 12, THOUGHT, 14, DONE]
    mask = [1, 1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1]
    assert regions(ids, mask) == {"think": [0, 8], "code": [2], "call_start": [1]}


def test_a_call_within_the_thought_ends_the_thought() -> None:
    assert regions([11, CALL, 21, END, THOUGHT], [1] * 5) == {"think": [0], "code": [2], "call_start": [1]}


def test_an_unclosed_call_is_code_to_the_end_and_a_turn_without_tags_is_thought() -> None:
    assert regions([CALL, 21, 22], [1] * 3)["code"] == [1, 2]
    assert regions([11, 12], [1, 1]) == {"think": [0, 1], "code": [], "call_start": []}


def test_a_tag_of_several_ids_is_found_as_a_whole() -> None:
    tags = Markers((7, 8), (8, 7), (9,))
    assert regions([7, 1, 7, 8, 5, 8, 7, 3], [1] * 8, tags) == {"think": [0, 1], "code": [4], "call_start": [2]}


def test_a_call_whose_opening_was_given_is_code_from_its_first_sampled_token() -> None:
    ids = [CALL, 30, 21, 22, END, DONE, OBSERVED, 11, DONE]
    assert regions(ids, [0, 0, 1, 1, 1, 1, 0, 1, 1]) == {"think": [7, 8], "code": [2, 3], "call_start": []}


def test_a_closed_call_in_the_prompt_opens_nothing() -> None:
    assert regions([CALL, 30, END, 11], [0, 0, 0, 1]) == {"think": [3], "code": [], "call_start": []}


@pytest.mark.parametrize("mask", [[0, 0, 0], [1, 0, 1]])
def test_only_sampled_tokens_are_in_a_region(mask: list[int]) -> None:
    found = regions_of(np.array([11, CALL, 12]), np.array(mask, bool), TAGS)
    assert not any((chosen & ~np.array(mask, bool)).any() for chosen in found.values())


def test_means_are_over_tokens_not_over_trajectories() -> None:
    one = Sums.of(np.array([1.0, 5.0]), np.array([11, CALL]), np.array([True, True]), TAGS)
    other = Sums.of(np.array([2.0, 3.0, 4.0]), np.array([11, 12, 13]), np.array([True, True, True]), TAGS)
    assert region_means([one, other]) == {"think": pytest.approx((1 + 2 + 3 + 4) / 4), "call_start": 5.0}
