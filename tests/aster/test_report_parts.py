"""Parts of the report by themselves, with numbers worked out by hand: tokens, and a step on the clock."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from report_runs import encode, tokenizer

from aster.page.steps import Clocked, clocks_of_rows, step_view
from aster.page.tokens import TokenArrays, TokenTexts, find_tokenizer, token_view
from aster.page.turns import turns_of


def clocked(uid: str, began: float, *, engine: str = "engine-0", total_s: float = 2.0) -> Clocked:
    return Clocked(uid, engine, began, total_s, 0.5, 0.0, True, False, ((0.0, 1.0), (1.5, 2.0)), ((1.0, 1.5),))


def test_a_character_spread_over_tokens_belongs_to_the_last_of_them() -> None:
    ids = encode("é🙂!").tolist()
    pieces = TokenTexts(tokenizer()).pieces(ids)
    assert len(pieces) == 7, "two bytes, four bytes, one"
    assert pieces == ["", "é", "", "", "", "🙂", "!"]


def test_bytes_that_are_no_character_are_shown_as_such() -> None:
    half = encode("é").tolist()[:1]
    assert TokenTexts(tokenizer()).pieces([*half, *encode("a").tolist()]) == ["", "�a"]
    assert TokenTexts(tokenizer()).pieces(half) == ["�"]


def test_special_tokens_can_be_skipped_as_the_renderer_does() -> None:
    texts = TokenTexts(tokenizer())
    ids = encode("<think>a<|im_end|>").tolist()
    assert texts.text(ids) == "<think>a<|im_end|>"
    assert texts.text(ids, skip_special=True) == "<think>a"


def test_probabilities_that_are_no_numbers_read_as_the_most_surprising() -> None:
    ids = encode("abc")
    logprobs = np.array([-0.5, np.nan, -np.inf], np.float32)
    arrays = TokenArrays(ids, np.ones(3, bool), logprobs, np.array([4, 4, 5], np.int32))
    view = token_view(arrays, TokenTexts(tokenizer()), max_chars=100)
    assert view == {"text": "abc", "n": [1, 1, 1], "m": [3], "lp": [10, 400, 400], "v": [[4, 2], [5, 1]]}


def test_the_tokenizer_of_a_run_is_found_below_a_parent_when_the_directory_was_moved(tmp_path: Path) -> None:
    run = tmp_path / "elsewhere" / "quickstart" / "rl"
    model = tmp_path / "elsewhere" / "quickstart" / "models" / "sft"
    run.mkdir(parents=True)
    model.mkdir(parents=True)
    assert find_tokenizer(run, "runs/quickstart/models/sft") is None
    (model / "tokenizer.json").write_text("{}")
    assert find_tokenizer(run, "runs/quickstart/models/sft") == model
    assert find_tokenizer(run, "/gone/runs/quickstart/models/sft") == model
    assert find_tokenizer(run, "") is None


PHASES = {"gen": 4.0, "old_log_prob": 1.0, "update_actor": 2.0, "publish": 0.5, "step": 8.0}


def test_rollouts_that_began_before_their_step_shift_the_learner_and_not_the_truth() -> None:
    view = step_view([clocked("a", 97.0), clocked("b", 101.0)], phases=PHASES, began=100.0, row_of={"b": 7})
    assert view is not None
    assert view["learner"] == [
        ["rollouts", 3000, 7000],
        ["log-probs", 7000, 8000],
        ["update", 8000, 10000],
        ["weights", 10000, 10500],
        ["rest", 10500, 11000],
    ]
    assert view["end"] == 11000
    assert [(t[1], t[2], t[4]) for t in view["t"]] == [(0, 2000, -1), (4000, 6000, 7)]
    assert view["said"] == [
        "The learner waited 4.0 s for rollouts, 50% of the step's 8.0 s.",
        "A trajectory spent 75% of its time generating, 25% in tools.",
        "After the last answer the engines had nothing to do for 5.0 s of it.",
    ]


def test_clocks_a_year_apart_are_not_laid_beside_each_other() -> None:
    view = step_view([clocked("a", 100.0)], phases=PHASES, began=100.0 + 3e7, row_of={})
    assert view is not None
    assert (view["learner"], view["end"]) == ([], 2500)


def test_a_step_without_any_clock_has_no_picture() -> None:
    assert step_view([clocked("a", 0.0)], phases={}, began=None, row_of={}) is None


def test_the_slowest_tenth_is_named() -> None:
    clocks = [clocked(str(n), 100.0, total_s=2.0) for n in range(9)] + [clocked("slow", 100.0, total_s=5.0)]
    view = step_view(clocks, phases=PHASES, began=100.0, row_of={})
    assert view is not None
    said = "The slowest tenth of 10 trajectories took 3.0 s longer than the rest, 75% of that wait."
    assert said in view["said"]


def test_without_the_token_file_a_clock_is_made_of_the_rows_turns() -> None:
    turns = [{"seconds": 1.0, "call": {"seconds": 0.5}}, {"seconds": 0.25, "call": None}]
    rows = [{"uid": "a", "began_unix": 100.0, "seconds": 2.0, "acc": False, "turns": turns}, {"uid": "old"}]
    [clock] = clocks_of_rows(rows)
    assert clock.generating == ((0.0, 1.0), (1.5, 1.75))
    assert clock.calling == ((1.0, 1.5),)
    assert clock.right is False
    assert clock.began == pytest.approx(100.0)


def test_a_refused_call_took_no_seconds_and_says_so() -> None:
    call = {"tool": "", "code": "", "status": "format_error", "outcome": "format_error", "seconds": 0.0}
    call |= {"state_lost": False}
    row = {"output": "x", "turns": [{"text": [0, 1], "tokens": 0, "finish_reason": "stop", "seconds": 0, "call": call}]}
    [turn] = turns_of(row, max_chars=100)
    assert (turn["call_s"], turn["s"], turn["tok"], turn["obs"]) == (0.0, 0, 0, "")
    assert turn.keys().isdisjoint({"think", "code", "lost", "more"}), "what is empty is left out"
