import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from aster.data.rollouts import (
    average_scores,
    read_rows,
    read_trajectories,
    rollout_files,
    write_rollouts,
    write_trajectories_parquet,
    write_validation,
)
from aster.errors import DataError
from aster.types import (
    Cause,
    PromptRow,
    Timing,
    ToolCall,
    ToolOutcome,
    Trajectory,
    TrajectoryGroup,
    Turn,
    Verdicts,
)

GOLDEN = Path(__file__).parents[2] / "golden" / "score"
WORDS = dict(
    enumerate(["?", "user\n", "1+1", "assistant\n", "<think>", "call", "</call>", "obs", "2", "\\boxed{2}", "<end>"])
)
SPECIAL = {10}


def decode(ids: np.ndarray, /, *, skip_special: bool = False) -> str:
    return "".join(WORDS[int(i)] for i in ids if not (skip_special and int(i) in SPECIAL))


def trajectory(sample: int = 0, **changes: object) -> Trajectory:
    call = ToolCall("x = 1\nx + 1", "ok", ToolOutcome.SUCCESS, "obs 2", 0.25, queue_s=0.125, extra_calls_dropped=1)
    base = Trajectory(
        uid=f"r/train/1/row/{sample}",
        row_id="row",
        sample=sample,
        prompt_ids=np.array([1, 2, 3], np.int32),
        ids=np.array([4, 5, 6, 10, 7, 8, 4, 9, 10], np.int32),
        mask=np.array([1, 1, 1, 1, 0, 0, 1, 1, 1], bool),
        behaviour_logprobs=np.array([-0.5, -1, -1.5, -1, 0, 0, -2, -0.1, -0.2], np.float32),
        versions=np.array([3, 3, 3, 3, -1, -1, 4, 4, 4], np.int32),
        turns=(Turn(0, 4, "stop", 0.0, 1.5, call), Turn(6, 9, "stop", 2.0, 2.5)),
        cause=Cause.ANSWERED,
        final_text="<think>\\boxed{2}",
        engine="engine-1",
        timing=Timing(1700000000.5, 2.5, 2.0, 0.25, 0.125),
        reward=1.0,
        verdicts=Verdicts(True, None, "2"),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


LOST = trajectory(
    1,
    cause=Cause.SANDBOX_LOST,
    reward=None,
    verdicts=Verdicts(),
    error="node gone",
    parent="r/train/1/row/0",
    branch_turn=1,
)
EMPTY = trajectory(
    2,
    ids=np.zeros(0, np.int32),
    mask=np.zeros(0, bool),
    behaviour_logprobs=np.zeros(0, np.float32),
    versions=np.zeros(0, np.int32),
    turns=(),
    cause=Cause.ENGINE_LOST,
    reward=None,
)


def group(*trajectories: Trajectory, lost: tuple[Trajectory, ...] = ()) -> TrajectoryGroup:
    row = PromptRow("row", ({"role": "user", "content": "1+1"},), "2", "math")
    return TrajectoryGroup(row, 1, trajectories, lost=lost)


def test_a_rollout_row_has_the_reference_columns_and_ours(tmp_path: Path) -> None:
    path = write_rollouts(tmp_path, [group(trajectory(), LOST)], step=7, decode=decode)
    first, second = read_rows(path)
    assert path.name == "7.jsonl"
    assert list(first)[:7] == ["input", "output", "score", "step", "acc", "pred", "final_reward"]
    assert first["input"] == "user\n1+1assistant\n"
    assert first["output"] == "<think>call</call>obs2<think>\\boxed{2}"
    assert (first["score"], first["step"], first["acc"], first["pred"], first["final_reward"]) == (
        1.0,
        7,
        True,
        "2",
        1.0,
    )
    assert (first["row_id"], first["uid"], first["sample"]) == ("row", "r/train/1/row/0", 0)
    assert (first["data_source"], first["ground_truth"], first["stop_reason"]) == ("math", "2", "answered")
    assert (first["num_turns"], first["tool_calls"]) == (2 + 1 + 1, 1)
    assert (first["response_tokens"], first["model_tokens"], first["prompt_tokens"]) == (9, 7, 3)
    assert (first["policy_version"], first["policy_version_oldest"]) == (4, 3)
    assert first["mean_logprob"] == pytest.approx(-(0.5 + 1 + 1.5 + 1 + 2 + 0.1 + 0.2) / 7)
    assert (second["score"], second["acc"], second["stop_reason"], second["error"]) == (
        None,
        None,
        "sandbox_lost",
        "node gone",
    )


def test_turns_point_into_the_output_and_what_lies_between_is_the_observation(tmp_path: Path) -> None:
    (row,) = read_rows(write_rollouts(tmp_path, [group(trajectory())], step=1, decode=decode))
    first, last = row["turns"]
    assert row["output"][slice(*first["text"])] == "<think>call</call>"
    assert row["output"][first["text"][1] : last["text"][0]] == "obs2"
    assert row["output"][slice(*last["text"])] == "<think>\\boxed{2}"
    assert (first["tokens"], first["seconds"], first["finish_reason"]) == (4, 1.5, "stop")
    assert first["call"] == {
        "tool": "code_interpreter",
        "code": "x = 1\nx + 1",
        "code_lines": 2,
        "status": "ok",
        "outcome": "success",
        "seconds": 0.25,
        "queue_s": 0.125,
        "state_lost": False,
    }
    assert last["call"] is None


def test_validation_rows_keep_special_tokens_and_add_the_reference_names(tmp_path: Path) -> None:
    judged = trajectory(reward=0.0, verdicts=Verdicts(False, True, "2.0"))
    (row,) = read_rows(write_validation(tmp_path, [group(judged)], step=10, decode=decode))
    assert row["output"].endswith("\\boxed{2}<end>")
    assert (row["score"], row["reward"]) == (0.0, 0.0)
    assert row["acc"] is True, "validation accuracy is math_verify's verdict where it was asked"
    assert row["non_tensor_data_source"] == "math"
    assert row["non_tensor_reward_model"]["ground_truth"] == "2"
    assert row["non_tensor_uid"] == "r/train/1/row/0"


def test_a_writer_that_fails_leaves_no_file_under_the_final_name(tmp_path: Path) -> None:
    def broken(ids: np.ndarray, /, *, skip_special: bool = False) -> str:
        raise RuntimeError("tokenizer gone")

    with pytest.raises(RuntimeError, match="tokenizer gone"):
        write_rollouts(tmp_path, [group(trajectory())], step=1, decode=broken)
    assert rollout_files(tmp_path) == []


def test_trajectories_come_back_bit_for_bit(tmp_path: Path) -> None:
    path = write_trajectories_parquet(tmp_path, [group(trajectory(), LOST, EMPTY, lost=(LOST,))], step=3)
    for before, after in zip((trajectory(), LOST, EMPTY), read_trajectories(path), strict=True):
        for f in fields(Trajectory):
            one, two = getattr(before, f.name), getattr(after, f.name)
            if isinstance(one, np.ndarray):
                assert one.dtype == two.dtype, f.name
                assert one.tobytes() == two.tobytes(), f.name
            else:
                assert one == two, f.name
    assert [t.error for t in read_trajectories(path, lost=True)] == ["node gone"]
    assert [t.sample for t in read_trajectories(path, uids=["r/train/1/row/2"])] == [2]


def test_further_calls_of_a_turn_are_kept_in_both_files(tmp_path: Path) -> None:
    t = trajectory()
    first = t.turns[0]
    assert first.call is not None
    more = replace(t, turns=(replace(first, further_calls=(replace(first.call, code="y"), first.call)), t.turns[1]))
    (row,) = read_rows(write_rollouts(tmp_path, [group(more)], step=1, decode=decode))
    assert [c["code"] for c in row["turns"][0]["further_calls"]] == ["y", "x = 1\nx + 1"]
    assert row["tool_calls"] == 3
    (back,) = read_trajectories(write_trajectories_parquet(tmp_path, [group(more)], step=1))
    assert back.turns == more.turns


def test_many_trajectories_stream_in_order_and_any_parquet_reader_sees_the_arrays(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    many = []
    for sample in range(150):  # more than two batches of the reader
        n = int(rng.integers(0, 50))
        ids = rng.integers(0, 1000, n).astype(np.int32)
        many.append(
            trajectory(
                sample,
                ids=ids,
                mask=rng.random(n) < 0.5,
                behaviour_logprobs=rng.normal(size=n).astype(np.float32),
                versions=ids,
                turns=(),
            )
        )
    path = write_trajectories_parquet(tmp_path, [group(*many)], step=1)
    back = list(read_trajectories(path))
    assert [t.sample for t in back] == list(range(150))
    assert all(np.array_equal(a.ids, b.ids) and np.array_equal(a.mask, b.mask) for a, b in zip(many, back, strict=True))
    table = pq.read_table(path, columns=["uid", "ids", "lost", "step"])
    assert table["ids"][149].as_py() == many[149].ids.tolist()


def test_no_groups_make_an_empty_file_that_reads(tmp_path: Path) -> None:
    assert list(read_trajectories(write_trajectories_parquet(tmp_path, [], step=1))) == []
    assert list(read_rows(write_rollouts(tmp_path, [], step=1, decode=decode))) == []


def test_step_files_are_in_numeric_order_and_others_are_ignored(tmp_path: Path) -> None:
    for name in ("10.jsonl", "9.jsonl", "100.jsonl", "notes.jsonl", "9.jsonl.bak", ".11.jsonl.partial"):
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "11.jsonl").mkdir()
    assert [step for step, _ in rollout_files(tmp_path)] == [9, 10, 100]
    assert [step for step, _ in rollout_files(tmp_path, step_min=10, step_max=99)] == [10]
    with pytest.raises(DataError, match="is not a directory"):
        rollout_files(tmp_path / "missing")


def test_a_torn_line_is_an_error_that_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "1.jsonl"
    path.write_text('{"a": 1}\n{"a": 2\n')
    with pytest.raises(DataError, match=r"1\.jsonl, line 2: not JSON"):
        list(read_rows(path))
    (tmp_path / "2.jsonl").write_bytes(b'{"a": 1}\n{"a": "\xff"}\n[3]\n')
    with pytest.raises(DataError, match=r"2\.jsonl, line 2: not UTF-8 \(invalid start byte at byte 7\)"):
        list(read_rows(tmp_path / "2.jsonl"))
    skipped: list[str] = []
    assert list(read_rows(tmp_path / "2.jsonl", on_bad_line=skipped.append)) == [{"a": 1}]
    assert skipped[1].endswith("line 3: a JSON list, not an object")
    seen: list[str] = []
    assert list(read_rows(path, on_bad_line=seen.append)) == [{"a": 1}]
    assert len(seen) == 1


def test_average_scores_agree_with_the_reference_on_its_own_files(tmp_path: Path) -> None:
    expected = json.loads((GOLDEN / "expected.json").read_text())
    verdicts = {
        step: iter([v for v in values if not isinstance(v, str)]) for step, values in expected["per_row"].items()
    }

    asked: list[tuple[str, str]] = []

    def replay(text: str, truth: str) -> bool:
        """The reference's own verdict of this row; what is under test is which rows count, and the averaging."""
        asked.append((text, truth))
        return bool(next(verdicts[current[0]]))

    current = [""]
    table_csv: dict[str, dict[int, float]] = {}
    for step in ("0", "10", "20"):
        current[0] = step
        # one step at a time, so that the replayed verdicts stay in step with the rows
        single = average_scores(_only(tmp_path / step, step), verify=replay, sources=("aime2025", "hmmt25"))
        for source, by_step in single.scores.items():
            table_csv.setdefault(source, {}).update(by_step)
        if step == "10":
            assert dict(single.skipped) == {"source": 1, "not JSON": 1, "no ground truth": 1}
            assert single.rows == {"aime2025": {10: 9}, "hmmt25": {10: 8}}
    for name, lines in expected["csv"].items():
        source = name.removesuffix(".csv")
        assert table_csv[source] == {int(line["step"]): float(line["avg_score"]) for line in lines}
    assert all(len(text) <= 500 for text, _ in asked)
    assert {"070", "5"} <= {truth for _, truth in asked}


def _only(folder: Path, step: str) -> Path:
    folder.mkdir()
    (folder / f"{step}.jsonl").write_bytes((GOLDEN / "val" / f"{step}.jsonl").read_bytes())
    return folder


def test_with_the_real_verifier_the_curves_are_the_reference_s_byte_for_byte() -> None:
    from aster.agent.rewards import math_verify_verdict

    table = average_scores(GOLDEN / "val", verify=math_verify_verdict, sources=("aime2025", "hmmt25"))
    for name, lines in json.loads((GOLDEN / "expected.json").read_text())["csv"].items():
        want = "".join(f"{line['step']},{line['avg_score']}\n" for line in lines)
        assert table.csv(name.removesuffix(".csv")) == f"step,avg_score\n{want}"


def test_score_csv_is_the_reference_format(tmp_path: Path) -> None:
    write_validation(tmp_path, [group(trajectory(), trajectory(1), LOST)], step=0, decode=decode)
    write_validation(tmp_path, [group(trajectory(), trajectory(1), trajectory(2))], step=5, decode=decode)
    answers = iter([True, False, True, False, True])
    table = average_scores(tmp_path, verify=lambda text, truth: next(answers))
    assert table.csv("math") == f"step,avg_score\n0,0.5\n5,{2 / 3!r}\n"
    assert dict(table.skipped) == {"lost to infrastructure": 1}


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    (tmp_path / "1.jsonl").write_text('{"a": 1}\n{"a": 2}\n', "utf-8-sig")
    assert [row["a"] for row in read_rows(tmp_path / "1.jsonl")] == [1, 2]


def test_every_row_is_judged_or_counted_whatever_stands_in_it(tmp_path: Path) -> None:
    source = {"data_source": "s"}
    rows: list[dict[str, object]] = [
        source | {"ground_truth": 0},
        source | {"non_tensor_reward_model": {"ground_truth": 0}, "ground_truth": 1},
        source | {"non_tensor_reward_model": "0", "ground_truth": "0"},
        {"data_source": 7, "ground_truth": "0"},
        {"data_source": "\ud835", "ground_truth": "0"},
        {"data_source": ["s"], "ground_truth": "0"},
        source | {"non_tensor_reward_model": "0"},
        *(source | {"ground_truth": truth} for truth in ("", None, True, float("nan"), ["0"])),
    ]
    (tmp_path / "1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "[" * 3000 + "\n")
    asked: list[str] = []
    table = average_scores(tmp_path, verify=lambda text, truth: not asked.append(truth))
    assert asked == ["0"] * 5
    assert table.rows == {"s": {1: 3}, "7": {1: 1}, "\\ud835": {1: 1}}
    assert dict(table.skipped) == {"source": 1, "no ground truth": 6, "not JSON": 1}
