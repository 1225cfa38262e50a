"""The interaction-collapse monitor: how a batch of trajectories uses its tool. The alarm over it is `alarm`.

Collapse is the policy ceasing to work *through* the tool: long reasoning, and at most a check after the fact. A call
count alone does not show it, so this looks at where calls sit, whether they build on each other, and whether they pay.
Pure functions of records; nothing here changes training. Positions are in model tokens, and a call sits at the end of
the turn that made it, since that is where it takes effect.

Every name is there over all trajectories, over the right and the wrong ones, and per data source where there are
several: `collapse/NAME`, `collapse/correct/NAME`, `collapse/wrong/NAME`, `collapse/source/SRC/NAME`; in a validation
the same behind `val-aux/SRC/`. What has no data has no key.

    calls_mean calls_p50 calls_p75 calls_p90 calls_hist/{0,1,2-4,5-9,10-19,20+} tool_use_ratio
    ratio                        share of trajectories with at most one call: the collapse ratio
    first_call_position last_call_position tokens_before_first_call calls_per_1k_tokens
    post_hoc_ratio               of the trajectories that call: only after the answer stood there, or near the end
    state_reuse_ratio            of the calls that ran after a first one: those that read a name of an earlier cell
    repeated_code_ratio          of the same calls: those whose code had run before
    outcome/{success,...}_ratio error_ratio recovery_rate malformed_end_ratio
    surprisal surprisal/{think,code,call_start}   -log p as sampled: one-sample estimates of the entropy
    entropy/{all,think,code,call_start}           the learner's exact entropies, where it makes a proximal pass
    turn_tokens                  model tokens of one turn
    stop/{cause}                 why trajectories ended; stop/max_tokens is the clip ratio of responses
    acc_at_calls/{0,1-4,5-9,10+} what calls pay
    advantage_weighted_calls     mean over trajectories of the sum of their calls' advantages; above 0: this step pushes
                                 calls up
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from aster.algo.regions import Markers, Sums, region_means
from aster.types import Cause, ToolCall, ToolOutcome, Trajectory, TrajectoryGroup

POST_HOC_AFTER = 0.8  # calls that all come after this share of the model tokens are a check, not a method
CALL_BUCKETS = ((0, 0), (1, 1), (2, 4), (5, 9), (10, 19), (20, None))
ACCURACY_BUCKETS = ((0, 0), (1, 4), (5, 9), (10, None))
_LONGEST_CODE = 20_000  # characters; a longer cell is not parsed, its calls count as no reuse
_BUILTIN_NAMES = frozenset(dir(builtins))

Decode = Callable[[np.ndarray], str]
Advantage = float | np.ndarray
"""Of all tokens of a trajectory alike, or [S], aligned with prompt and response, as in `Sample`."""


@dataclass(frozen=True)
class ToolUse:
    """What one trajectory did with its tool. Fractions are of its model tokens; None where it made no call."""

    calls: int
    turns: int
    model_tokens: int
    tokens_before_first_call: int | None
    first_call_position: float | None
    last_call_position: float | None
    post_hoc: bool
    later_calls: int  # that ran, after the first that did; one that could not be read did not run
    reusing_calls: int  # of these, the ones that read a name an earlier call defined
    repeated_calls: int  # of these, the ones whose code the trajectory had run before, to the letter
    outcomes: tuple[ToolOutcome, ...]  # of each call
    errors: int  # calls that did not succeed
    recovered: int  # of those, the ones whose next call did
    malformed_end: bool
    cause: Cause
    surprisal: float  # mean -log p of the model tokens: one-sample estimate of the policy's entropy
    surprisals: Sums | None  # the same by region; None without markers


def tool_use(trajectory: Trajectory, *, decode: Decode | None = None, markers: Markers | None = None) -> ToolUse:
    """`decode` (ids -> text), where given, also finds calls made after the answer already stood in the reasoning.

    `markers` tell thought from code.
    """
    model_before = np.concatenate([[0], np.cumsum(trajectory.mask)])
    total = int(model_before[-1])
    calling = [turn for turn in trajectory.turns if turn.call is not None]
    calls = trajectory.calls
    before_first = int(model_before[calling[0].stop]) if calling else None
    first = before_first / max(total, 1) if before_first is not None else None
    failed = [call.outcome is not ToolOutcome.SUCCESS for call in calls]
    ran = [call for call in calls if call.outcome is not ToolOutcome.FORMAT_ERROR]
    return ToolUse(
        calls=len(calls),
        turns=len(trajectory.turns),
        model_tokens=total,
        tokens_before_first_call=before_first,
        first_call_position=first,
        last_call_position=int(model_before[calling[-1].stop]) / max(total, 1) if calling else None,
        post_hoc=first is not None
        and (first > POST_HOC_AFTER or (decode is not None and _answered_before_calling(trajectory, decode))),
        later_calls=max(len(ran) - 1, 0),
        reusing_calls=_count_reuse(ran),
        repeated_calls=len(ran) - len({call.code.strip() for call in ran}),
        outcomes=tuple(call.outcome for call in calls),
        errors=sum(failed),
        recovered=sum(now and not after for now, after in pairwise(failed)),
        malformed_end=trajectory.cause is Cause.MALFORMED_END,
        cause=trajectory.cause,
        surprisal=-float(trajectory.behaviour_logprobs[trajectory.mask].mean(dtype=np.float64)) if total else 0.0,
        surprisals=None
        if markers is None
        else Sums.of(-trajectory.behaviour_logprobs, trajectory.ids, trajectory.mask, markers),
    )


def collapse_metrics(
    groups: Sequence[TrajectoryGroup],
    *,
    decode: Decode | None = None,
    markers: Markers | None = None,
    advantages: Mapping[str, Advantage] | None = None,
    prefix: str = "collapse",
) -> dict[str, float]:
    """The names above. `decode` sharpens post_hoc_ratio, `markers` split the surprisal by region.

    `advantages` (by uid, of the trajectories that are trained on) weigh the calls; the sign then says whether this step
    pushes calls up or down. Trajectories that our infrastructure lost are not looked at. No trajectory, no keys.
    """
    uses: list[ToolUse] = []
    correct: list[bool] = []
    sources: list[str] = []
    pushes: list[float] = []
    for group in groups:
        scored = group.scored
        rewards_G = np.array([t.reward for t in scored], dtype=np.float64)
        if advantages is not None:
            pushes += [_push_on_calls(t, advantages.get(t.uid, 0.0)) for t in scored]
        uses += [tool_use(t, decode=decode, markers=markers) for t in scored]
        correct += (rewards_G > 0.5).tolist()
        sources += [group.row.data_source] * len(scored)
    if not uses:
        return {}
    out: dict[str, float] = {}
    for name, chosen in _splits(correct, sources):
        part = [use for use, keep in zip(uses, chosen.tolist(), strict=True) if keep]
        if not part:
            continue
        values = _summary(part) | _accuracy_at_calls(part, np.array(correct)[chosen])
        if pushes:
            values["advantage_weighted_calls"] = float(np.array(pushes)[chosen].mean())
        out |= {f"{prefix}/{name}{key}": value for key, value in values.items()}
    return out


def _push_on_calls(trajectory: Trajectory, advantage: Advantage) -> float:
    """Sum over its calls of the advantage at the end of the turn that made each."""
    calling = [turn for turn in trajectory.turns if turn.call is not None]
    if not isinstance(advantage, np.ndarray):
        return advantage * sum(1 + len(turn.further_calls) for turn in calling)
    advantage_S = advantage[len(trajectory.prompt_ids) :]
    return sum(float(advantage_S[turn.stop - 1]) * (1 + len(turn.further_calls)) for turn in calling)


class EntropyTally:
    """`entropy/*` of the names above, put together one trajectory at a time while the learner's entropies come in.

    Token means, over the trajectories that are trained on, so without those that `algo` drops. Without markers only
    `entropy/all`.
    """

    def __init__(self, markers: Markers | None) -> None:
        self._markers = markers
        self._parts: list[tuple[float, int, Sums | None]] = []  # sum over all its model tokens, how many, by region
        self._correct: list[bool] = []
        self._sources: list[str] = []

    def add(self, trajectory: Trajectory, entropies: np.ndarray, *, source: str) -> None:
        """`entropies`: [T] of the response's tokens; what stands where the mask is off means nothing."""
        mask = trajectory.mask
        by_region = None if self._markers is None else Sums.of(entropies, trajectory.ids, mask, self._markers)
        self._parts.append((float(entropies[mask].sum(dtype=np.float64)), int(mask.sum()), by_region))
        self._correct.append(trajectory.reward is not None and trajectory.reward > 0.5)
        self._sources.append(source)

    @property
    def mean(self) -> float:
        """Over all tokens; 0 where there is none."""
        return sum(total for total, _, _ in self._parts) / max(sum(count for _, count, _ in self._parts), 1)

    def metrics(self, *, prefix: str = "collapse") -> dict[str, float]:
        out: dict[str, float] = {}
        for name, chosen in _splits(self._correct, self._sources):
            picked = [part for part, keep in zip(self._parts, chosen.tolist(), strict=True) if keep]
            if tokens := sum(count for _, count, _ in picked):
                out[f"{prefix}/{name}entropy/all"] = sum(total for total, _, _ in picked) / tokens
            means = region_means(sums for _, _, sums in picked if sums is not None)
            out |= {f"{prefix}/{name}entropy/{region}": value for region, value in means.items()}
        return out


def _splits(correct: Sequence[bool], sources: Sequence[str]) -> list[tuple[str, np.ndarray]]:
    """(prefix of the names, which [N] bool): all, the right, the wrong, and each source where there are several."""
    right = np.array(correct, bool)
    splits = [("", np.ones(len(right), bool)), ("correct/", right), ("wrong/", ~right)]
    if len(set(sources)) > 1:
        splits += [(f"source/{source}/", np.array(sources) == source) for source in sorted(set(sources))]
    return splits


def _accuracy_at_calls(uses: Sequence[ToolUse], is_correct: np.ndarray) -> dict[str, float]:
    calls = np.array([use.calls for use in uses])
    out: dict[str, float] = {}
    for low, high in ACCURACY_BUCKETS:
        inside = _in_bucket(calls, low, high)
        if inside.any():
            out[f"acc_at_calls/{_bucket_name(low, high)}"] = float(is_correct[inside].mean())
    return out


def _summary(uses: Sequence[ToolUse]) -> dict[str, float]:
    calls = np.array([use.calls for use in uses], dtype=np.float64)
    total_calls = int(calls.sum())
    later_calls = sum(use.later_calls for use in uses)
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
        "turn_tokens": model_tokens / max(sum(use.turns for use in uses), 1),
        "malformed_end_ratio": float(np.mean([use.malformed_end for use in uses])),
        "surprisal": float(np.mean([use.surprisal for use in uses])),
    }
    for low, high in CALL_BUCKETS:
        out[f"calls_hist/{_bucket_name(low, high)}"] = float(_in_bucket(calls, low, high).mean())
    out |= {
        f"stop/{cause.value}": float(np.mean([u.cause is cause for u in uses])) for cause in Cause if not cause.is_ours
    }
    by_region = region_means(use.surprisals for use in uses if use.surprisals is not None)
    out |= {f"surprisal/{region}": value for region, value in by_region.items()}
    callers = [use for use in uses if use.calls]
    if callers:
        out["first_call_position"] = float(np.mean([use.first_call_position for use in callers]))
        out["last_call_position"] = float(np.mean([use.last_call_position for use in callers]))
        out["tokens_before_first_call"] = float(np.mean([use.tokens_before_first_call for use in callers]))
        out["post_hoc_ratio"] = float(np.mean([use.post_hoc for use in callers]))
        out["error_ratio"] = errors / total_calls
        for outcome in ToolOutcome:
            count = sum(o is outcome for use in uses for o in use.outcomes)
            out[f"outcome/{outcome.value}_ratio"] = count / total_calls
    if later_calls:
        out["state_reuse_ratio"] = sum(use.reusing_calls for use in uses) / later_calls
        out["repeated_code_ratio"] = sum(use.repeated_calls for use in uses) / later_calls
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
        loaded, stored = _names(tree.body)
    except RecursionError:  # a parsed tree may still nest deeper than our walk
        return frozenset(), frozenset()
    return frozenset(loaded - _BUILTIN_NAMES), frozenset(stored)


def _names(nodes: Iterable[ast.AST]) -> tuple[set[str], set[str]]:
    """(names loaded before these nodes bind them, names bound), nodes in the order in which they run."""
    loaded: set[str] = set()
    stored: set[str] = set()
    for node in nodes:
        _visit(node, loaded, stored)
    return loaded, stored


def _visit(node: ast.AST, loaded: set[str], stored: set[str]) -> None:
    """Add what `node` loads from outside of what was bound before it, and what it binds in the scope it stands in.

    Branches count as if both ran. `global` and `del` are not followed. Every cell of every trajectory comes through
    here, so the two sets grow in place, and what names nothing is not descended into.
    """

    def load(names: Iterable[str]) -> None:
        loaded.update(name for name in names if name not in stored)

    def visit(*nodes: ast.AST | None) -> None:
        for child in nodes:
            if child is not None:
                _visit(child, loaded, stored)

    if isinstance(node, ast.Name):
        if not isinstance(node.ctx, ast.Load):
            stored.add(node.id)
        elif node.id not in stored:
            loaded.add(node.id)
        return
    if type(node) not in _OWN_RULES:
        for field in node._fields:
            value = getattr(node, field, None)
            if isinstance(value, list):
                for child in value:
                    if isinstance(child, ast.AST):
                        _visit(child, loaded, stored)
            elif isinstance(value, ast.AST) and value._fields:  # operators and contexts have none
                _visit(value, loaded, stored)
        return
    match node:
        case ast.alias(name=name, asname=asname):
            stored.add(asname or name.split(".")[0])
        case ast.Assign(targets=targets, value=value):
            visit(value, *targets)
        case ast.AnnAssign(target=target, annotation=annotation, value=value):
            visit(annotation, value, *([target] if value is not None else []))
        case ast.AugAssign(target=target, value=value):
            if isinstance(target, ast.Name):
                load([target.id])
            visit(value, target)
        case ast.NamedExpr(target=target, value=value):
            visit(value, target)
        case (
            ast.For(target=target, iter=values, body=body, orelse=orelse)
            | ast.AsyncFor(target=target, iter=values, body=body, orelse=orelse)
        ):
            visit(values, target, *body, *orelse)
        case ast.ExceptHandler(type=error, name=caught, body=body):
            visit(error)
            stored.update([caught] if caught else [])
            visit(*body)
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            load(_function(node.args, node.body, node.decorator_list, {node.name}))
            stored.add(node.name)
        case ast.Lambda():
            load(_function(node.args, [node.body], [], set()))
        case ast.ClassDef():
            load(_names(node.body)[0] | _names([*node.bases, *node.keywords, *node.decorator_list])[0])
            stored.add(node.name)
        case _:  # comprehensions
            inside, local = _names(ast.iter_child_nodes(node))
            load(inside - local)


_OWN_RULES = frozenset(
    {
        ast.alias, ast.Assign, ast.AnnAssign, ast.AugAssign, ast.NamedExpr, ast.For, ast.AsyncFor, ast.ExceptHandler,
        ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef, ast.ListComp, ast.SetComp, ast.DictComp,
        ast.GeneratorExp,
    }
)  # fmt: skip


def _function(
    arguments: ast.arguments, body: Sequence[ast.AST], decorators: Sequence[ast.AST], name: set[str]
) -> set[str]:
    """What it loads from outside, its body when it is called as well as its defaults at once."""
    loaded, local = _names(body)
    parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    local |= {p.arg for p in parameters if p is not None} | name
    defaults = [d for d in (*arguments.defaults, *arguments.kw_defaults) if d is not None]
    around, _ = _names([*defaults, *decorators])
    return (loaded - local) | around


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
