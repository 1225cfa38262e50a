"""The parts of bench-control and bench-rollout: what counts as ours, and that both sides do the same work."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent))

import bench_control
import bench_rollout

from aster.agent.chat import ChatRenderer
from aster.data.templates import TOOLS_TEMPLATE
from aster.data.tokenizer import EOS, PAD, train_tokenizer
from aster.types import Budget, Sampling, Task


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> ChatRenderer:
    folder = tmp_path_factory.mktemp("model")
    words = "the sum of the first numbers is found when each of them was seen once"
    tokenizer = train_tokenizer([words, bench_rollout.CALL, bench_rollout.ANSWER], merges=64)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, chat_template=TOOLS_TEMPLATE
    ).save_pretrained(folder)
    return ChatRenderer.from_model_dir(folder)


def test_a_fake_trajectory_has_the_tokens_turns_and_calls_that_the_target_speaks_of() -> None:
    task = Task("u", "r", 0, (), "code_agent", Budget(1, 1, 3), Sampling(), seed=3)
    made = bench_control.make_trajectory(task, "e0")
    assert (made.num_tokens, len(made.turns), len(made.calls)) == (2000, 4, 3)
    arrays = (made.prompt_ids, made.ids, made.mask, made.behaviour_logprobs, made.versions)
    assert sum(array.nbytes for array in arrays) == bench_control.TOKEN_BYTES
    assert made.model_tokens == 1880 - 3 * bench_control.OBSERVATION_TOKENS
    assert {int(made.versions[i]) for t in made.turns for i in range(t.start, t.stop)} == {0}


def test_a_small_step_of_the_real_driver_and_pool_is_measured(tmp_path: Path) -> None:
    step = bench_control.one_step(32, tmp_path, verifier=False)
    assert step["trajectories"] == 32
    assert step["tokens_bytes"] == 32 * (bench_control.TOKEN_BYTES + 4 * 2000)
    assert step["cpu_s"] > 0
    assert step["fakes_s"] > 0
    assert {"sample", "learn", "metrics_and_files"} == step["parts_s"].keys()


def test_the_figures_are_slopes_so_what_a_process_needs_once_does_not_count() -> None:
    def step(n: int) -> dict:
        return {
            "trajectories": n, "cpu_s": 9.0 + 0.0008 * n, "parts_s": {"sample": 1.0 + 0.0002 * n},
            "beyond_bytes": 5e7 + 21e3 * n, "tokens_bytes": 0,
        }  # fmt: skip

    line = bench_control.report([step(n) for n in (1024, 8192, 131_072)])
    assert line["cpu_ms_per_trajectory"] == {"is": 0.8, "must": "<= 1", "met": True}
    assert line["kb_per_trajectory_beyond_tokens"] == {"is": 21.0, "must": "<= 20", "met": False}
    assert line["parts_ms"] == {"sample": 0.2}


@pytest.mark.parametrize("tail", [False, True])
def test_scripted_turns_have_their_lengths_and_the_loop_reads_three_calls_and_an_answer(
    renderer: ChatRenderer, tail: bool
) -> None:
    call = len(renderer.turn_ids(bench_rollout.CALL))
    lengths = bench_rollout.turn_lengths(6, mean=call + 40, tail=tail, at_least=call, seed=1)
    for script, expected in zip(bench_rollout.write_scripts(renderer, lengths, seed=2), lengths, strict=True):
        assert [len(turn) for turn in script.turns] == expected.tolist()
        assert all(turn[-1] == renderer.turn_end_id for turn in script.turns)
        parsed = [renderer.parse(turn) for turn in script.turns]
        assert [len(p.calls) for p in parsed] == [1, 1, 1, 0]
        assert not any(p.malformed for p in parsed)
        assert renderer.final_text(script.turns[-1]).endswith("\\boxed{4}.")
    with pytest.raises(ValueError, match=f"cannot hold the {call} of its call"):
        bench_rollout.write_scripts(renderer, np.full((1, 4), call - 1), seed=2)


def test_a_long_tail_has_the_mean_of_the_even_lengths() -> None:
    lengths = bench_rollout.turn_lengths(400, mean=200, tail=True, at_least=20, seed=1)[:, 0]
    assert lengths.mean() == pytest.approx(200, rel=0.05)
    assert lengths.max() > 4 * np.median(lengths)


def test_the_line_compares_within_a_round_and_says_what_held() -> None:
    def arm(tokens_per_s: float) -> dict:
        return {"tokens_per_s": tokens_per_s, "turn_ms": {"engine": 5.0}, "cpu_ms_per_turn": 1.0}

    rounds = [
        {"loop_0": arm(95.0), "raw": arm(100.0) | {"cpu_s": 1.0}, "loop_100": arm(80.0)},
        {"loop_0": arm(19.0), "raw": arm(20.0) | {"cpu_s": 1.0}, "loop_100": arm(17.0)},
    ]
    args = argparse.Namespace(model="/x/tiny", trajectories=10, at_once=4, turn_tokens=40, rounds=2)
    line = bench_rollout.report({"rounds": {"even": rounds}, "tool_wall_s": 0.57}, args)
    assert (line["even_loop_0_vs_raw"]["is"], line["even_loop_0_vs_raw"]["met"]) == (0.95, True)
    assert (line["even_loop_100_vs_raw"]["is"], line["even_loop_100_vs_raw"]["met"]) == (0.825, False)
    assert line["tool_wall_s_of_8_at_once_with_0.5_s"]["met"]


def test_wall_time_in_tools_counts_once_what_overlaps() -> None:
    assert bench_rollout.busy_seconds([(0.0, 0.5), (0.1, 0.6), (2.0, 2.5)]) == pytest.approx(1.1)
    assert bench_rollout.busy_seconds([]) == 0.0
