from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest

from aster.agent.ledger import Decision, Ledger, lost_trajectory
from aster.errors import CircuitOpen
from aster.types import Budget, Cause, Sampling, Task, Trajectory

TASK = Task("u", "r", 0, (), "code_agent", Budget(1, 1, 1), Sampling(), 0)


def ended(cause: Cause, engine: str = "e0", error: str = "x") -> Trajectory:
    return replace(lost_trajectory(TASK, Cause.CANCELLED, error, engine=engine), cause=cause)


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
    with pytest.raises(CircuitOpen, match="3 of 4 attempts"):
        judge(ledger, Cause.SANDBOX_LOST)


def test_the_message_blames_the_worst_component_first_and_names_the_engines() -> None:
    ledger = Ledger(max_retries=0, max_infra_failed_rate=0.5)
    ledger.opened("val", 7, 5)
    judge(ledger, Cause.REWARD_FAILED, step=7, kind="val", error="silent for 10 s")
    judge(ledger, Cause.ENGINE_LOST, step=7, kind="val", engine="e1", error="died")
    with pytest.raises(CircuitOpen) as caught:
        judge(ledger, Cause.ENGINE_LOST, step=7, kind="val", engine="e2", error="OOM")
    assert str(caught.value) == (
        "val step 7: 3 of 5 attempts were lost by our own failures, more than "
        "rollout.max_infra_failed_rate=0.5 allows. Broken: the rollout engines (engine_lost 2: e1 1, e2 1; last: OOM); "
        "the verifier (reward_failed 1: e0 1; last: silent for 10 s)"
    )
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_steps_and_kinds_are_judged_apart_and_old_ones_forgotten() -> None:
    ledger = Ledger(max_retries=0, max_infra_failed_rate=0.5)
    for step in range(100):
        for kind in ("train", "val"):
            ledger.opened(kind, step, 2)
            assert judge(ledger, Cause.SANDBOX_LOST, step=step, kind=kind) is Decision.MASK
    assert len(ledger._windows) == 32


def test_a_lost_trajectory_is_empty_but_well_formed() -> None:
    lost = lost_trajectory(TASK, Cause.ENGINE_LOST, "died", engine="e0")
    assert (lost.num_tokens, lost.model_tokens, lost.reward, lost.calls) == (0, 0, None, ())
    assert lost.ids.dtype == np.int32
