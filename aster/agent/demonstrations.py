"""Trajectories become conversations to learn from: which of them are good enough, and how each is written down.

A trajectory is judged by its record alone, each rule in turn, and is dropped with the first that it breaks. What is
kept is written in OpenAI's form, thought and calls apart from each other, so that a student with another chat template
than the teacher's renders it as its own sampler would emit it (`ChatRenderer.raw_turn`).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aster.agent.chat import ChatRenderer
from aster.data.conversations import Messages
from aster.data.formats import split_thought
from aster.errors import DataError
from aster.types import Cause, PromptRow, ToolOutcome, Trajectory

_BUCKETS = ((0, 0), (1, 1), (2, 4), (5, 9), (10, 19), (20, None))  # of calls per trajectory, as in the collapse metrics


@dataclass(frozen=True)
class Wanted:
    """What a trajectory must be. The defaults are the paper's: more than nine calls, at most 32,768 tokens."""

    min_calls: int = 10
    max_calls: int | None = None
    max_tokens: int = 32768
    """Prompt and response together, in the teacher's tokens."""

    def against(self, t: Trajectory) -> str:
        """The first rule that `t` breaks, or nothing."""
        calls = len(t.calls)
        rules = (
            ("lost to infrastructure", t.cause.is_ours or t.reward is None),
            ("wrong", t.reward is not None and t.reward <= 0.5),
            ("not answered", t.cause is not Cause.ANSWERED),
            ("a call failed", any(c.outcome is not ToolOutcome.SUCCESS for c in t.calls)),
            ("calls that were not run", any(c.extra_calls_dropped for c in t.calls)),
            ("too few calls", calls < self.min_calls),
            ("too many calls", self.max_calls is not None and calls > self.max_calls),
            ("too long", t.num_tokens > self.max_tokens),
        )
        return next((name for name, broken in rules if broken), "")


@dataclass(frozen=True)
class Demonstration:
    uid: str
    row_id: str
    calls: int
    tokens: int
    messages: Messages
    exact: bool
    """Whether SFT with the teacher's own template trains on the very ids that the teacher sampled."""


@dataclass
class Selection:
    kept: list[Demonstration] = field(default_factory=list)
    dropped: list[dict[str, Any]] = field(default_factory=list)
    calls_before: list[int] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        """Counts, reasons, and calls per trajectory before and after."""
        return {
            "trajectories": len(self.calls_before),
            "kept": len(self.kept),
            "problems": len({d.row_id for d in self.kept}),
            "token_exact": sum(d.exact for d in self.kept),
            "dropped": dict(sorted(Counter(d["reason"] for d in self.dropped).items())),
            "calls_before": histogram(self.calls_before),
            "calls_after": histogram([d.calls for d in self.kept]),
        }


def select(
    trajectories: Iterable[Trajectory],
    rows: Mapping[str, PromptRow],
    renderer: ChatRenderer,
    *,
    wanted: Wanted,
    contaminated_by: Callable[[str], str] = lambda _: "",
    per_problem: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Selection:
    """Judge `trajectories` in order; `rows` by row_id are the problems, `renderer` is the teacher's.

    `contaminated_by(problem)` names the evaluation row that a problem overlaps with. At most `per_problem` of a problem
    are kept, the first ones; of what is left then, `limit` by a draw that depends on `seed` and the uids only.
    """
    out = Selection()
    seen: set[str] = set()
    of_problem: Counter[str] = Counter()
    overlaps: dict[str, str] = {}

    def drop(uid: str, row_id: str, calls: int, reason: str, detail: str = "") -> None:
        out.dropped.append({"uid": uid, "row_id": row_id, "calls": calls, "reason": reason, "detail": detail})

    for t in trajectories:
        calls = len(t.calls)
        out.calls_before.append(calls)
        row = rows.get(t.row_id)
        if reason := wanted.against(t):
            drop(t.uid, t.row_id, calls, reason, t.error)
            continue
        if row is None:
            drop(t.uid, t.row_id, calls, "of no problem in the dataset")
            continue
        problem = row.messages[-1]["content"]
        if t.row_id not in overlaps:
            overlaps[t.row_id] = contaminated_by(problem)
        if overlaps[t.row_id]:
            drop(t.uid, t.row_id, calls, "contaminated", overlaps[t.row_id])
            continue
        try:
            messages, exact = _written(t, row, renderer)
        except DataError as error:
            drop(t.uid, t.row_id, calls, "cannot be written as a conversation", str(error))
            continue
        if problem.strip() not in renderer.decode(t.prompt_ids):  # files that number their rows from 0 share their ids
            drop(t.uid, t.row_id, calls, "another prompt")
            continue
        text = json.dumps(messages, sort_keys=True)
        if text in seen:
            drop(t.uid, t.row_id, calls, "copy")
        elif per_problem is not None and of_problem[t.row_id] >= per_problem:
            drop(t.uid, t.row_id, calls, "enough of this problem")
        else:
            seen.add(text)
            of_problem[t.row_id] += 1
            out.kept.append(Demonstration(t.uid, t.row_id, calls, t.num_tokens, messages, exact))
    if limit is not None and len(out.kept) > limit:
        drawn = set(sorted(range(len(out.kept)), key=lambda i: _lot(seed, out.kept[i].uid))[:limit])
        for index, d in enumerate(out.kept):
            if index not in drawn:
                drop(d.uid, d.row_id, d.calls, "not drawn")
        out.kept = [d for index, d in enumerate(out.kept) if index in drawn]
    return out


def histogram(calls: Sequence[int]) -> dict[str, float]:
    """Trajectories by number of calls, and the mean.

    >>> histogram([0, 3, 3, 25])
    {'0': 1, '1': 0, '2-4': 2, '5-9': 0, '10-19': 0, '20+': 1, 'mean': 7.75}
    """
    out: dict[str, float] = {}
    for low, high in _BUCKETS:
        name = f"{low}+" if high is None else str(low) if low == high else f"{low}-{high}"
        out[name] = sum(low <= n and (high is None or n <= high) for n in calls)
    return out | {"mean": sum(calls) / len(calls) if calls else 0.0}


def _written(t: Trajectory, row: PromptRow, renderer: ChatRenderer) -> tuple[Messages, bool]:
    """The conversation, and whether its SFT ids are the trajectory's own. Raises DataError where a call is inside a
    thought, or the template cannot write a turn."""
    messages: Messages = [dict(m) for m in row.messages]
    ours: Messages = list(messages)  # as SFT will read it back
    for turn in t.turns:
        raw = renderer.turn_text(t.ids[turn.start : turn.stop])
        thought, rest = split_thought(raw)
        parsed = renderer.grammar.parse(raw)
        if renderer.grammar.parse(rest) != parsed:
            raise DataError("a call inside a thought")
        calls = [{"name": c.name, "arguments": c.arguments} for c in parsed.calls]
        content = renderer.grammar.without_calls(rest).strip() if calls else rest
        assistant = {"role": "assistant", "content": content, "reasoning_content": thought}
        ids = [f"call_{len(messages)}_{number}" for number in range(len(calls))]
        written = [
            {"id": i, "type": "function", "function": c | {"arguments": json.dumps(c["arguments"], ensure_ascii=False)}}
            for i, c in zip(ids, calls, strict=True)
        ]
        messages.append({**assistant, "tool_calls": written})
        ours.append({**assistant, "tool_calls": calls})
        run = () if turn.call is None else (turn.call, *turn.further_calls)
        if len(run) != len(ids):
            raise DataError(
                f"a turn in which {len(run)} calls were run and this tokenizer reads {len(ids)}: other ids than the "
                "model's own?"
            )
        for i, call in zip(ids, run, strict=True):
            messages.append({"role": "tool", "content": call.observation, "tool_call_id": i})
            ours.append({"role": "tool", "content": call.observation})
    ids_S, mask_S = renderer.conversation(ours)
    stream = [*t.prompt_ids.tolist(), *t.ids.tolist()]
    exact = ids_S.tolist() == stream and mask_S[len(t.prompt_ids) :].tolist() == t.mask.tolist()
    return messages, exact


def _lot(seed: int, uid: str) -> str:
    return hashlib.sha256(f"{seed}/{uid}".encode()).hexdigest()
