from __future__ import annotations

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from aster.agent.chat import ChatRenderer
from aster.agent.observations import observe, truncate_chars, truncate_tokens
from aster.errors import SandboxLost
from aster.types import ToolOutcome
from serve.schema import CellError, ExecuteResponse, Status

FAST = settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
SIDES = st.sampled_from(["left", "middle", "right"])


OURS = (Status.INFRA_ERROR, Status.SESSION_LOST)


@pytest.mark.parametrize("status", [status for status in Status if status not in OURS])
def test_every_status_has_a_row_in_the_table(status: Status) -> None:
    text, outcome = observe(ExecuteResponse(status=status, text="out"), timeout_s=30, session_id="s", loss_told=False)
    assert text
    assert (outcome is ToolOutcome.SUCCESS) == (status is Status.OK)


@pytest.mark.parametrize("status", OURS)
def test_our_failures_are_raised(status: Status) -> None:
    with pytest.raises(SandboxLost, match=f"sandbox session s lost: {status}: node down"):
        observe(ExecuteResponse(status=status, reason="node down"), timeout_s=30, session_id="s", loss_told=False)


def test_the_timeout_is_the_one_that_was_set() -> None:
    text, _ = observe(ExecuteResponse(status=Status.TIMEOUT), timeout_s=2.5, session_id="s", loss_told=False)
    assert text.startswith("Execution timeout after 2.5 seconds. ")


@pytest.mark.parametrize(
    ("stderr", "details"),
    [
        ("Traceback\n  line 1\nE: v\n", "Traceback\n  line 1\nE: v\n"),
        ("Traceba\n[output truncated: 9 bytes]\nE: v\n", "Traceba\n[output truncated: 9 bytes]\nE: v\n"),
        ("a warning\n", "a warning\nTraceback\n  line 1\nE: v"),
        ("", "Traceback\n  line 1\nE: v"),
    ],
)
def test_a_traceback_is_told_once(stderr: str, details: str) -> None:
    error = CellError(name="E", value="v", traceback="Traceback\n  line 1\nE: v\n")
    response = ExecuteResponse(status=Status.ERROR, stderr=stderr, error=error)
    text, _ = observe(response, timeout_s=30, session_id="s", loss_told=False)
    assert text.partition("Error details:\n")[2].strip("\n") == details.strip("\n")


def test_the_sandboxs_own_truncation_notice_is_not_doubled() -> None:
    text = "head\n[output truncated: 900 bytes]\ntail"
    response = ExecuteResponse(status=Status.OUTPUT_LIMIT, text=text, stdout_bytes=999)
    assert observe(response, timeout_s=30, session_id="s", loss_told=False)[0] == text


@FAST
@given(st.text(max_size=60), st.integers(2, 50), SIDES)
@example("0123", 4, "middle")
def test_cut_characters_keep_the_chosen_side(text: str, limit: int, side) -> None:
    cut = truncate_chars(text, limit, side)
    if len(text) <= limit:
        assert cut == text
        return
    head, _, tail = cut.partition(
        "...(truncated)" if side == "left" else "(truncated)..." if side == "right" else "...(truncated)..."
    )
    kept = {"left": (limit, 0), "right": (0, limit), "middle": (limit // 2, limit // 2)}[side]
    assert (head, tail) == (text[: kept[0]], text[len(text) - kept[1] :] if kept[1] else "")


@FAST
@given(st.text(alphabet=st.sampled_from("ab 1é中\n)🙂"), max_size=300), st.integers(30, 120), SIDES)
def test_cut_tokens_never_exceed_the_limit_and_keep_whole_characters(
    hybrid: ChatRenderer, text: str, limit: int, side
) -> None:
    def count(piece: str) -> int:
        return len(hybrid.content_spans(piece))

    cut = truncate_tokens(text, limit, side, spans=hybrid.content_spans, count=count)
    assert count(cut) <= limit
    if count(text) <= limit:
        assert cut == text
    else:
        head, notice, tail = cut.partition("...(truncated)...")
        assert notice
        assert text.startswith(head)
        assert text.endswith(tail)
        assert count(cut) > limit - 12  # little is wasted


def test_where_not_even_the_notice_fits_the_notice_alone_is_left() -> None:
    assert truncate_tokens("x" * 99, 3, "left", spans=lambda t: [(i, i + 1) for i in range(len(t))], count=len) == (
        "...(truncated)..."
    )
