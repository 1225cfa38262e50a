from __future__ import annotations

import itertools
import pickle
from dataclasses import replace

import numpy as np
import pytest

from aster.agent.ledger import Decision, Ledger, lost_trajectory
from aster.config import RolloutConfig
from aster.errors import CircuitOpen
from aster.types import Budget, Cause, Sampling, Task, Trajectory

TASK = Task("u", "r", 0, (), "code_agent", Budget(1, 1, 1), Sampling(), 0)


_uids = map("another {}".format, itertools.count())


def ended(cause: Cause, engine: str = "e0", error: str = "x", uid: str = "") -> Trajectory:
    task = replace(TASK, uid=uid or next(_uids))
    return replace(lost_trajectory(task, Cause.CANCELLED, error, engine=engine), cause=cause)


def judge(ledger: Ledger, cause: Cause, *, attempt: int = 0, step: int = 0, kind: str = "train", **more) -> Decision:
    return ledger.judge(ended(cause, **more), kind=kind, step=step, attempt=attempt)


@pytest.mark.parametrize("cause", list(Cause))
def test_only_what_is_ours_runs_again_and_is_masked_after_that(cause: Cause) -> None:
    ledger = Ledger(max_retries=2, max_infra_failed_rate=1.0)
    ledger.opened("train", 0, 8)
    decisions = [judge(ledger, cause, attempt=attempt) for attempt in range(3)]
    expected = [Decision.RETRY, Decision.RETRY, Decision.MASK] if cause.is_ours else [Decision.KEEP] * 3
    assert decisions == expected
    assert ledger.totals == {cause: 3}


def test_the_circuit_opens_above_the_rate_and_not_at_it() -> None:
    ledger = Ledger(max_retries=0, max_infra_failed_rate=0.5)
    ledger.opened("train", 0, 4)
    assert judge(ledger, Cause.SANDBOX_LOST) is Decision.MASK
    assert judge(ledger, Cause.SANDBOX_LOST) is Decision.MASK  # 2 of 4
    with pytest.raises(CircuitOpen, match="3 of 4 trajectories"):
        judge(ledger, Cause.SANDBOX_LOST)


def test_the_message_blames_the_worst_component_first_and_names_the_engines() -> None:
    ledger = Ledger(max_retries=0, max_infra_failed_rate=0.5)
    ledger.opened("val", 7, 5)
    judge(ledger, Cause.REWARD_FAILED, step=7, kind="val", error="silent for 10 s")
    judge(ledger, Cause.ENGINE_LOST, step=7, kind="val", engine="e1", error="died")
    with pytest.raises(CircuitOpen) as caught:
        judge(ledger, Cause.ENGINE_LOST, step=7, kind="val", engine="e2", error="OOM")
    assert str(caught.value) == (
        "val step 7: 3 of 5 trajectories were lost by our own failures, retries included, more than "
        "rollout.max_infra_failed_rate=0.5 allows. Broken: the rollout engines (engine_lost 2: e1 1, e2 1; last: OOM); "
        "the verifier (reward_failed 1: e0 1; last: silent for 10 s)"
    )
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("max_retries", [1, 3])
def test_a_whole_step_may_be_lost_once_and_run_again(max_retries: int) -> None:
    """As after the death of the only engine, or a canary that the engines rejected."""
    ledger = Ledger(max_retries=max_retries, max_infra_failed_rate=0.5)
    ledger.opened("train", 0, 8)
    for i in range(8):
        assert judge(ledger, Cause.ENGINE_LOST, uid=str(i)) is Decision.RETRY
    again = Decision.RETRY if max_retries > 1 else Decision.MASK
    assert judge(ledger, Cause.SANDBOX_LOST, uid="0", attempt=1) is again
    for i in range(1, 8):
        assert judge(ledger, Cause.ANSWERED, uid=str(i), attempt=1) is Decision.KEEP


@pytest.mark.parametrize("max_retries", [1, 3])
def test_a_step_that_is_lost_again_and_again_opens_the_circuit_at_its_second_loss(max_retries: int) -> None:
    ledger = Ledger(max_retries=max_retries, max_infra_failed_rate=0.5)
    ledger.opened("train", 0, 8)
    for i in range(8):
        judge(ledger, Cause.ENGINE_LOST, uid=str(i), engine="e0")
    for i in range(4):
        judge(ledger, Cause.ENGINE_LOST, uid=str(i), engine="e0.1", attempt=1)
    with pytest.raises(CircuitOpen, match=r"5 of 8 trajectories .*engine_lost 13: e0 8, e0.1 5"):
        judge(ledger, Cause.ENGINE_LOST, uid="4", engine="e0.1", attempt=1)


def test_what_came_back_in_the_end_is_not_lost() -> None:
    ledger = Ledger(max_retries=2, max_infra_failed_rate=0.5)
    ledger.opened("train", 0, 2)
    for uid in "ab":
        for attempt in range(2):
            judge(ledger, Cause.SANDBOX_LOST, uid=uid, attempt=attempt)
        judge(ledger, Cause.ANSWERED, uid=uid, attempt=2)


def test_steps_and_kinds_are_judged_apart_and_old_ones_forgotten() -> None:
    ledger = Ledger(max_retries=0, max_infra_failed_rate=0.5)
    for step in range(200):
        for kind in ("train", "val"):
            ledger.opened(kind, step, 2)
            assert judge(ledger, Cause.SANDBOX_LOST, step=step, kind=kind) is Decision.MASK
    assert len(ledger._windows) == 128


def test_a_step_is_remembered_as_long_as_a_group_of_it_may_live() -> None:
    """Asked for at the end of a queue of k + 1 steps, it begins k steps later and is given up after k + 1 more."""
    staleness = max(m.le for m in RolloutConfig.model_fields["max_staleness"].metadata if hasattr(m, "le"))
    ledger = Ledger(max_retries=0, max_infra_failed_rate=0.5)
    for step in range(2 * staleness + 2):
        for kind in ("train", "val"):
            ledger.opened(kind, step, 4)
    assert judge(ledger, Cause.SANDBOX_LOST, step=0) is Decision.MASK  # 1 of 4


def test_a_step_to_which_the_run_was_rolled_back_is_the_newest_again() -> None:
    ledger = Ledger(max_retries=0, max_infra_failed_rate=0.5)
    for step in [*range(100, 300), 50]:
        ledger.opened("train", step, 4)
    assert judge(ledger, Cause.SANDBOX_LOST, step=50) is Decision.MASK


def test_a_lost_trajectory_is_empty_but_well_formed() -> None:
    lost = lost_trajectory(TASK, Cause.ENGINE_LOST, "died", engine="e0")
    assert (lost.num_tokens, lost.model_tokens, lost.reward, lost.calls) == (0, 0, None, ())
    assert lost.ids.dtype == np.int32
