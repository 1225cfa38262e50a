"""The task family: right answers, plans that print them when really executed, and a split that no argument can mix."""

import contextlib
import io
import itertools
import random

import pytest

from aster.data.prompts import user_message
from aster.data.tasks import FAMILIES, draw_problems, is_heldout, to_row
from aster.errors import DataError


def run_plan(problem):
    """Every cell in one namespace; what the last one printed."""
    namespace: dict[str, object] = {}
    printed = io.StringIO()
    for _, code in problem.plan:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
    return printed.getvalue().strip()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_of_every_family_prints_its_answer(family):
    for seed in range(60):
        problem = FAMILIES[family](random.Random(seed))
        assert run_plan(problem) == problem.answer, problem


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_has_three_to_six_cells_and_its_last_one_needs_the_others(family):
    for seed in range(60):
        problem = FAMILIES[family](random.Random(seed))
        assert 3 <= len(problem.plan) <= 6
        with pytest.raises(NameError), contextlib.redirect_stdout(io.StringIO()):
            exec(problem.plan[-1][1], {})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_equation_of_the_head_work_holds(family):
    """`7*16+3=115%19=1` says 7*16+3 == 115 and 115%19 == 1."""
    for seed in range(60):
        for line in FAMILIES[family](random.Random(seed)).head_work.splitlines():
            terms = line.split("=")
            for left, right in itertools.pairwise(terms):
                assert eval(left) == int(right.partition("%")[0]), line


@pytest.mark.parametrize(
    ("family", "seed", "text", "answer"),
    [  # worked out by hand
        ("affine", 2, "Start at x=28 and repeat 2 times x=(3*x+6)%14. Find x.", "10"),  # 90%14=6, 24%14=10
        ("pair", 2, "Start at a=13;b=28 and repeat 2 times a,b=b,(3*a+b)%14. Find b.", "11"),  # 67%14=11, 95%14=11
        ("digits", 2, "Find the digit sum of 19*23*22.", "20"),  # 9614
        ("count", 2, "Count the x in range(10) with (7*x+3)%16<3.", "2"),  # 1 (x=2), 2 (x=9)
        ("divisors", 2, "Let g=gcd(15*17,17*35) and l=lcm(17,21). Find g+l.", "442"),  # 85+357
        ("primes", 2, "Count the primes n in range(14,36) with n%7<4.", "4"),  # 17 23 29 31, not 19
        ("residue", 2, "Find 988%7%3.", "1"),  # 988 = 141*7 + 1
        ("power", 0, "Let a=8**11%13 and b=(a+2)**5%43. Find a*b.", "185"),  # 8 12 5 1 8 ...: 5; 7 6 42 36 37
    ],
)
def test_answers_that_were_worked_out_by_hand(family, seed, text, answer):
    problem = FAMILIES[family](random.Random(seed))
    assert (problem.text, problem.answer) == (text, answer)


def test_the_two_sides_of_the_split_never_meet_whatever_the_seed():
    train = {p.text for seed in range(3) for p in draw_problems(300, seed=seed, heldout=False)}
    heldout = {p.text for seed in range(3) for p in draw_problems(300, seed=seed, heldout=True)}
    assert not train & heldout
    assert not any(map(is_heldout, train))
    assert all(map(is_heldout, heldout))


def test_the_space_is_much_larger_than_what_is_drawn():
    drawn = draw_problems(6000, seed=0, heldout=False)
    assert len({p.text for p in drawn}) == len({p.row_id for p in drawn}) == 6000


def test_the_same_seed_draws_the_same_problems_and_another_seed_others():
    first, again, other = (draw_problems(40, seed=s, heldout=True) for s in (5, 5, 6))
    assert first == again
    assert not {p.text for p in first} & {p.text for p in other}


def test_excluded_problems_are_not_drawn_again():
    first = draw_problems(50, seed=1, heldout=False)
    second = draw_problems(50, seed=1, heldout=False, exclude=frozenset(p.text for p in first))
    assert not {p.text for p in first} & {p.text for p in second}


def test_families_take_turns():
    drawn = draw_problems(3 * len(FAMILIES), seed=0, heldout=False)
    assert [p.family for p in drawn] == list(FAMILIES) * 3


def test_an_unknown_family_is_named_with_the_known_ones():
    with pytest.raises(DataError, match=r"'sudoku'.*affine, pair"):
        draw_problems(1, seed=0, heldout=False, families=["sudoku"])


def test_a_row_has_the_paper_s_prompt_and_keeps_the_answer_out_of_the_messages():
    problem = FAMILIES["power"](random.Random(0))
    row = to_row(problem)
    assert row.messages == ({"role": "user", "content": user_message(problem.text)},)
    assert row.messages[0]["content"].startswith("\nLet a=8**11%13")
    assert row.messages[0]["content"].endswith(
        "\nPlease reason step by step, and put your final answer within \\boxed{}.\n"
    )
    assert row.ground_truth == "185"
    assert "185" not in row.messages[0]["content"]
