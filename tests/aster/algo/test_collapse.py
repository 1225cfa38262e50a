from dataclasses import replace

import numpy as np
import pytest

from aster.algo.advantages import group_advantages
from aster.algo.collapse import EntropyTally, collapse_metrics, names_of, tool_use
from aster.algo.regions import Markers
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


def test_a_call_that_could_not_be_read_neither_repeats_nor_builds_on_anything() -> None:
    refused = ToolOutcome.FORMAT_ERROR
    t = trajectory(
        (5, call("", refused)),
        (5, call("y = 1", refused)),
        (5, call("x = 1")),
        (5, call("", refused)),
        (5, call("y")),  # what would have defined it did not run
        (5, call("x")),
        (5, call("x", refused)),
        (5, call("x", ToolOutcome.TIMEOUT)),
    )
    use = tool_use(t)
    assert (use.calls, use.later_calls, use.reusing_calls, use.repeated_calls) == (8, 3, 2, 1)
    values = collapse_metrics([group(t)])
    assert values["collapse/state_reuse_ratio"] == pytest.approx(2 / 3)
    assert values["collapse/repeated_code_ratio"] == pytest.approx(1 / 3)
    only_one_ran = trajectory((5, call("x = 1")), (5, call("x", refused)))
    assert "collapse/state_reuse_ratio" not in collapse_metrics([group(only_one_ran)])


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
    of_none, of_one, of_three = group_advantages(np.array([0.0, 0.0, 1.0])).tolist()
    named = [replace(t, uid=str(n)) for n, t in enumerate((none, one, three, lost))]
    values = collapse_metrics([group(*named)], advantages={"0": of_none, "1": of_one, "2": of_three})
    assert values["collapse/calls_mean"] == pytest.approx(4 / 3)
    assert values["collapse/ratio"] == pytest.approx(2 / 3)
    assert values["collapse/tool_use_ratio"] == pytest.approx(2 / 3)
    assert values["collapse/calls_per_1k_tokens"] == pytest.approx(1000 * 4 / 300)
    assert values["collapse/first_call_position"] == pytest.approx((0.5 + 0.1) / 2)
    assert values["collapse/last_call_position"] == pytest.approx((0.5 + 0.3) / 2)
    assert values["collapse/tokens_before_first_call"] == pytest.approx(30)
    assert values["collapse/repeated_code_ratio"] == pytest.approx(1 / 2)
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


def test_every_name_is_split_by_right_and_wrong_and_by_source() -> None:
    bad = ToolOutcome.TIMEOUT
    right = trajectory((10, call("x=1")), (10, call("x", bad)), (20, None), reward=1.0)
    wrong = trajectory((30, None), reward=0.0)
    groups = [group(replace(right, uid="right"), source="a"), group(replace(wrong, uid="wrong"), source="b")]
    values = collapse_metrics(groups, advantages={"right": 0.5, "wrong": -0.5})
    assert values["collapse/correct/calls_hist/2-4"] == 1.0
    assert values["collapse/wrong/calls_hist/0"] == 1.0
    assert values["collapse/calls_hist/2-4"] == 0.5
    assert values["collapse/outcome/success_ratio"] == values["collapse/outcome/timeout_ratio"] == 0.5
    assert values["collapse/correct/outcome/runtime_error_ratio"] == 0.0
    assert "collapse/wrong/outcome/success_ratio" not in values, "no call, no mix"
    assert values["collapse/turn_tokens"] == pytest.approx(70 / 4)
    assert values["collapse/correct/turn_tokens"] == pytest.approx(40 / 3)
    assert values["collapse/source/a/acc_at_calls/1-4"] == 1.0
    assert values["collapse/source/b/acc_at_calls/0"] == 0.0
    # A = (0.5, -0.5), calls (2, 0)
    assert values["collapse/advantage_weighted_calls"] == pytest.approx(0.5)
    assert values["collapse/source/b/advantage_weighted_calls"] == 0.0
    assert values["collapse/wrong/stop/answered"] == 1.0


TAGS = Markers((90,), (91,), (92,))


def test_surprisal_is_told_by_region_where_the_tokenizer_spells_the_tags() -> None:
    # one turn of 6: think think <call> code </call> <end>, then a final turn of 2
    t = trajectory((6, call("1")), (2, None))
    ids, logprobs = t.ids.copy(), t.behaviour_logprobs.copy()
    ids[[2, 4]] = 90, 91
    logprobs[[0, 1, 2, 3]] = -1.0, -3.0, -0.25, -0.75
    values = collapse_metrics([group(replace(t, ids=ids, behaviour_logprobs=logprobs))], markers=TAGS)
    assert values["collapse/surprisal/think"] == pytest.approx((1.0 + 3.0 + 0.5 + 0.5) / 4)
    assert values["collapse/surprisal/call_start"] == pytest.approx(0.25)
    assert values["collapse/correct/surprisal/code"] == pytest.approx(0.75)
    assert "collapse/surprisal/think" not in collapse_metrics([group(t)])


def test_entropies_of_the_learner_are_means_over_tokens_by_region_and_verdict() -> None:
    t = trajectory((5, None))  # think, call, code, end of call, end of turn
    ids = np.array([11, 90, 21, 91, 2], np.int32)
    tally = EntropyTally(TAGS)
    tally.add(replace(t, ids=ids, reward=1.0), np.array([1.0, 0.5, 0.25, 0.0, 0.0], np.float32), source="a")
    tally.add(replace(t, ids=ids, reward=0.0), np.array([3.0, 0.125, 0.75, 0.0, 0.0], np.float32), source="b")
    values = tally.metrics()
    assert values["collapse/entropy/all"] == tally.mean == pytest.approx((1.75 + 3.875) / 10)
    assert values["collapse/entropy/think"] == 2.0
    assert values["collapse/entropy/code"] == 0.5
    assert values["collapse/entropy/call_start"] == pytest.approx(0.3125)
    assert values["collapse/correct/entropy/think"] == 1.0
    assert values["collapse/source/b/entropy/all"] == pytest.approx(3.875 / 5)
    assert EntropyTally(TAGS).metrics() == {}
    bare = EntropyTally(None)
    bare.add(t, np.full(5, 0.5), source="a")
    assert bare.metrics() == {"collapse/entropy/all": 0.5, "collapse/correct/entropy/all": 0.5}
