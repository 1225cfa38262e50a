from dataclasses import replace
from math import sqrt

import numpy as np
import pytest

from aster.metrics import (
    mismatch_metrics,
    rollout_metrics,
    staleness_metrics,
    timing_metrics,
    update_metrics,
    validation_metrics,
)
from aster.types import (
    Cause,
    OptimStats,
    PromptRow,
    StepStats,
    Timing,
    ToolCall,
    ToolOutcome,
    Trajectory,
    TrajectoryGroup,
    Turn,
    Verdicts,
)


def trajectory(
    model: int = 10,
    *,
    observed: int = 0,
    reward: float | None = 1.0,
    cause: Cause = Cause.ANSWERED,
    outcomes: tuple[ToolOutcome, ...] = (),
    prompt: int = 4,
    verdicts: Verdicts | None = None,
    timing: Timing = Timing(),  # noqa: B008 - frozen
    version: int = 2,
    uid: str = "u",
) -> Trajectory:
    """`model` sampled tokens, then `observed` tokens; one turn per outcome and a last one."""
    mask = np.array([True] * model + [False] * observed, bool)
    turns = [Turn(0, 0, "stop", 0, 0, ToolCall("a = 1\nb = 2", "ok", o, "", 0.1)) for o in outcomes]
    return Trajectory(
        uid=uid,
        row_id="r",
        sample=0,
        prompt_ids=np.zeros(prompt, np.int32),
        ids=np.zeros(len(mask), np.int32),
        mask=mask,
        behaviour_logprobs=np.zeros(len(mask), np.float32),
        versions=np.where(mask, version, -1).astype(np.int32),
        turns=(*turns, Turn(0, model, "stop", 0, 0)),
        cause=cause,
        timing=timing,
        reward=reward,
        verdicts=verdicts or Verdicts(None if reward is None else reward > 0.5),
    )


def group(
    *trajectories: Trajectory, source: str = "math", lost: tuple[Trajectory, ...] = (), step: int = 3
) -> TrajectoryGroup:
    return TrajectoryGroup(PromptRow("r", (), "1", source), step, trajectories, lost=lost)


LOST = trajectory(1000, reward=None, cause=Cause.SANDBOX_LOST)


def test_scores_lengths_and_turns_by_hand() -> None:
    ok, bad = ToolOutcome.SUCCESS, ToolOutcome.RUNTIME_ERROR
    a = trajectory(10, observed=10, outcomes=(ok, ok, bad), reward=1.0, prompt=4, uid="a")
    b = trajectory(40, reward=0.0, cause=Cause.MAX_TOKENS, prompt=6, uid="b")
    v = rollout_metrics([group(a, b)], advantages={"a": 1 / sqrt(2), "b": -1 / sqrt(2)})
    assert [v[f"critic/score/{s}"] for s in ("mean", "max", "min")] == [0.5, 1.0, 0.0]
    assert [v[f"response_length/{s}"] for s in ("mean", "max", "min", "clip_ratio")] == [30, 40, 20, 0.5]
    assert v["response_length_non_aborted/mean"] == 30
    assert [v[f"prompt_length/{s}"] for s in ("mean", "max", "min")] == [5, 6, 4]
    assert [v[f"num_turns/{s}"] for s in ("mean", "max", "min")] == [(3 + 4 + 1 + 1 + 1) / 2, 8, 2]
    assert (v["training/acc"], v["training/score"], v["training/final_reward"]) == (0.5, 0.5, 0.5)
    # 10 tokens carry the one advantage, 40 the other
    assert v["critic/advantages/mean"] == pytest.approx((10 - 40) / 50 / sqrt(2))
    assert v["critic/returns/max"] == pytest.approx(1 / sqrt(2))


def test_a_shaped_reward_moves_rewards_variance_and_advantages_and_leaves_the_score_alone() -> None:
    short = trajectory(10, uid="short")
    long = trajectory(30, outcomes=(ToolOutcome.SUCCESS,) * 3, uid="long")  # right too, and punished for its length
    untrained = trajectory(500, cause=Cause.MAX_TOKENS, uid="untrained")
    v = rollout_metrics(
        [group(short, long, untrained)],
        advantages={"short": 1.0, "long": -1.0},
        reward=lambda t: 0.5 if t.uid == "long" else 1.0,
    )
    assert (v["critic/score/mean"], v["training/acc"], v["training/all_correct_groups_ratio"]) == (1, 1, 1)
    assert v["critic/rewards/mean"] == pytest.approx(2.5 / 3)
    assert v["training/zero_variance_groups_ratio"] == 0
    assert v["critic/advantages/mean"] == pytest.approx((10 - 30) / 40)
    assert v["collapse/advantage_weighted_calls"] == pytest.approx(-3 / 3), "what the loss pushes down reads below 0"
    assert "critic/advantages/mean" not in rollout_metrics([group(short, long)])


def test_advantages_of_a_tree_count_token_by_token_and_call_by_call() -> None:
    call = ToolCall("1", "ok", ToolOutcome.SUCCESS, "", 0.1)
    leaf = replace(
        trajectory(6, prompt=2),
        turns=(Turn(0, 2, "stop", 0, 0, call), Turn(2, 5, "stop", 0, 0, call, (call,)), Turn(5, 6, "stop", 0, 0)),
    )
    #                       prompt    turn 0      turn 1       turn 2
    advantage_S = np.array([9.0, 9.0, 0.5, 0.5, -1.0, -1.0, -1.0, -1.0])
    v = rollout_metrics([group(leaf)], advantages={"u": advantage_S})
    assert [v[f"critic/advantages/{s}"] for s in ("mean", "max", "min")] == [-0.5, 0.5, -1.0]
    assert v["collapse/advantage_weighted_calls"] == 0.5 - 2 * 1.0


def test_tool_metrics_by_hand() -> None:
    ok, bad = ToolOutcome.SUCCESS, ToolOutcome.RUNTIME_ERROR
    a = trajectory(10, outcomes=(ok, ok, bad))
    b = trajectory(40, reward=0.0, cause=Cause.MAX_TOKENS)
    c = trajectory(40, reward=0.0, cause=Cause.MAX_TOOL_CALLS, outcomes=(ok,))
    d = trajectory(10, reward=0.0, cause=Cause.MALFORMED_END)
    v = {
        k.removeprefix("tool_use_info/"): x for k, x in rollout_metrics([group(a, b, c, d)]).items() if "tool_use" in k
    }
    assert (v["num_samples"], v["use_tool_count"], v["tool_use_ratio"]) == (4, 2, 0.5)
    assert (v["total_tool_calls_count"], v["avg_tool_calls_per_trajectory"]) == (4, 1.0)
    assert (v["tool_execution_success_count"], v["tool_execution_success_ratio"]) == (3, 0.75)
    assert (v["tool_execution_runtime_error_count"], v["tool_execution_timeout_ratio"]) == (1, 0)
    assert (v["total_code_lines"], v["avg_code_lines_per_call"]) == (8, 2)
    assert v["avg_single_turn_response_length"] == (10 + 40 + 40 + 10) / (4 + 1 + 2 + 1)
    assert (v["tool_call_counts_p50"], v["tool_call_counts_p90"]) == (0.5, pytest.approx(2.4))  # of 0 0 1 3
    for name in ("hit_max_turns", "overlong", "stop_on_error"):
        assert (v[f"{name}_count"], v[f"{name}_ratio"]) == (1, 0.25), name
    assert v["overlong_filter_count"] == 0


def test_what_we_lost_is_counted_and_touches_no_statistic() -> None:
    good = [trajectory(10, reward=1.0), trajectory(20, reward=0.0)]
    clean = rollout_metrics([group(*good)])
    lossy = rollout_metrics([group(*good, LOST, lost=(LOST,))])
    counted = ("causes/", "infra_failed_rate", "training/infra_")
    assert {k: v for k, v in lossy.items() if not k.startswith(counted)} == {
        k: v for k, v in clean.items() if not k.startswith(counted)
    }
    assert lossy["infra_failed_rate"] == 2 / 4
    assert (lossy["causes/sandbox_lost_count"], lossy["causes/sandbox_lost_ratio"]) == (2, 0.5)
    assert (lossy["training/infra_failed_count"], lossy["training/infra_masked_count"]) == (2, 1)
    assert lossy["training/infra_masked_groups"] == 1
    assert clean["infra_failed_rate"] == 0


def test_a_step_that_lost_everything_reports_only_the_loss() -> None:
    values = rollout_metrics([group(LOST, LOST)])
    assert values["infra_failed_rate"] == 1.0
    assert "critic/score/mean" not in values
    assert rollout_metrics([])["infra_failed_rate"] == 0.0, "always there"


def test_groups_without_variance_are_told_apart() -> None:
    right, wrong = trajectory(reward=1.0), trajectory(reward=0.0)
    values = rollout_metrics([group(right, right), group(wrong, wrong), group(right, wrong), group(wrong, wrong)])
    assert values["training/zero_variance_groups_ratio"] == 0.75
    assert values["training/all_correct_groups_ratio"] == 0.25
    assert values["training/all_wrong_groups_ratio"] == 0.5


def test_times_and_the_slowest_trajectory() -> None:
    fast = trajectory(timing=Timing(0, 2.0, 1.5, 0.5, 0.1))
    slow = trajectory(33, timing=Timing(0, 9.0, 3.5, 5.0, 0.3))
    v = rollout_metrics([group(fast, slow)])
    assert [v[f"timing_s/agent_loop/generate_sequences/{s}"] for s in ("min", "max", "mean")] == [1.5, 3.5, 2.5]
    assert v["timing_s/agent_loop/tool_calls/max"] == 5.0
    assert v["timing_s/agent_loop/slowest/tool_calls"] == 5.0
    assert v["timing_s/agent_loop/slowest/response_length"] == 33


def test_versions_say_how_stale_the_tokens_are() -> None:
    mixed = trajectory(4)
    mixed.versions[:2] = 1
    values = rollout_metrics([group(mixed, trajectory(version=2))])
    assert (values["training/policy_version_min"], values["training/policy_version_max"]) == (1, 2)
    assert values["training/mixed_version_ratio"] == 0.5


def test_every_value_is_a_plain_finite_float() -> None:
    values = rollout_metrics([group(trajectory(0), trajectory(3, outcomes=(ToolOutcome.TIMEOUT,), reward=0.0))])
    assert values["response/aborted_ratio"] == 0.5
    assert values["response_length_non_aborted/min"] == 3
    for name, value in values.items():
        assert type(value) is float, name
        assert np.isfinite(value), name


def test_update_metrics_divide_by_all_loss_tokens_of_the_step() -> None:
    first = StepStats(loss=0.2, tokens=100, padded_tokens=400, entropy_sum=50, clipped_sum=1, kl_sum=0.0, tis_sum=100)
    second = StepStats(loss=0.4, tokens=300, padded_tokens=400, entropy_sum=30, clipped_sum=7, kl_sum=0.4, tis_sum=290)
    v = update_metrics([first, second], [OptimStats(1.0, 1e-6, False), OptimStats(3.0, 2e-6, False)])
    assert v["actor/pg_loss"] == pytest.approx(0.3)
    assert v["actor/entropy"] == pytest.approx(80 / 400)
    assert v["actor/pg_clipfrac"] == pytest.approx(8 / 400)
    assert v["actor/ppo_kl"] == pytest.approx(0.001)
    assert v["actor/tis_mean"] == pytest.approx(390 / 400)
    assert (v["actor/grad_norm"], v["actor/lr"], v["actor/skipped_steps"]) == (2.0, 2e-6, 0)
    assert v["perf/loss_token_ratio"] == 0.5


def test_a_skipped_step_is_counted_and_its_norm_left_out() -> None:
    values = update_metrics(
        [StepStats(tokens=1)] * 2, [OptimStats(float("inf"), 1e-6, True), OptimStats(2.0, 1e-6, False)]
    )
    assert (values["actor/grad_norm"], values["actor/skipped_steps"]) == (2.0, 1)
    assert "actor/grad_norm" not in update_metrics([StepStats()], [OptimStats(float("nan"), 1e-6, True)])
    assert update_metrics([], []) == {}


def test_what_the_learner_did_not_measure_is_absent() -> None:
    supervised = update_metrics([StepStats(loss=0.5, tokens=10, padded_tokens=10)], [OptimStats(1.0, 1e-3, False)])
    assert supervised["actor/pg_loss"] == 0.5
    assert "actor/entropy" not in supervised
    assert "actor/tis_mean" not in supervised


def test_mismatch_by_hand() -> None:
    behaviour = [np.log([0.5, 0.25], dtype=np.float32), np.log([0.1], dtype=np.float32)]
    old = [np.log([0.4, 0.25], dtype=np.float32), np.log([0.2], dtype=np.float32)]
    v = mismatch_metrics(behaviour, old)
    assert v["training/rollout_probs_diff_valid"] == 1
    assert v["training/rollout_probs_diff_max"] == pytest.approx(0.1, abs=1e-6)
    assert v["training/rollout_probs_diff_mean"] == pytest.approx(0.2 / 3, abs=1e-6)
    assert v["training/rollout_probs_diff_std"] == pytest.approx(np.std([0.1, 0, 0.1], ddof=1), abs=1e-6)
    r = np.log([0.8, 1.0, 2.0])  # log old/behaviour
    assert v["training/mismatch_k1"] == pytest.approx(-r.mean(), abs=1e-6)
    assert v["training/mismatch_k3"] == pytest.approx((np.exp(r) - 1 - r).mean(), abs=1e-6)
    expected = np.corrcoef([0.5, 0.25, 0.1], [0.4, 0.25, 0.2])[0, 1]
    assert v["training/rollout_actor_probs_pearson_corr"] == pytest.approx(expected, abs=1e-6)


def test_equal_log_probs_do_not_mismatch_and_broken_ones_are_flagged() -> None:
    same = mismatch_metrics([np.array([-1.0, -2.0])], [np.array([-1.0, -2.0])])
    assert same["training/mismatch_k3"] == 0
    assert same["training/rollout_actor_probs_pearson_corr"] == pytest.approx(1)
    broken = mismatch_metrics([np.array([-1.0, -np.inf, np.nan])], [np.array([-1.0, -2.0, -3.0])])
    assert broken["training/rollout_probs_diff_valid"] == 0
    assert broken["training/rollout_probs_diff_max"] == 0
    assert "training/rollout_actor_probs_pearson_corr" not in broken, "one token has no correlation"
    assert mismatch_metrics([], []) == mismatch_metrics([np.zeros(0)], [np.zeros(0)]) == {}
    wild = mismatch_metrics([np.array([-500.0])], [np.array([0.0])])
    assert np.isfinite(wild["training/mismatch_k3"])
    with pytest.raises(ValueError, match="must align"):
        mismatch_metrics([np.zeros(2)], [np.zeros(3)])


def test_what_age_adds_has_names_of_its_own_and_hides_no_broken_log_prob() -> None:
    v = staleness_metrics([np.log([0.5, 0.2])], [np.log([0.25, 0.2])])  # log old/behaviour: -log 2, 0
    assert v == {
        "training/staleness_k1": pytest.approx(np.log(2) / 2),
        "training/staleness_k3": pytest.approx((0.5 - 1 + np.log(2)) / 2),
    }
    assert staleness_metrics([np.array([np.nan])], [np.array([-1.0])]) == {"training/rollout_probs_diff_valid": 0.0}
    assert staleness_metrics([], []) == {}


def test_timing_metrics_charge_generation_to_response_tokens() -> None:
    v = timing_metrics(
        {"gen": 6.0, "update_actor": 3.0, "step": 10.0}, total_tokens=1000, response_tokens=600, devices=2,
        tokens_per_rank=[400, 600],
    )  # fmt: skip
    assert v["timing_s/gen"] == 6.0
    assert v["timing_per_token_ms/gen"] == pytest.approx(10.0)
    assert v["timing_per_token_ms/update_actor"] == pytest.approx(3.0)
    assert "timing_per_token_ms/step" not in v
    assert (v["perf/throughput"], v["perf/time_per_step"], v["perf/total_num_tokens"]) == (50.0, 10.0, 1000)
    assert (v["global_seqlen/mean"], v["global_seqlen/minmax_diff"]) == (500, 200)


def judged(right: bool, pred: str, *, strict: bool | None = None) -> Trajectory:
    return trajectory(reward=0.0, verdicts=Verdicts(strict if strict is not None else right, right, pred))


def test_validation_by_hand() -> None:
    first = group(
        judged(True, "7"), judged(True, "7", strict=False), judged(False, "8"), judged(False, ""), source="aime"
    )
    second = group(*[judged(False, p) for p in "1234"], source="aime")
    v = validation_metrics([first, second], n=4)
    assert v["val-core/aime/acc/mean@4"] == 0.25
    assert v["val-core/aime/acc/best@4/mean"] == 0.5
    assert v["val-core/aime/acc/maj@4/mean"] == 0.5  # 7 7 against 8
    assert v["val-aux/aime/acc/best@2/mean"] == pytest.approx((1 - 1 / 6) / 2)  # 1 - C(2,2)/C(4,2)
    assert v["val-aux/aime/acc/worst@2/mean"] == pytest.approx(1 / 6 / 2)
    assert v["val-aux/aime/acc/worst@4/mean"] == 0
    assert v["val-aux/aime/acc_strict/mean@4"] == pytest.approx(1 / 8)
    assert v["val-aux/aime/score/mean@4"] == 0
    assert 0 <= v["val-core/aime/acc/mean@4/ci_low"] < 0.1, "two problems say next to nothing about others"
    assert 0.75 < v["val-core/aime/acc/mean@4/ci_high"] <= 1
    assert v["val-core/aime/acc/best@4/mean/ci_low"] < 0.5 < v["val-core/aime/acc/best@4/mean/ci_high"]
    assert (v["val-aux/aime/problems"], v["val-aux/aime/problems_lost"]) == (2, 0)
    assert v["val-aux/aime/tool_use_info/num_samples"] == 8
    assert v["val-aux/aime/collapse/ratio"] == 1.0
    assert v["val-aux/aime/response_length/mean"] == 10


def test_validation_keeps_sources_apart_and_survives_losses() -> None:
    alive = group(judged(True, "1"), LOST, source="aime")
    dead = group(LOST, LOST, source="aime")
    other = group(judged(False, "1"), judged(True, "2"), source="hmmt")
    v = validation_metrics([alive, dead, other], n=2)
    assert v["val-core/aime/acc/mean@2"] == 1.0, "the lost samples are not wrong answers"
    assert v["val-core/aime/acc/best@2/mean"] == 1.0
    assert (v["val-aux/aime/problems"], v["val-aux/aime/problems_lost"]) == (1, 1)
    assert v["val-aux/aime/infra_failed_rate"] == 0.75
    assert v["val-core/hmmt/acc/mean@2"] == 0.5
    gone = validation_metrics([dead], n=2)
    assert "val-core/aime/acc/mean@2" not in gone
    assert validation_metrics([], n=2) == {}


def test_without_verdicts_the_reward_decides() -> None:
    unjudged = trajectory(reward=1.0, verdicts=Verdicts())
    assert validation_metrics([group(unjudged, source="s")], n=1)["val-core/s/acc/mean@1"] == 1.0
