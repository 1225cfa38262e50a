"""What the model reads after a call, and into which bucket the call counts: a function of its status.

Text and records only. A sandbox that failed for a reason of ours never gets here as text: it is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from aster.errors import SandboxLost
from aster.types import ToolOutcome
from serve.schema import ExecuteResponse, State, Status

FORMAT_ERROR = "Error when executing tool: "
STATE_KEPT = " The session state is kept."
STATE_LOST = " The session state was lost: variables must be defined again."
TRUNCATED = "...(truncated)..."

Side = Literal["left", "middle", "right"]

_DIED = {
    Status.OOM: ToolOutcome.RUNTIME_ERROR,
    Status.SESSION_DIED: ToolOutcome.RUNTIME_ERROR,
    Status.PROTOCOL_ERROR: ToolOutcome.UNKNOWN_ERROR,
}
_OURS = frozenset({Status.INFRA_ERROR, Status.SESSION_LOST})


def observe(
    response: ExecuteResponse, *, timeout_s: float, session_id: str, loss_told: bool
) -> tuple[str, ToolOutcome]:
    """The observation and its bucket. Raises SandboxLost where the model must not hear of it.

    `loss_told`: the previous observation said that the state was lost, so a fresh interpreter is no news.
    """
    status, lost = response.status, response.state is State.LOST
    if status in _OURS:
        raise SandboxLost(session_id, f"{status}: {response.reason or response.text[:200] or 'no reason given'}")
    if status is Status.OK:
        text = response.text
        if lost and not loss_told:
            text = f"{text}\n{STATE_LOST.strip()}" if text else STATE_LOST.strip()
        return text, ToolOutcome.SUCCESS
    if status is Status.TIMEOUT:
        text = (
            f"Execution timeout after {timeout_s:g} seconds. Consider optimizing your code for better performance or "
            f"reducing computational complexity.{STATE_LOST if lost else STATE_KEPT}"
        )
        return text + _section("Error output", response.stderr), ToolOutcome.TIMEOUT
    if status is Status.OUTPUT_LIMIT:
        return _output_limit(response) + (f"\n{STATE_LOST.strip()}" if lost else ""), ToolOutcome.RUNTIME_ERROR
    lost = status in _DIED or lost
    text = f"Runtime error occurred during execution.{STATE_LOST if lost else ''}"
    text += _section("Error details", _details(response)) + _section("Output before error", response.stdout)
    return text, _DIED.get(status, ToolOutcome.RUNTIME_ERROR)


def loses_state(response: ExecuteResponse) -> bool:
    """Whether what earlier calls had defined is gone, before this one or by it."""
    return response.state is State.LOST or response.status in _DIED


def tells_of_fresh(response: ExecuteResponse) -> bool:
    """Whether the observation has told of the interpreter that the next call finds fresh.

    A cell that came to its end in a fresh interpreter was told of that one, which lives on; the next loss is news.
    """
    return loses_state(response) and response.status not in (Status.OK, Status.ERROR)


def extra_calls(*, executed: int, total: int) -> str:
    """What the model reads about calls of a turn that were not run."""
    first = "the first call" if executed == 1 else f"the first {executed} calls"
    return f"{FORMAT_ERROR}only {first} of a turn can run; {total - executed} more in this turn not executed"


def truncate_chars(text: str, limit: int, side: Side) -> str:
    """At most `limit` characters and the notice. `left` keeps the head, `right` the tail, `middle` half of each.

    >>> truncate_chars("0123456789", 4, "middle")
    '01...(truncated)...89'
    """
    if len(text) <= limit:
        return text
    if side == "left":
        return text[:limit] + "...(truncated)"
    if side == "right":
        return "(truncated)..." + text[-limit:]
    half = limit // 2
    return text[:half] + TRUNCATED + text[-half:]


def truncate_tokens(
    text: str,
    limit: int,
    side: Side,
    *,
    spans: Callable[[str], Sequence[tuple[int, int]]],
    count: Callable[[str], int],
) -> str:
    """`text` cut at token borders to `count(cut) <= limit`, the notice included.

    `spans` gives each token's characters, `count` what the text costs where it will stand. When not even the notice
    fits, the notice alone is returned and the caller finds out by counting.
    """
    if count(text) <= limit:
        return text
    tokens = spans(text)
    keep = min(len(tokens), max(limit, 0))
    while keep > 0:
        head = {"left": keep, "right": 0, "middle": (keep + 1) // 2}[side]
        tail = keep - head
        cut = (text[: tokens[head - 1][1]] if head else "") + TRUNCATED + (text[tokens[-tail][0] :] if tail else "")
        over = count(cut) - limit
        if over <= 0:
            return cut
        keep -= over if over < keep else 1
    return TRUNCATED


def _output_limit(response: ExecuteResponse) -> str:
    notice = f"[output truncated: {response.stdout_bytes + response.stderr_bytes} bytes]"
    if "[output truncated: " in response.text:  # the sandbox has put it between head and tail
        return response.text
    return f"{response.text}\n{notice}" if response.text else notice


def _details(response: ExecuteResponse) -> str:
    """stderr, the traceback where stderr does not hold it already, and the supervisor's words."""
    parts = [response.stderr]
    if response.error is not None:
        traceback = (response.error.traceback or f"{response.error.name}: {response.error.value}").strip("\n")
        if traceback.rpartition("\n")[2] not in response.stderr:  # its last line: stderr may have lost its middle
            parts.append(traceback)
    if response.reason and response.reason not in response.stderr:
        parts.append(response.reason)
    parts = [part for part in parts if part.strip()]
    return parts[0] if len(parts) == 1 else "\n".join(part.strip("\n") for part in parts)


def _section(title: str, body: str) -> str:
    return f"\n\n{title}:\n{body}" if body else ""
