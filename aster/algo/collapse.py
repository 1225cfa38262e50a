"""The interaction-collapse monitor: how a batch of trajectories uses its tool, and an alarm when that use dies.

Collapse is the policy ceasing to work *through* the tool: long reasoning, and at most a check after the fact. A call
count alone does not show it, so this looks at where calls sit, whether they build on each other, and whether they pay.
Pure functions of records; nothing here changes training. Positions are in model tokens, and a call sits at the end of
the turn that made it, since that is where it takes effect.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from aster.types import Cause, ToolCall, ToolOutcome, Trajectory, TrajectoryGroup

POST_HOC_AFTER = 0.8  # calls that all come after this share of the model tokens are a check, not a method
CALL_BUCKETS = ((0, 0), (1, 1), (2, 4), (5, 9), (10, 19), (20, None))
ACCURACY_BUCKETS = ((0, 0), (1, 4), (5, 9), (10, None))
_LONGEST_CODE = 20_000  # characters; a longer cell is not parsed, its calls count as no reuse
_BUILTIN_NAMES = frozenset(dir(builtins))

Decode = Callable[[np.ndarray], str]


@dataclass(frozen=True)
class ToolUse:
    """What one trajectory did with its tool. Fractions are of its model tokens; None where it made no call."""

    calls: int
    model_tokens: int
    tokens_before_first_call: int | None
    first_call_position: float | None
    last_call_position: float | None
    post_hoc: bool
    reusing_calls: int  # calls after the first that read a name an earlier call defined
    repeated_calls: int  # calls whose code the trajectory had run before, to the letter
    errors: int  # calls that did not succeed
    recovered: int  # of those, the ones whose next call did
    malformed_end: bool
    cause: Cause
    surprisal: float  # mean -log p of the model tokens: one-sample estimate of the policy's entropy


def tool_use(trajectory: Trajectory, *, decode: Decode | None = None) -> ToolUse:
    """`decode` (ids -> text), where given, also finds calls made after the answer already stood in the reasoning."""
    model_before = np.concatenate([[0], np.cumsum(trajectory.mask)])
    total = int(model_before[-1])
    calling = [turn for turn in trajectory.turns if turn.call is not None]
    calls = trajectory.calls
    before_first = int(model_before[calling[0].stop]) if calling else None
    first = before_first / max(total, 1) if before_first is not None else None
    failed = [call.outcome is not ToolOutcome.SUCCESS for call in calls]
    codes = [call.code.strip() for call in calls]
    return ToolUse(
        calls=len(calls),
        model_tokens=total,
        tokens_before_first_call=before_first,
        first_call_position=first,
        last_call_position=int(model_before[calling[-1].stop]) / max(total, 1) if calling else None,
        post_hoc=first is not None
        and (first > POST_HOC_AFTER or (decode is not None and _answered_before_calling(trajectory, decode))),
        reusing_calls=_count_reuse(calls),
        repeated_calls=len(codes) - len(set(codes)),
        errors=sum(failed),
        recovered=sum(now and not after for now, after in pairwise(failed)),
        malformed_end=trajectory.cause is Cause.MALFORMED_END,
        cause=trajectory.cause,
        surprisal=-float(trajectory.behaviour_logprobs[trajectory.mask].mean(dtype=np.float64)) if total else 0.0,
    )


def collapse_metrics(
    groups: Sequence[TrajectoryGroup],
    *,
    decode: Decode | None = None,
    advantages: Callable[[np.ndarray], np.ndarray] | None = None,
    prefix: str = "collapse",
) -> dict[str, float]:
    """`{prefix}/NAME` over all scored trajectories, and split under `/correct/`, `/wrong/` and `/source/{src}/`.

    `advantages` ([G] rewards -> [G]) weighs the calls; its sign then says whether this step pushes calls up or down.
    Trajectories that our infrastructure lost are not looked at. No trajectory, no keys.
    """
    uses: list[ToolUse] = []
    correct: list[bool] = []
    sources: list[str] = []
    weights: list[float] = []
    for group in groups:
        scored = group.scored
        rewards_G = np.array([t.reward for t in scored], dtype=np.float64)
        weights += [] if advantages is None or not scored else advantages(rewards_G).tolist()
        uses += [tool_use(t, decode=decode) for t in scored]
        correct += (rewards_G > 0.5).tolist()
        sources += [group.row.data_source] * len(scored)
    if not uses:
        return {}
    out = {f"{prefix}/{name}": value for name, value in _summary(uses).items()}
    calls = np.array([use.calls for use in uses])
    is_correct = np.array(correct)
    for low, high in CALL_BUCKETS:
        out[f"{prefix}/calls_hist/{_bucket_name(low, high)}"] = float(_in_bucket(calls, low, high).mean())
    for low, high in ACCURACY_BUCKETS:
        inside = _in_bucket(calls, low, high)
        if inside.any():
            out[f"{prefix}/acc_at_calls/{_bucket_name(low, high)}"] = float(is_correct[inside].mean())
    if weights:
        out[f"{prefix}/advantage_weighted_calls"] = float(np.mean(np.array(weights) * calls))
    splits: list[tuple[str, np.ndarray]] = [("correct", is_correct), ("wrong", ~is_correct)]
    if len(set(sources)) > 1:
        splits += [(f"source/{source}", np.array(sources) == source) for source in sorted(set(sources))]
    for name, chosen in splits:
        part = [use for use, keep in zip(uses, chosen.tolist(), strict=True) if keep]
        if part:
            out |= {f"{prefix}/{name}/{key}": value for key, value in _summary(part).items()}
    return out


def _summary(uses: Sequence[ToolUse]) -> dict[str, float]:
    calls = np.array([use.calls for use in uses], dtype=np.float64)
    total_calls = int(calls.sum())
    later_calls = int(np.maximum(calls - 1, 0).sum())
    model_tokens = sum(use.model_tokens for use in uses)
    errors = sum(use.errors for use in uses)
    out = {
        "calls_mean": float(calls.mean()),
        "calls_p50": float(np.percentile(calls, 50)),
        "calls_p75": float(np.percentile(calls, 75)),
        "calls_p90": float(np.percentile(calls, 90)),
        "tool_use_ratio": float((calls > 0).mean()),
        "ratio": float((calls <= 1).mean()),
        "calls_per_1k_tokens": 1000.0 * total_calls / max(model_tokens, 1),
        "malformed_end_ratio": float(np.mean([use.malformed_end for use in uses])),
        "surprisal": float(np.mean([use.surprisal for use in uses])),
    }
    out |= {
        f"stop/{cause.value}": float(np.mean([u.cause is cause for u in uses])) for cause in Cause if not cause.is_ours
    }
    callers = [use for use in uses if use.calls]
    if callers:
        out["first_call_position"] = float(np.mean([use.first_call_position for use in callers]))
        out["last_call_position"] = float(np.mean([use.last_call_position for use in callers]))
        out["tokens_before_first_call"] = float(np.mean([use.tokens_before_first_call for use in callers]))
        out["post_hoc_ratio"] = float(np.mean([use.post_hoc for use in callers]))
        out["repeated_code_ratio"] = sum(use.repeated_calls for use in uses) / total_calls
        out["error_ratio"] = errors / total_calls
    if later_calls:
        out["state_reuse_ratio"] = sum(use.reusing_calls for use in uses) / later_calls
    if errors:
        out["recovery_rate"] = sum(use.recovered for use in uses) / errors
    return out


def _in_bucket(calls: np.ndarray, low: int, high: int | None) -> np.ndarray:
    return (calls >= low) & (calls <= (np.inf if high is None else high))


def _bucket_name(low: int, high: int | None) -> str:
    return f"{low}+" if high is None else str(low) if low == high else f"{low}-{high}"


# causal use of the session -------------------------------------------------------------------------------------------


def _count_reuse(calls: Sequence[ToolCall]) -> int:
    defined: set[str] = set()
    reusing = 0
    for call in calls:
        reads, writes = names_of(call.code)
        reusing += bool(reads & defined)
        defined |= writes
    return reusing


def names_of(code: str) -> tuple[frozenset[str], frozenset[str]]:
    """(names that the cell expects to exist, names that it defines at its top level). Builtins are not names here.

    Code that does not parse reads and defines nothing.

    >>> reads, writes = names_of("x = x + 1; y = [k for k in x]")
    >>> sorted(reads), sorted(writes)
    (['x'], ['x', 'y'])
    """
    if len(code) > _LONGEST_CODE:
        return frozenset(), frozenset()
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # what ast.parse raises for what a model may write
        return frozenset(), frozenset()
    try:
        loaded, stored = _in_order(tree.body)
    except RecursionError:  # a parsed tree may still nest deeper than our walk
        return frozenset(), frozenset()
    return frozenset(loaded - _BUILTIN_NAMES), frozenset(stored)


def _in_order(nodes: Iterable[ast.AST | None]) -> tuple[set[str], set[str]]:
    """(names loaded before these nodes bind them, names bound), nodes in the order in which they run."""
    loaded: set[str] = set()
    stored: set[str] = set()
    for node in nodes:
        if node is not None:
            more_loaded, more_stored = _scope(node)
            loaded |= more_loaded - stored
            stored |= more_stored
    return loaded, stored


def _scope(node: ast.AST) -> tuple[set[str], set[str]]:
    """(names that `node` loads from outside itself, names that it binds in the scope it stands in).

    Branches count as if both ran. `global` and `del` are not followed.
    """
    match node:
        case ast.Name(id=name, ctx=ast.Load()):
            return {name}, set()
        case ast.Name(id=name):
            return set(), {name}
        case ast.alias(name=name, asname=asname):
            return set(), {asname or name.split(".")[0]}
        case ast.Assign(targets=targets, value=value):
            return _in_order([value, *targets])
        case ast.AnnAssign(target=target, annotation=annotation, value=value):
            return _in_order([annotation, value, *([target] if value is not None else [])])
        case ast.AugAssign(target=ast.Name(id=name), value=value):
            loaded, stored = _scope(value)
            return loaded | {name}, stored | {name}
        case ast.NamedExpr(target=target, value=value):
            return _in_order([value, target])
        case (
            ast.For(target=target, iter=values, body=body, orelse=orelse)
            | ast.AsyncFor(target=target, iter=values, body=body, orelse=orelse)
        ):
            return _in_order([values, target, *body, *orelse])
        case ast.ExceptHandler(type=kind, name=name, body=body):
            return _in_order([kind, *([ast.Name(name, ast.Store())] if name else []), *body])
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            return _function(node.args, node.body, node.decorator_list, {node.name})
        case ast.Lambda():
            return _function(node.args, [node.body], [], set())
        case ast.ClassDef():
            inside, _ = _in_order(node.body)
            around, _ = _in_order([*node.bases, *node.keywords, *node.decorator_list])
            return inside | around, {node.name}
        case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
            loaded, local = _in_order(ast.iter_child_nodes(node))
            return loaded - local, set()
        case _:
            return _in_order(ast.iter_child_nodes(node))


def _function(
    arguments: ast.arguments, body: Sequence[ast.AST], decorators: Sequence[ast.AST], name: set[str]
) -> tuple[set[str], set[str]]:
    loaded, local = _in_order(body)
    parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    local |= {p.arg for p in parameters if p is not None} | name
    around, _ = _in_order([*arguments.defaults, *arguments.kw_defaults, *decorators])
    return (loaded - local) | around, name


def _answered_before_calling(trajectory: Trajectory, decode: Decode) -> bool:
    """Did the final answer stand in the reasoning before the first call was written?

    A one-character answer stands in any reasoning by accident, so it only counts when it is boxed.
    """
    answer = trajectory.verdicts.pred
    if not answer:
        return False
    stop = next(turn.stop for turn in trajectory.turns if turn.call is not None)
    before = decode(trajectory.ids[:stop]).split("<tool_call>")[0]
    if f"\\boxed{{{answer}}}" in before:
        return True
    return len(answer) > 1 and re.search(rf"(?<![\w.]){re.escape(answer)}(?![\w]|\.\d)", before) is not None


# the alarm -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CollapseAlarm:
    """Remembers where calls began. An alarm is a word in the log and the dashboard; it never changes training.

    It is on while the moving average of calls per trajectory is below `max_drop` of its first value, or the collapse
    ratio is above `max_ratio`.
    """

    first_calls: float | None = None
    ema_calls: float | None = None
    decay: float = 0.9
    max_drop: float = 0.5
    max_ratio: float = 0.3

    def observe(self, values: Mapping[str, float], *, prefix: str = "collapse") -> tuple[CollapseAlarm, dict[str, str]]:
        """The next state, and `{rule: what it says}` of the rules that are on. Takes a step's `collapse_metrics`."""
        calls, ratio = values.get(f"{prefix}/calls_mean"), values.get(f"{prefix}/ratio")
        if calls is None or ratio is None:  # a step without a scored trajectory says nothing
            return self, {}
        first = calls if self.first_calls is None else self.first_calls
        ema: float = calls if self.ema_calls is None else self.decay * self.ema_calls + (1 - self.decay) * calls
        reasons: dict[str, str] = {}
        if ema < self.max_drop * first:
            reasons["calls_dropped"] = (
                f"calls per trajectory fell to {ema:.2f} (moving average), below {self.max_drop:.0%} of {first:.2f}"
            )
        if ratio > self.max_ratio:
            reasons["few_calls"] = f"{ratio:.0%} of trajectories make at most one call, above {self.max_ratio:.0%}"
        return replace(self, first_calls=first, ema_calls=ema), reasons
