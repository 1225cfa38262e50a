import numpy as np
import pytest

from aster.algo.advantages import group_advantages
from aster.algo.collapse import CollapseAlarm, collapse_metrics, names_of, tool_use
from aster.types import Cause, PromptRow, ToolCall, ToolOutcome, Trajectory, TrajectoryGroup, Turn, Verdicts


def call(code: str, outcome: ToolOutcome = ToolOutcome.SUCCESS) -> ToolCall:
    return ToolCall(code, "ok", outcome, "out", 0.1)


def trajectory(
    *turns: tuple[int, ToolCall | None],
    reward: float | None = 1.0,
    pred: str = "",
    cause: Cause = Cause.ANSWERED,
) -> Trajectory:
    """`turns` are (model tokens, call); each call is followed by 5 observation tokens."""
    mask: list[bool] = []
    spans = []
    for tokens, made in turns:
        spans.append(Turn(len(mask), len(mask) + tokens, "stop", 0.0, 1.0, made))
        mask += [True] * tokens + [False] * (5 if made else 0)
    n = len(mask)
    m = np.array(mask, bool)
    return Trajectory(
        uid="u",
        row_id="r",
        sample=0,
        prompt_ids=np.zeros(3, np.int32),
        ids=np.arange(n, dtype=np.int32),
        mask=m,
        behaviour_logprobs=np.where(m, -0.5, 0).astype(np.float32),
        versions=np.where(m, 0, -1).astype(np.int32),
        turns=tuple(spans),
        cause=cause,
        reward=reward,
        verdicts=Verdicts(pred=pred),
    )


def group(*trajectories: Trajectory, source: str = "math") -> TrajectoryGroup:
    return TrajectoryGroup(PromptRow("r", (), "1", source), 1, trajectories)


def test_positions_are_shares_of_model_tokens_and_ignore_observations() -> None:
    use = tool_use(trajectory((10, call("x=1")), (30, call("x")), (60, None)))
    assert (use.calls, use.model_tokens, use.tokens_before_first_call) == (2, 100, 10)
    assert (use.first_call_position, use.last_call_position) == (0.1, 0.4)
    assert use.surprisal == pytest.approx(0.5)
    assert not use.post_hoc


def test_a_call_after_most_of_the_reasoning_is_post_hoc() -> None:
    assert tool_use(trajectory((81, call("1")), (19, None))).post_hoc
    assert not tool_use(trajectory((80, call("1")), (20, None))).post_hoc
    assert not tool_use(trajectory((100, None))).post_hoc, "no call, nothing to be post hoc"


@pytest.mark.parametrize(
    ("pred", "reasoning", "post_hoc"),
    [
        ("42", "so it is 42. Let me check <tool_call>", True),
        ("42", "let me see <tool_call> print(42)", False),
        ("42", "maybe 142 or 42.5 <tool_call>", False),
        ("2", "2 apples and 2 pears <tool_call>", False),
        ("2", "thus \\boxed{2}; check <tool_call>", True),
        ("", "anything <tool_call>", False),
    ],
)
def test_a_call_after_the_answer_stood_in_the_reasoning_is_post_hoc(pred: str, reasoning: str, post_hoc: bool) -> None:
    t = trajectory((10, call("print(42)")), (90, None), pred=pred)
    assert tool_use(t, decode=lambda ids: reasoning).post_hoc is post_hoc


def test_reuse_needs_a_name_that_an_earlier_cell_defined() -> None:
    t = trajectory(
        (5, call("import math\nx = 3")),
        (5, call("print(x)")),  # reuse
        (5, call("x = 4; print(x)")),  # its own x
        (5, call("y = [x for x in range(3)]")),  # a comprehension's own x
        (5, call("print(math.pi)")),  # reuse of an import
        (5, call("print(len([1]))")),  # builtins only
        (5, call("for (")),  # does not parse
        (5, None),
    )
    assert tool_use(t).reusing_calls == 2


def test_repeats_errors_and_recoveries_are_counted() -> None:
    bad = ToolOutcome.RUNTIME_ERROR
    t = trajectory(
        (5, call("f()", bad)),
        (5, call("f()", bad)),
        (5, call("def f(): pass")),
        (5, call(" f() ")),
        (5, call("1/0", bad)),
    )
    use = tool_use(t)
    assert use.repeated_calls == 2, "`f()` again, twice; white space around it does not matter"
    assert (use.errors, use.recovered) == (3, 1)


@pytest.mark.parametrize(
    ("code", "reads", "writes"),
    [
        ("x = x + 1", {"x"}, {"x"}),
        ("x += 1", {"x"}, {"x"}),
        ("x[0] = y", {"x", "y"}, set()),
        ("import numpy as np, os.path", set(), {"np", "os"}),
        ("from math import pi as p\np*r", {"r"}, {"p"}),
        ("def f(a, *b, c=k, **d):\n    e = a + g\n    return f(e)", {"k", "g"}, {"f"}),
        ("async def f(): return q", {"q"}, {"f"}),
        ("class A(B):\n    z = w\n    def m(self): return self.z", {"B", "w"}, {"A"}),
        ("h = lambda t: t * s", {"s"}, {"h"}),
        ("{k: v for k, v in data.items() if k > low}", {"data", "low"}, set()),
        ("for i in seq:\n    total = i", {"seq"}, {"i", "total"}),
        ("try:\n    a()\nexcept E as e:\n    print(e)", {"a", "E"}, {"e"}),
        ("with open(p) as f:\n    d = f.read()", {"p"}, {"f", "d"}),
        ("v: int", set(), set()),
        ("v: int = u", {"u"}, {"v"}),
        ("if c:\n    t = 1\nprint(t)", {"c"}, {"t"}),
        ("(n := m)", {"m"}, {"n"}),
        ("a, (b, *c) = z", {"z"}, {"a", "b", "c"}),
        ("print('x')", set(), set()),
        ("not python at all", set(), set()),
        ("\0", set(), set()),
    ],
)
def test_names_that_a_cell_reads_and_defines(code: str, reads: set[str], writes: set[str]) -> None:
    assert names_of(code) == (reads, writes)


def test_code_of_any_depth_or_length_is_survived() -> None:
    assert names_of("(" * 5000 + ")" * 5000) == (frozenset(), frozenset())
    assert names_of("x = " + "-" * 3000 + "1")[0] == frozenset()
    assert names_of("x = 1\n" * 10_000) == (frozenset(), frozenset())


def test_metrics_by_hand_over_four_trajectories() -> None:
    none = trajectory((100, None), reward=0.0)
    one = trajectory((50, call("1")), (50, None), reward=0.0)
    three = trajectory((10, call("x=1")), (10, call("x")), (10, call("x")), (70, None), reward=1.0)
    lost = trajectory((10, call("1")), reward=None, cause=Cause.SANDBOX_LOST)
    values = collapse_metrics([group(none, one, three, lost)], advantages=group_advantages)
    assert values["collapse/calls_mean"] == pytest.approx(4 / 3)
    assert values["collapse/ratio"] == pytest.approx(2 / 3)
    assert values["collapse/tool_use_ratio"] == pytest.approx(2 / 3)
    assert values["collapse/calls_per_1k_tokens"] == pytest.approx(1000 * 4 / 300)
    assert values["collapse/first_call_position"] == pytest.approx((0.5 + 0.1) / 2)
    assert values["collapse/last_call_position"] == pytest.approx((0.5 + 0.3) / 2)
    assert values["collapse/tokens_before_first_call"] == pytest.approx(30)
    assert values["collapse/repeated_code_ratio"] == pytest.approx(1 / 4)
    assert values["collapse/state_reuse_ratio"] == pytest.approx(1.0)  # both later calls of `three` read x
    assert "collapse/recovery_rate" not in values, "no error, no rate"
    assert [values[f"collapse/calls_hist/{b}"] for b in ("0", "1", "2-4", "5-9")] == pytest.approx(
        [1 / 3, 1 / 3, 1 / 3, 0]
    )
    assert values["collapse/acc_at_calls/0"] == 0.0
    assert values["collapse/acc_at_calls/1-4"] == 0.5
    assert "collapse/acc_at_calls/10+" not in values
    # rewards 0 0 1: mean 1/3, sample std sqrt(1/3); A = (-0.5774, -0.5774, 1.1547); calls 0 1 3
    assert values["collapse/advantage_weighted_calls"] == pytest.approx((-0.5774 * 1 + 1.1547 * 3) / 3, abs=1e-3)
    assert values["collapse/correct/calls_mean"] == 3.0
    assert values["collapse/wrong/ratio"] == 1.0
    assert values["collapse/stop/answered"] == 1.0
    assert not any("/source/" in name for name in values), "one source needs no split"


def test_sources_are_split_when_there_are_several() -> None:
    a, b = trajectory((10, None)), trajectory((10, call("1")), (10, call("2")), (10, None))
    values = collapse_metrics([group(a, source="aime"), group(b, source="hmmt")], prefix="val/collapse")
    assert values["val/collapse/source/aime/ratio"] == 1.0
    assert values["val/collapse/source/hmmt/ratio"] == 0.0


def test_nothing_scored_gives_no_metrics() -> None:
    assert collapse_metrics([]) == {}
    assert collapse_metrics([group(trajectory((1, None), reward=None, cause=Cause.ENGINE_LOST))]) == {}


def observe(alarm: CollapseAlarm, calls: float, ratio: float = 0.0) -> tuple[CollapseAlarm, dict[str, str]]:
    return alarm.observe({"collapse/calls_mean": calls, "collapse/ratio": ratio})


def test_the_alarm_follows_the_moving_average_not_one_bad_step() -> None:
    alarm, reasons = observe(CollapseAlarm(), 4.0)
    assert reasons == {}
    alarm, reasons = observe(alarm, 0.0)
    assert alarm.ema_calls == pytest.approx(3.6)
    assert reasons == {}
    for _ in range(5):  # 3.6 * 0.9^5 = 2.126
        alarm, reasons = observe(alarm, 0.0)
        assert reasons == {}
    alarm, reasons = observe(alarm, 0.0)  # 1.913 < 2
    assert list(reasons) == ["calls_dropped"]
    assert "1.91" in reasons["calls_dropped"]
    assert "50% of 4.00" in reasons["calls_dropped"]


def test_the_alarm_sounds_above_thirty_percent_of_nearly_toolless_trajectories() -> None:
    assert observe(CollapseAlarm(), 3.0, 0.30)[1] == {}
    assert list(observe(CollapseAlarm(), 3.0, 0.31)[1]) == ["few_calls"]


def test_a_step_without_trajectories_leaves_the_alarm_as_it_is() -> None:
    alarm, _ = observe(CollapseAlarm(), 2.0)
    assert alarm.observe({}) == (alarm, {})
