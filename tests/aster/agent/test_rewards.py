from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from pathlib import Path

import math_verify.grader
import pytest
from waiting import until

from aster.agent import rewards
from aster.agent.rewards import RewardPool, _limited_to, _TooMuchWork, math_verify_verdict, strict_verdict
from aster.errors import RewardFailed

CASES = json.loads((Path(__file__).parents[2] / "golden" / "rewards.json").read_text("utf-8"))["cases"]
HANG = "\\boxed{9^{9^{9^{9}}}}"  # sympy computes it in C, where no signal handler runs


@pytest.fixture(scope="module")
def pool():
    pool = RewardPool(workers=1, timeout_s=60, reward="math_verify")
    yield pool
    pool.close()


@pytest.mark.parametrize("case", CASES, ids=[case["tag"] for case in CASES])
def test_strict_agrees_with_the_reference(case: dict) -> None:
    expected = case["strict"]
    assert strict_verdict(case["solution"], case["ground_truth"]) == (expected["acc"], expected["pred"] or "")


async def test_math_verify_agrees_with_the_reference(pool: RewardPool) -> None:
    for case in CASES:
        reward, verdicts = await pool.score(case["solution"], case["ground_truth"])
        assert reward == case["math_verify"], case
        assert verdicts.math_verify == bool(case["math_verify"])
        assert verdicts.strict == case["strict"]["acc"]


@pytest.mark.parametrize(
    ("text", "right", "pred"),
    [
        ("\\boxed{34}", True, "34"),
        ("\\boxed{34}" + "x" * 90, True, "34"),
        ("\\boxed{34}" + "x" * 91, False, ""),  # the box begins before the last 100 characters
        ("\\boxed{{34}}", False, "{34}"),
        ("\\boxed{34}}", True, "34"),
        ("\\boxed{}", False, ""),
        ("", False, ""),
    ],
)
def test_strict_reads_the_last_box_of_the_last_hundred_characters(text: str, right: bool, pred: str) -> None:
    assert strict_verdict(text, "34") == (right, pred)


def test_an_empty_ground_truth_is_not_earned_by_no_answer() -> None:
    assert strict_verdict("no box", "") == (False, "")


def test_math_verify_looks_at_the_last_500_characters() -> None:
    assert math_verify_verdict("\\boxed{34}" + "x " * 240, "34")
    assert not math_verify_verdict("\\boxed{34}" + "x " * 260, "34")


async def test_the_deciding_verifier_is_configured(pool: RewardPool) -> None:
    assert (await pool.score("\\boxed{\\dfrac{4}{9}}", "\\frac{4}{9}"))[0] == 1.0
    strict = RewardPool(reward="strict", math_verify=False)
    reward, verdicts = await strict.score("\\boxed{\\dfrac{4}{9}}", "\\frac{4}{9}")
    assert (reward, verdicts.strict, verdicts.math_verify) == (0.0, False, None)
    strict.close()


async def test_an_unreadable_ground_truth_is_our_failure_and_costs_no_worker(pool: RewardPool, monkeypatch) -> None:
    before = pool._workers[0]._process.pid
    with pytest.raises(RewardFailed, match="cannot read the ground truth"):
        await pool.score("\\boxed{1}", "")
    assert pool._workers[0]._process.pid == before


async def test_a_crashed_worker_is_replaced_and_the_next_answer_is_scored(pool: RewardPool) -> None:
    await pool.score("\\boxed{1}", "1")
    os.kill(pool._workers[0]._process.pid, signal.SIGKILL)
    with pytest.raises(RewardFailed, match="the verifier died"):
        await pool.score("\\boxed{1}", "1")
    assert (await pool.score("\\boxed{1}", "1"))[0] == 1.0


async def test_a_worker_never_imports_torch(pool: RewardPool) -> None:
    import torch  # noqa: F401 - the parent has it; the worker must not inherit it

    await pool.score("\\boxed{1}", "1")
    maps = Path(f"/proc/{pool._workers[0]._process.pid}/maps").read_text()
    assert "libtorch" not in maps
    assert "python" in maps


async def test_a_hung_worker_is_killed_at_the_deadline_and_replaced(monkeypatch) -> None:
    pool = RewardPool(workers=1, timeout_s=60, reward="math_verify")
    try:
        assert (await pool.score("\\boxed{1}", "1"))[0] == 1.0
        pool._timeout_s = 1.0  # for the one that hangs: an honest answer may take longer on a busy machine
        worker = pool._workers[0]
        os.kill(worker._process.pid, signal.SIGSTOP)  # silent, whatever the arithmetic
        hung, began = worker._process, time.monotonic()
        with pytest.raises(RewardFailed, match="silent for 1 s, comparing with '2'"):
            await pool.score("\\boxed{2}", "2")
        assert time.monotonic() - began < 30
        assert hung.poll() is not None
        pool._timeout_s = 60
        assert (await pool.score("\\boxed{3}", "3"))[0] == 1.0
        assert pool.failures == 1
    finally:
        pool.close()


async def test_an_answer_that_hangs_holds_up_nobody_but_itself() -> None:
    pool = RewardPool(workers=2, timeout_s=600, reward="math_verify")
    right: list[int] = []
    try:
        await asyncio.gather(*(pool.score("\\boxed{1}", "1") for _ in range(8)))  # both are warm
        hung = pool._workers[0]._process.pid
        os.kill(hung, signal.SIGSTOP)

        async def score(number: int) -> None:
            reward, _ = await pool.score(f"\\boxed{{{number}}}", str(number))
            assert reward == 1.0
            right.append(number)

        scoring = [asyncio.create_task(score(number)) for number in range(60)]
        await until(lambda: len(right) == 59, seconds=120)  # the last one hangs as before: they did not wait for it
        os.kill(hung, signal.SIGKILL)
        (failed,) = [e for e in await asyncio.gather(*scoring, return_exceptions=True) if e is not None]
        assert isinstance(failed, RewardFailed)
        assert (len(right), pool.failures) == (59, 1)
    finally:
        pool.close()


async def test_where_strict_decides_a_failed_second_opinion_costs_nothing(monkeypatch) -> None:
    def broken(self: object, *args: object, **kw: object) -> bool:
        raise RewardFailed("hung")

    monkeypatch.setattr(rewards._Worker, "ask", broken)
    monkeypatch.setattr(rewards._Worker, "_start", lambda self: None)
    monkeypatch.setattr(rewards._Worker, "_kill", lambda self: None)
    pool = RewardPool(reward="strict")
    reward, verdicts = await pool.score("\\boxed{34}", "34")
    assert (reward, verdicts.strict, verdicts.math_verify) == (1.0, True, None)
    pool.close()


async def test_closing_ends_the_workers_and_the_answers_in_the_making() -> None:
    pool = RewardPool(workers=1, timeout_s=600, reward="math_verify")
    await pool.score("\\boxed{1}", "1")
    os.kill(pool._workers[0]._process.pid, signal.SIGSTOP)
    scoring = asyncio.create_task(pool.score("\\boxed{1}", "1"))
    await asyncio.sleep(0.1)
    await asyncio.to_thread(pool.close)
    with pytest.raises(RewardFailed):
        await asyncio.wait_for(scoring, 60)
    assert pool._workers[0]._process.poll() is not None
    with pytest.raises(RewardFailed, match="closed"):
        await pool.score("\\boxed{1}", "1")
    pool.close()


async def test_arithmetic_that_explodes_ends_within_the_limits() -> None:
    pool = RewardPool(workers=1, timeout_s=8.0, reward="math_verify")
    try:
        await pool.score("\\boxed{1}", "1")
        began = time.monotonic()
        try:
            reward, _ = await pool.score(HANG, "34")
            assert reward == 0.0
        except RewardFailed:
            pass
        assert time.monotonic() - began < 60
        assert (await pool.score("\\boxed{3}", "3"))[0] == 1.0
    finally:
        pool.close()


def test_a_verifier_that_was_paused_still_finds_a_right_answer_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock on the wall runs on while a machine is busy with something else."""
    honest = math_verify.grader.sympy_expr_eq

    def paused(*args, **more):
        time.sleep(5.5)  # math-verify's own limit is 5 s of the wall
        return honest(*args, **more)

    monkeypatch.setattr(math_verify.grader, "sympy_expr_eq", paused)
    assert math_verify_verdict("\\boxed{68/2}", "34")


def test_an_answer_that_burns_cpu_is_wrong_and_the_signal_is_given_back() -> None:
    before = signal.getsignal(signal.SIGPROF)
    began = time.process_time()

    def burn() -> None:
        with _limited_to(0.2):
            while True:
                pass

    with pytest.raises(_TooMuchWork):
        burn()
    assert 0.1 < time.process_time() - began < 2
    assert signal.getsignal(signal.SIGPROF) == before
