"""What a step is reported as: pure functions from records to `{name: float}`, under the names of verl and the ASTER
reproduction, so that dashboards and scripts made for those read ours.

A trajectory that our infrastructure lost has no reward and enters no statistic here; it is counted (`causes/*`,
`infra_failed_rate`). A metric that has no data is absent rather than 0 or NaN. Writing anything is `tracking`'s job.

Legend: P problems (groups) · G scored samples of one · T response tokens of a trajectory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from aster.algo.collapse import Advantage, collapse_metrics
from aster.algo.intervals import all_at_k, majority_at_k, mean_interval, pass_at_k
from aster.algo.regions import Markers
from aster.types import Cause, OptimStats, StepStats, ToolOutcome, Trajectory, TrajectoryGroup

_CHUNK_TOKENS = 1 << 16  # 0.5 MB of float64: stays in the cache
_MAX_LOG_RATIO = 20.0  # exp() of a broken engine's log-prob must not overflow; the objective clamps at the same value

Decode = Callable[[np.ndarray], str]


# a step's rollouts ---------------------------------------------------------------------------------------------------


def rollout_metrics(
    groups: Sequence[TrajectoryGroup],
    *,
    others: Sequence[TrajectoryGroup] = (),
    advantages: Mapping[str, Advantage] | None = None,
    reward: Callable[[Trajectory], float] | None = None,
    decode: Decode | None = None,
    markers: Markers | None = None,
) -> dict[str, float]:
    """Everything that follows from the trajectories of one training step, the collapse monitor included.

    `others` came home in this step and were not learnt from: only their causes count. `advantages` by uid as the loss
    takes them; a trajectory without one is not trained on. `reward` is what they were taken of, the score unless it was
    shaped; what is right and wrong follows from the score all the same. `decode` and `markers` sharpen the collapse
    monitor (see there).
    """
    out = cause_metrics([*groups, *others])
    scored = [t for g in groups for t in g.scored]
    if not scored:
        return out

    def score(t: Trajectory) -> float:
        assert t.reward is not None
        return t.reward

    scores_PG = [np.array([score(t) for t in g.scored]) for g in groups if g.scored]
    rewards_PG = [np.array([(reward or score)(t) for t in g.scored]) for g in groups if g.scored]
    scores = np.concatenate(scores_PG)
    out |= _spread("critic/score", scores)
    out |= _spread("critic/rewards", np.concatenate(rewards_PG))  # shaped; no KL in the reward
    out |= _signal_metrics(scores_PG, rewards_PG)
    out |= _advantage_metrics(scored, advantages or {})
    out |= _length_metrics(scored)
    out |= _spread("num_turns", np.array([_num_turns(t) for t in scored]))
    out |= tool_metrics(scored, prefix="tool_use_info")
    out |= _agent_loop_times(scored)
    out |= _version_metrics(scored)
    out |= collapse_metrics(groups, decode=decode, markers=markers, advantages=advantages)
    out["training/acc"] = float((scores > 0.5).mean())
    out["training/score"] = out["training/final_reward"] = float(scores.mean())
    checked = [t.verdicts.math_verify for t in scored if t.verdicts.math_verify is not None]
    if checked:
        out["training/acc_math_verify"] = float(np.mean(checked))
    return out


def cause_metrics(groups: Sequence[TrajectoryGroup]) -> dict[str, float]:
    """Why trajectories ended, over all attempts, those replaced by a retry included.

    `infra_failed_rate`: attempts that ended by our failure / all attempts; 0 where there are none. One that was too old
    to be learnt from (STALE) did not fail, and is counted by its cause alone. `training/infra_masked_count`: how many
    of the failed no retry replaced, so that their group is smaller.
    """
    final = [t for g in groups for t in g.trajectories]
    attempts = final + [t for g in groups for t in g.lost]
    out: dict[str, float] = {}
    for cause in Cause:
        count = sum(t.cause is cause for t in attempts)
        out[f"causes/{cause.value}_count"] = float(count)
        out[f"causes/{cause.value}_ratio"] = count / max(len(attempts), 1)
    failed = sum(_failed(t) for t in attempts)
    out["infra_failed_rate"] = failed / max(len(attempts), 1)
    out["training/infra_failed_count"] = float(failed)
    out["training/infra_masked_count"] = float(sum(_failed(t) for t in final))
    out["training/infra_masked_groups"] = float(sum(any(_failed(t) for t in g.trajectories) for g in groups))
    return out


def recall_metrics(groups: Sequence[TrajectoryGroup]) -> dict[str, float]:
    """perf/recalled_*: what a killed run or a lost attempt had sampled and did not have to be sampled again; absent
    where there is none."""
    trajectories = [t for g in groups for t in g.trajectories]
    turns, afresh = sum(t.recalled_turns for t in trajectories), sum(t.began_afresh for t in trajectories)
    if not turns and not afresh:
        return {}
    return {
        "perf/recalled_turns": float(turns),
        "perf/recalled_trajectories": float(sum(t.recalled_turns > 0 for t in trajectories)),
        "perf/recalled_afresh": float(afresh),
    }


def _failed(trajectory: Trajectory) -> bool:
    return trajectory.cause.is_ours and trajectory.cause is not Cause.STALE


def tool_metrics(trajectories: Sequence[Trajectory], *, prefix: str) -> dict[str, float]:
    """`{prefix}/...`: the reference's tool_use_info. `overlong_filter_*` is there for its dashboards: GRPO as specified
    trains on cut trajectories, so nothing is ever filtered and it reads 0; `overlong_*` counts the cut ones."""
    n = len(trajectories)
    calls = [c for t in trajectories for c in t.calls]
    per_trajectory = np.array([len(t.calls) for t in trajectories])
    turns = sum(len(t.turns) for t in trajectories)
    lines = sum(len(c.code.splitlines()) for c in calls)
    users = int((per_trajectory > 0).sum())
    out = {
        "num_samples": float(n),
        "use_tool_count": float(users),
        "tool_use_ratio": users / n,
        "total_tool_calls_count": float(len(calls)),
        "avg_tool_calls_per_trajectory": len(calls) / n,
        "tool_call_counts_p50": float(np.percentile(per_trajectory, 50)),
        "tool_call_counts_p75": float(np.percentile(per_trajectory, 75)),
        "tool_call_counts_p90": float(np.percentile(per_trajectory, 90)),
        "total_code_lines": float(lines),
        "avg_code_lines_per_call": lines / max(len(calls), 1),
        "avg_single_turn_response_length": sum(t.model_tokens for t in trajectories) / max(turns, 1),
        "extra_calls_dropped_count": float(sum(c.extra_calls_dropped for c in calls)),
        "state_lost_count": float(sum(c.state_lost for c in calls)),
    }
    for outcome in ToolOutcome:
        count = sum(c.outcome is outcome for c in calls)
        out[f"tool_execution_{outcome.value}_count"] = float(count)
        out[f"tool_execution_{outcome.value}_ratio"] = count / max(len(calls), 1)
    for name, count in (
        ("hit_max_turns", sum(t.cause is Cause.MAX_TOOL_CALLS for t in trajectories)),
        ("overlong", sum(_is_cut(t) for t in trajectories)),
        ("overlong_filter", sum(_is_cut(t) and len(t.mask) > 0 and not t.mask.any() for t in trajectories)),
        ("stop_on_error", sum(t.cause is Cause.MALFORMED_END for t in trajectories)),
    ):
        out[f"{name}_count"] = float(count)
        out[f"{name}_ratio"] = count / n
    return {f"{prefix}/{name}": value for name, value in out.items()}


def _signal_metrics(scores_PG: Sequence[np.ndarray], rewards_PG: Sequence[np.ndarray]) -> dict[str, float]:
    """How many groups carry no signal, and how many are solved by every sample or by none."""
    solved = np.array([scores_G.mean() if np.ptp(scores_G) == 0 else np.nan for scores_G in scores_PG])
    return {
        "training/zero_variance_groups_ratio": float(np.mean([np.ptp(rewards_G) == 0 for rewards_G in rewards_PG])),
        "training/all_correct_groups_ratio": float((solved > 0.5).mean()),
        "training/all_wrong_groups_ratio": float((solved <= 0.5).mean()),
    }


def _advantage_metrics(scored: Sequence[Trajectory], advantages: Mapping[str, Advantage]) -> dict[str, float]:
    """critic/advantages over the model tokens that the loss is taken on."""
    total, count, highest, lowest = 0.0, 0, -math.inf, math.inf
    for t in scored:
        advantage, tokens = advantages.get(t.uid), t.model_tokens
        if advantage is None or not tokens:
            continue
        if isinstance(advantage, np.ndarray):
            own = advantage[len(t.prompt_ids) :][t.mask]
            total += float(own.sum(dtype=np.float64))
            highest, lowest = max(highest, float(own.max())), min(lowest, float(own.min()))
        else:  # of a hundred thousand trajectories: no array per trajectory
            total += advantage * tokens
            highest, lowest = max(highest, advantage), min(lowest, advantage)
        count += tokens
    if not count:
        return {}
    spread = {"mean": total / count, "max": highest, "min": lowest}
    # gamma = lambda = 1 and no critic: the return is the advantage
    return {f"critic/{name}/{key}": float(value) for name in ("advantages", "returns") for key, value in spread.items()}


def _length_metrics(scored: Sequence[Trajectory]) -> dict[str, float]:
    response = np.array([len(t.ids) for t in scored])
    cut = np.array([_is_cut(t) for t in scored])
    out = _spread("response_length", response) | {"response_length/clip_ratio": float(cut.mean())}
    kept = response > 0  # verl calls a sample without a response token aborted
    if kept.any():
        out |= _spread("response_length_non_aborted", response[kept])
        out["response_length_non_aborted/clip_ratio"] = float(cut[kept].mean())
    out["response/aborted_ratio"] = float((~kept).mean())
    out["response_length/model_tokens_mean"] = float(np.mean([t.model_tokens for t in scored]))
    return out | _spread("prompt_length", np.array([len(t.prompt_ids) for t in scored]))


def _agent_loop_times(scored: Sequence[Trajectory]) -> dict[str, float]:
    prefix = "timing_s/agent_loop"
    out = _spread(f"{prefix}/generate_sequences", np.array([t.timing.generate_s for t in scored]))
    out |= _spread(f"{prefix}/tool_calls", np.array([t.timing.tool_s for t in scored]))
    out |= _spread(f"{prefix}/tool_queue", np.array([t.timing.queue_s for t in scored]))
    slowest = max(scored, key=lambda t: t.timing.total_s)
    return out | {
        f"{prefix}/slowest/total": slowest.timing.total_s,
        f"{prefix}/slowest/generate_sequences": slowest.timing.generate_s,
        f"{prefix}/slowest/tool_calls": slowest.timing.tool_s,
        f"{prefix}/slowest/prompt_length": float(len(slowest.prompt_ids)),
        f"{prefix}/slowest/response_length": float(len(slowest.ids)),
    }


def _version_metrics(scored: Sequence[Trajectory]) -> dict[str, float]:
    ranges = [(int(v.min()), int(v.max())) for t in scored if len(v := t.versions[t.mask])]
    if not ranges:
        return {}
    return {
        "training/policy_version_min": float(min(low for low, _ in ranges)),
        "training/policy_version_max": float(max(high for _, high in ranges)),
        "training/mixed_version_ratio": float(np.mean([low != high for low, high in ranges])),
    }


def _num_turns(trajectory: Trajectory) -> int:
    """Tool turns + assistant turns + 1 for the user, as the reference counts."""
    return len(trajectory.calls) + len(trajectory.turns) + 1


def _is_cut(trajectory: Trajectory) -> bool:
    return trajectory.cause is Cause.MAX_TOKENS


def _spread(name: str, values: np.ndarray) -> dict[str, float]:
    return {
        f"{name}/mean": float(values.mean()),
        f"{name}/max": float(values.max()),
        f"{name}/min": float(values.min()),
    }


# a step's learning ---------------------------------------------------------------------------------------------------


def update_metrics(stats: Sequence[StepStats], optims: Sequence[OptimStats]) -> dict[str, float]:
    """actor/*: one `StepStats` and one `OptimStats` per optimizer step of the rollout step.

    Ratios are over all loss tokens of the step; pg_loss and grad_norm are means over its optimizer steps. A skipped
    step's norm is not finite: it is counted and stays out of the mean.
    """
    if not stats:
        return {}
    total = sum(stats, StepStats())
    out = {
        "actor/pg_loss": float(np.mean([s.loss for s in stats])),
        "actor/pg_clipfrac": total.per_token(total.clipped_sum),
        "actor/pg_clipfrac_lower": total.per_token(total.clipped_lower_sum),
        "actor/ppo_kl": total.per_token(total.kl_sum),
        "actor/loss_tokens": float(total.tokens),
        "perf/loss_token_ratio": total.tokens / max(total.padded_tokens, 1),  # of the tokens fed to the model
    }
    if total.reference_kl_sum:
        out["actor/kl_loss"] = total.per_token(total.reference_kl_sum)
    if total.entropy_sum:  # measured only where the learner was asked to
        out["actor/entropy"] = total.per_token(total.entropy_sum)
    if total.tis_sum:  # no importance weights in SFT, or with algo.tis_cap=null
        out["actor/tis_mean"] = total.per_token(total.tis_sum)
        out["actor/tis_capped_ratio"] = total.per_token(total.tis_capped_sum)
    norms = [o.grad_norm for o in optims if not o.skipped]
    if norms:
        out["actor/grad_norm"] = float(np.mean(norms))
    if optims:
        out["actor/lr"] = optims[-1].lr
        out["actor/skipped_steps"] = float(sum(o.skipped for o in optims))
    return out


def mismatch_metrics(behaviour: Iterable[np.ndarray], old: Iterable[np.ndarray]) -> dict[str, float]:
    """How far the engine's log-probs are from the learner's, over sampled tokens only ([tokens] each, aligned), which
    have to be of the same weights. Absent where there are none.

    k1 = mean(behaviour - old) and k3 = mean(exp(old - behaviour) - 1 - (old - behaviour)) estimate the same
    KL(engine || learner) in nats; k1 is unbiased and may be negative, k3 is never. Reads both sides once, a few at a
    time: float64 copies of a step's tokens would weigh more than the step.
    """
    total, seen, broken = _Moments(), 0, False
    k1 = k3 = largest = 0.0
    for b, o in _chunks(behaviour, old):
        seen += len(b)
        valid = np.isfinite(b) & np.isfinite(o)
        if not valid.all():
            broken = True
            b, o = b[valid], o[valid]
        if not len(b):
            continue
        p, q = np.exp(b), np.exp(o)
        difference = np.abs(p - q)
        largest = max(largest, float(difference.max()))
        ratio = np.clip(o - b, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
        k1 -= float(ratio.sum())
        k3 += float((np.expm1(ratio) - ratio).sum())
        total = total.with_rows(np.stack([difference, p, q]))
    if not seen:
        return {}
    out = {"training/rollout_probs_diff_valid": float(not broken)}
    if not total.count:
        return out
    variance = np.diag(total.products) / max(total.count - 1, 1)
    out |= {
        "training/rollout_probs_diff_max": largest,
        "training/rollout_probs_diff_mean": float(total.means[0]),
        "training/rollout_probs_diff_std": float(np.sqrt(variance[0])),
        "training/mismatch_k1": k1 / total.count,
        "training/mismatch_k3": k3 / total.count,
    }
    if variance[1] > 0 and variance[2] > 0:
        out["training/rollout_actor_probs_pearson_corr"] = float(
            total.products[1, 2] / np.sqrt(total.products[1, 1] * total.products[2, 2])
        )
    return out


def staleness_metrics(behaviour: Iterable[np.ndarray], old: Iterable[np.ndarray]) -> dict[str, float]:
    """training/staleness_k1 and _k3: the same for tokens of older weights, where the policy has moved as well. What is
    no number is no staleness either: it makes rollout_probs_diff_valid 0."""
    found = mismatch_metrics(behaviour, old)
    out = {f"training/staleness_{k}": found[key] for k in ("k1", "k3") if (key := f"training/mismatch_{k}") in found}
    if found.get("training/rollout_probs_diff_valid") == 0:
        out["training/rollout_probs_diff_valid"] = 0.0
    return out


@dataclass(frozen=True)
class _Moments:
    """Count, means [3] and centred products [3, 3] of what was seen so far (Chan's pairwise update)."""

    count: int = 0
    means: np.ndarray = field(default_factory=lambda: np.zeros(3))
    products: np.ndarray = field(default_factory=lambda: np.zeros((3, 3)))

    def with_rows(self, rows: np.ndarray) -> _Moments:
        """`rows` float64 [3, n], n > 0."""
        n, means = rows.shape[1], rows.mean(axis=1)
        centred = rows - means[:, None]
        shift, count = means - self.means, self.count + n
        return _Moments(
            count,
            self.means + shift * (n / count),
            self.products + centred @ centred.T + np.outer(shift, shift) * (self.count * n / count),
        )


def _chunks(behaviour: Iterable[np.ndarray], old: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Both sides as float64, many sequences at a time."""
    pending: list[tuple[np.ndarray, np.ndarray]] = []
    tokens = 0
    for b, o in zip(behaviour, old, strict=True):
        if np.shape(b) != np.shape(o):
            raise ValueError(f"log-probs of the same tokens must align, got {np.shape(b)} and {np.shape(o)}")
        pending.append((b, o))
        tokens += len(b)
        if tokens >= _CHUNK_TOKENS:
            yield _joined(pending)
            pending, tokens = [], 0
    if pending:
        yield _joined(pending)


def _joined(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.concatenate([b for b, _ in pairs]).astype(np.float64),
        np.concatenate([o for _, o in pairs]).astype(np.float64),
    )


def timing_metrics(
    seconds: Mapping[str, float],
    *,
    total_tokens: int,
    response_tokens: int,
    devices: int = 1,
    tokens_per_rank: Sequence[int] = (),
) -> dict[str, float]:
    """timing_s/*, timing_per_token_ms/*, perf/* and global_seqlen/* of one step.

    `seconds` by phase; "step" is the whole. Throughput is tokens (prompt and response) / second / device, generation
    is charged to response tokens, every other phase to all tokens.
    """
    out = {f"timing_s/{name}": value for name, value in seconds.items()}
    for name, value in seconds.items():
        tokens = response_tokens if name == "gen" else total_tokens
        if name != "step" and tokens:
            out[f"timing_per_token_ms/{name}"] = 1000.0 * value / tokens
    out["perf/total_num_tokens"] = float(total_tokens)
    if seconds.get("step"):
        out["perf/time_per_step"] = seconds["step"]
        out["perf/throughput"] = total_tokens / (seconds["step"] * devices)
    if tokens_per_rank:
        ranks = np.array(tokens_per_rank, dtype=np.float64)
        out |= _spread("global_seqlen", ranks)
        out["global_seqlen/minmax_diff"] = float(np.ptp(ranks))
    return out


# validation ----------------------------------------------------------------------------------------------------------


def validation_metrics(
    groups: Sequence[TrajectoryGroup],
    *,
    n: int,
    seed: int = 0,
    decode: Decode | None = None,
    markers: Markers | None = None,
) -> dict[str, float]:
    """val-core/{source}/acc/* and val-aux/{source}/*; `n` = samples asked of each problem.

    acc is math_verify's verdict where it was asked, else the strict one, else reward > 0.5. mean@n: mean over samples,
    then over problems. best@k and worst@k are exact expectations over subsets of k samples (best@k = pass@k), maj@k a
    majority vote. A problem that lost samples to our failures uses those it has; one that lost all is left out and
    counted. {name}/ci_low and ci_high: the 95 % interval for problems like these (`intervals.mean_interval`).
    """
    out: dict[str, float] = {}
    for source in sorted({g.row.data_source for g in groups}):
        mine = [g for g in groups if g.row.data_source == source]
        core, aux = f"val-core/{source}", f"val-aux/{source}"
        out |= {f"{aux}/{name}": value for name, value in cause_metrics(mine).items()}
        alive = [g for g in mine if g.scored]
        out[f"{aux}/problems"] = float(len(alive))
        out[f"{aux}/problems_lost"] = float(len(mine) - len(alive))
        if not alive:
            continue
        acc_PG = [np.array([is_right(t) for t in g.scored], dtype=np.float64) for g in alive]
        correct, samples = np.array([a.sum() for a in acc_PG]), np.array([len(a) for a in acc_PG])
        out |= _with_interval(f"{core}/acc/mean@{n}", [float(a.mean()) for a in acc_PG])
        out[f"{aux}/acc/std@{n}"] = float(np.mean([a.std(ddof=1) if len(a) > 1 else 0.0 for a in acc_PG]))
        for k in _subset_sizes(n):
            home = core if k == n else aux
            majorities = [
                majority_at_k(
                    [t.verdicts.pred for t in g.scored],
                    [is_right(t) for t in g.scored],
                    k=min(k, len(g.scored)),
                    seed=seed + index,
                )
                for index, g in enumerate(alive)
            ]
            drawn = np.minimum(k, samples)  # a problem with fewer samples left is judged on all it has
            out |= _with_interval(f"{home}/acc/best@{k}/mean", pass_at_k(correct, samples, k=drawn).tolist())
            out |= _with_interval(f"{home}/acc/maj@{k}/mean", majorities)
            out |= _with_interval(f"{aux}/acc/worst@{k}/mean", all_at_k(correct, samples, k=drawn).tolist())
        out |= _validation_details(alive, n=n, prefix=aux, decode=decode, markers=markers)
    return out


def _validation_details(
    alive: Sequence[TrajectoryGroup], *, n: int, prefix: str, decode: Decode | None, markers: Markers | None
) -> dict[str, float]:
    scored = [t for g in alive for t in g.scored]
    out = {f"{prefix}/score/mean@{n}": float(np.mean([np.mean([t.reward for t in g.scored]) for g in alive]))}
    strict = [[t.verdicts.strict for t in g.scored if t.verdicts.strict is not None] for g in alive]
    if any(strict):
        out[f"{prefix}/acc_strict/mean@{n}"] = float(np.mean([np.mean(s) for s in strict if s]))
    for part in (
        _length_metrics(scored),
        _spread("num_turns", np.array([_num_turns(t) for t in scored])),
        tool_metrics(scored, prefix="tool_use_info"),
        collapse_metrics(alive, decode=decode, markers=markers),
    ):
        out |= {f"{prefix}/{name}": value for name, value in part.items()}
    return out


def is_right(trajectory: Trajectory) -> bool:
    verdicts = trajectory.verdicts
    for verdict in (verdicts.math_verify, verdicts.strict):
        if verdict is not None:
            return verdict
    return trajectory.reward is not None and trajectory.reward > 0.5


def _subset_sizes(n: int) -> list[int]:
    """2, 4, 8, ... below n, and n itself."""
    return [*(2**i for i in range(1, 20) if 2**i < n), n]


def _with_interval(name: str, values_P: Sequence[float]) -> dict[str, float]:
    interval = mean_interval(values_P)
    return {name: interval.mean, f"{name}/ci_low": interval.low, f"{name}/ci_high": interval.high}
