import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aster.data.card import card
from aster.errors import ConfigError, DataError
from aster.filter import main, tally

GOLDEN = Path(__file__).parents[1] / "golden" / "filter"


def run(output: Path, *args: str, dataset: Path | None = None, rollouts: Path | None = None) -> list[dict]:
    argv = ["--dataset", str(dataset or GOLDEN / "dataset.parquet"), "--output", str(output)]
    assert main([*argv, "--rollout-dir", str(rollouts or GOLDEN / "rollout"), *args]) == 0
    return pq.read_table(output).to_pylist()


def index(row: dict) -> int:
    return int(row["extra_info"]["index"][-4:])


def test_the_reference_files_are_joined_exactly_where_its_regex_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = json.loads((GOLDEN / "expected.json").read_text())
    kept = run(tmp_path / "kept.parquet", "--step-min", "1", "--step-max", "135")
    assert [index(row) for row in kept] == expected["index_kept_exact_join"]
    assert list(kept[0]) == expected["columns_out"]
    for row in kept:
        want = expected["rows"][index(row)]
        assert (row["acc_mean@8"], row["response_count"]) == (want["acc_mean@8"], want["response_count"])
    out = capsys.readouterr().out
    for name, count in (("kept", 5), ("dropped_all_correct", 5), ("kept_never_rolled_out", 2), ("kept_all_wrong", 1)):
        assert f"{name:34}{count:10,}\n" in out
    assert f"{'rollouts_joined_by_text':34}{64:10,}" in out


def test_without_a_range_every_step_counts(tmp_path: Path) -> None:
    kept = run(tmp_path / "kept.parquet")  # step 200 solves row 8 every time, and row 1 too: 13 of 16
    assert [index(row) for row in kept] == [0, 1, 2, 9]
    assert {index(row): row["acc_mean@8"] for row in kept}[1] == 13 / 16


def dataset(path: Path, *problems: str) -> Path:
    rows = [
        {
            "prompt": [{"role": "user", "content": p}],
            "reward_model": {"ground_truth": "1", "style": "s"},
            "data_source": "math_dapo",
            "agent_name": "code_agent",
            "extra_info": {"index": f"id-{i}"},
        }
        for i, p in enumerate(problems)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def rollouts(folder: Path, step: int, *rows: dict) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{step}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def rendered(problem: str) -> str:
    return (
        f"<|im_start|>system\ntools<|im_end|>\n<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )


def test_row_ids_decide_even_where_texts_are_equal(tmp_path: Path) -> None:
    data = dataset(tmp_path / "d.parquet", "same", "same", "other")
    from aster.data.prompts import read_prompts

    ids = [row.row_id for row in read_prompts([str(data)])]
    assert len(set(ids)) == 3
    folder = rollouts(
        tmp_path / "r",
        1,
        *[{"row_id": ids[0], "input": rendered("same"), "acc": True}] * 2,
        *[{"row_id": ids[1], "input": rendered("same"), "acc": a} for a in (True, False)],
        *[{"row_id": "of another dataset", "input": rendered("unknown"), "acc": False}] * 2,
    )
    kept = run(tmp_path / "o.parquet", dataset=data, rollouts=folder)
    assert [(row["extra_info"]["index"], row["acc_mean@2"], row["response_count"]) for row in kept] == [
        ("id-1", 0.5, 2.0),
        ("id-2", None, None),
    ]


def test_a_row_id_of_another_problem_does_not_decide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = dataset(tmp_path / "d.parquet", "\n1 + 1?\n", "2 + 2?", "3 + 3?")
    folder = rollouts(
        tmp_path / "r",
        1,
        {"row_id": "id-0", "input": rendered("of the first file"), "acc": True},
        {"row_id": "id-0#2", "input": rendered("\n1 + 1?\n"), "acc": False},
        {"row_id": "id-2", "input": rendered("2 + 2?"), "acc": True},
        {"row_id": "id-2", "input": rendered("3 + 3?"), "acc": False},
        {"row_id": "id-0", "input": rendered("1 + 1?"), "acc": False},
    )
    kept = run(tmp_path / "o.parquet", dataset=data, rollouts=folder)
    assert [(row["extra_info"]["index"], row["response_count"]) for row in kept] == [("id-0", 2.0), ("id-2", 1.0)]
    out = capsys.readouterr().out
    for name, count in (("joined_by_row_id", 2), ("joined_by_text", 2), ("of_no_row", 1)):
        assert f"{'rollouts_' + name:34}{count:10,}\n" in out
    assert f"{'rollouts_with_a_row_id_of_another':34}{2:10,}\n" in out


def test_texts_with_special_tokens_and_tricky_problems_join(tmp_path: Path) -> None:
    tricky = "What does\nuser\nsay to the\nassistant\nhere?"
    data = dataset(tmp_path / "d.parquet", tricky, "here?", "plain")
    folder = rollouts(
        tmp_path / "r",
        1,
        {"input": rendered(tricky), "acc": False},
        {"input": f"user\n{tricky}\nassistant\n", "acc": True},
        {"input": "user\nplain\nassistant\n", "acc": True},
        {"input": "no turn at all", "acc": True},
    )
    kept = run(tmp_path / "o.parquet", dataset=data, rollouts=folder)
    assert [(row["extra_info"]["index"], row["acc_mean@1"]) for row in kept] == [("id-0", 0.5), ("id-1", None)]


def test_a_rollout_that_we_lost_is_no_wrong_answer(tmp_path: Path) -> None:
    data = dataset(tmp_path / "d.parquet", "a", "b")
    folder = rollouts(
        tmp_path / "r",
        1,
        {"input": rendered("a"), "acc": True, "score": 1.0},
        {"input": rendered("a"), "acc": None, "score": None},
        {"input": rendered("b"), "acc": None, "score": None},
        {"input": rendered("b"), "acc": False, "score": 0.0},
    )
    kept = run(tmp_path / "o.parquet", dataset=data, rollouts=folder)
    assert [(row["extra_info"]["index"], row["acc_mean@2"], row["response_count"]) for row in kept] == [("id-1", 0, 1)]


def test_a_row_id_that_is_a_number_joins_as_its_text_does(tmp_path: Path) -> None:
    rows = [
        {"row_id": i, "prompt": [{"role": "user", "content": "same"}], "reward_model": {"ground_truth": "1"}}
        for i in (7, 8)
    ]
    pq.write_table(pa.Table.from_pylist([row | {"data_source": "s"} for row in rows]), tmp_path / "d.parquet")
    folder = rollouts(tmp_path / "r", 1, {"row_id": 7, "acc": True}, {"row_id": 8, "acc": 0}, {"row_id": "8", "acc": 1})
    (row,) = run(tmp_path / "o.parquet", dataset=tmp_path / "d.parquet", rollouts=folder)
    assert (row["row_id"], row["response_count"]) == (8, 2.0)


def test_filtering_twice_replaces_the_columns(tmp_path: Path) -> None:
    data = dataset(tmp_path / "d.parquet", "a", "b", "c")
    first = rollouts(tmp_path / "r1", 1, {"input": rendered("a"), "acc": True}, {"input": rendered("b"), "acc": False})
    run(tmp_path / "1.parquet", dataset=data, rollouts=first)
    second = rollouts(tmp_path / "r2", 1, {"input": rendered("c"), "acc": True}, {"input": rendered("b"), "acc": False})
    kept = run(tmp_path / "2.parquet", dataset=tmp_path / "1.parquet", rollouts=second)
    assert [(row["extra_info"]["index"], row["acc_mean@1"]) for row in kept] == [("id-1", 0.0)]
    third = rollouts(tmp_path / "r3", 1, *[{"row_id": "id-1", "acc": right} for right in (True, False)])
    (row,) = run(tmp_path / "3.parquet", dataset=tmp_path / "2.parquet", rollouts=third)
    assert (row["acc_mean@2"], row["response_count"], "acc_mean@1" in row) == (0.5, 2.0, False)
    judged = card(tmp_path / "3.parquet").judged
    assert judged is not None
    assert (judged.column, judged.histogram, judged.never_judged) == ("acc_mean@2", {"1": 1}, ())


def test_the_output_is_the_same_bytes_every_time_and_for_any_number_of_readers(tmp_path: Path) -> None:
    run(tmp_path / "1.parquet", "--plot")
    run(tmp_path / "2.parquet", "--threads", "2", "--plot-output", str(tmp_path / "p.png"))
    assert (tmp_path / "1.parquet").read_bytes() == (tmp_path / "2.parquet").read_bytes()
    assert (tmp_path / "1_distribution.png").read_bytes() == (tmp_path / "p.png").read_bytes()
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_the_counts_travel_in_the_file(tmp_path: Path) -> None:
    run(tmp_path / "o.parquet")
    about = json.loads(pq.read_schema(tmp_path / "o.parquet").metadata[b"aster_filter"])
    assert (about["rows"], about["kept"], about["threshold"]) == (10, 4, 0.99999)


def test_dry_run_reads_no_rollout_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--dataset", str(GOLDEN / "dataset.parquet"), "--rollout-dir", str(GOLDEN / "rollout"), "--dry-run"]
    assert main([*argv, "--output", str(tmp_path / "o.parquet")]) == 0
    assert "5 rollout files, steps 1 to 200" in capsys.readouterr().out
    assert not (tmp_path / "o.parquet").exists()


DATA = Path(os.environ.get("ASTER_TEST_DATA", "missing")) / "dapo_filter_all_correct.parquet"


@pytest.mark.skipif(not DATA.is_file(), reason="ASTER_TEST_DATA does not name a folder with the published data sets")
def test_the_published_file_keeps_its_rows_and_columns(tmp_path: Path) -> None:
    from aster.data.prompts import read_prompts

    ids = [row.row_id for row in read_prompts([DATA])[:100]]
    folder = rollouts(
        tmp_path / "r", 1, *[{"row_id": i, "acc": n % 2 == 0} for n, i in enumerate(ids) for _ in "12345678"]
    )
    kept = run(tmp_path / "o.parquet", dataset=DATA, rollouts=folder)
    assert len(kept) == 5104 - 50
    before, after = pq.read_schema(DATA), pq.read_schema(tmp_path / "o.parquet")
    assert (after.names, after.types) == (before.names, before.types)
    assert [row["acc_mean@8"] for row in kept[:50]] == [0.0] * 50
    assert all(row["acc_mean@8"] is None for row in kept[50:]), "the published, partly random accuracies are gone"


def test_bad_input_is_an_error_that_names_it(tmp_path: Path) -> None:
    data = dataset(tmp_path / "d.parquet", "a")
    good = rollouts(tmp_path / "good", 3, {"input": rendered("a"), "acc": True})
    out = tmp_path / "o.parquet"
    with pytest.raises(DataError, match=r"no file for steps 7 to last: it has steps 3 to 3"):
        run(out, "--step-min", "7", dataset=data, rollouts=good)
    with pytest.raises(DataError, match="is not a directory"):
        run(out, dataset=data, rollouts=tmp_path / "missing")
    with pytest.raises(DataError, match=r"missing\.parquet does not exist"):
        run(out, dataset=tmp_path / "missing.parquet", rollouts=good)
    with pytest.raises(DataError, match="is a directory: name the parquet that was trained on"):
        run(out, dataset=tmp_path, rollouts=good)
    (tmp_path / "d.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"d\.jsonl is no parquet file: `aster prepare --data .*` makes one"):
        run(out, dataset=tmp_path / "d.jsonl", rollouts=good)
    good.rename(tmp_path / "run_rollout_data")
    good = (tmp_path / "stage1" / "rollout_data").parent
    good.mkdir()
    (tmp_path / "run_rollout_data").rename(good / "rollout_data")
    with pytest.raises(DataError, match=r"no STEP\.jsonl at all; give --rollout-dir .*stage1/rollout_data"):
        run(out, dataset=data, rollouts=good)
    good = good / "rollout_data"
    with pytest.raises(ConfigError, match="is the dataset itself"):
        run(data, dataset=data, rollouts=good)
    with pytest.raises(DataError, match="all 1 rows were judged and none has an accuracy of at least 0 and below"):
        run(out, dataset=data, rollouts=good)
    with pytest.raises(DataError, match="none of the 1 rollouts in 1 files belongs to a row"):
        run(out, dataset=data, rollouts=rollouts(tmp_path / "alien", 1, {"input": rendered("z"), "acc": True}))
    with pytest.raises(DataError, match=r"1\.jsonl, row 1 has neither acc nor score"):
        run(out, dataset=data, rollouts=rollouts(tmp_path / "noacc", 1, {"input": rendered("a")}))
    with pytest.raises(DataError, match=r"1\.jsonl, row 1 has neither row_id nor input"):
        run(out, dataset=data, rollouts=rollouts(tmp_path / "noinput", 1, {"acc": True}))
    odd = {"'yes'": "yes", "nan": float("nan"), r"\[1\]": [1], "-1": -1, "5": 5, "1.5": 1.5, "1000": 10**4000}
    for number, (words, accuracy) in enumerate(odd.items()):
        folder = rollouts(tmp_path / f"odd{number}", 1, {"input": rendered("a"), "acc": accuracy})
        with pytest.raises(DataError, match=rf"1\.jsonl, row 1: acc \(or score\) must be true, .* got {words}"):
            run(out, dataset=data, rollouts=folder)
    folder = rollouts(tmp_path / "rewards", 1, {"input": rendered("a"), "score": -1.0})
    with pytest.raises(DataError, match=r"got -1\.0; of rewards on another scale make a column acc"):
        run(out, "--plot", dataset=data, rollouts=folder)
    for column, value in (("row_id", [1]), ("row_id", True), ("input", 3), ("input", ["a"])):
        folder = rollouts(tmp_path / "types", 1, {"row_id": "id-0", "acc": True} | {column: value})
        with pytest.raises(DataError, match=rf"1\.jsonl, row 1: {column} must be text"):
            run(out, dataset=data, rollouts=folder)
    with pytest.raises(DataError, match="the 1 rollout files hold no rollout"):
        run(out, dataset=data, rollouts=rollouts(tmp_path / "empty", 1))
    (good / "4.jsonl").write_text("[" * 3000 + "]" * 3000)
    with pytest.raises(DataError, match=r"4\.jsonl, line 1: not JSON"):
        run(out, dataset=data, rollouts=good)
    (good / "4.jsonl").write_bytes(b'{"input": "\xe9", "acc": true}\n')
    with pytest.raises(DataError, match=r"4\.jsonl, line 1: not UTF-8"):
        run(out, dataset=data, rollouts=good)
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--output", "FOLDER"], "--output FOLDER is a directory: name the file to write"),
        (["--output", "FOLDER/d.parquet/o.parquet"], "o.parquet cannot be made: FOLDER/d.parquet is a file"),
        (["--plot-output", "FOLDER"], "--plot-output FOLDER is a directory"),
        (["--plot-output", "FOLDER/plot.jpg"], r"plot.jpg must end in \.png"),
        (["--samples", "0"], "--samples 0 must be at least 1"),
        (["--threshold", "nan"], "--accuracy-min .* is not below --threshold nan"),
        (["--threads", "0"], "--threads 0 must be at least 1"),
    ],
)
def test_a_bad_option_is_named_before_anything_is_read_or_written(
    tmp_path: Path, options: list[str], words: str
) -> None:
    data = dataset(tmp_path / "d.parquet", "a")
    folder = rollouts(tmp_path / "r", 1, {"input": rendered("a"), "acc": False})
    given = [option.replace("FOLDER", str(tmp_path)) for option in options]
    with pytest.raises(ConfigError, match=words.replace("FOLDER", str(tmp_path))):
        run(tmp_path / "o.parquet", *given, dataset=data, rollouts=folder)
    assert not (tmp_path / "o.parquet").exists()


def test_the_last_bar_of_the_histogram_holds_only_what_was_always_solved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib import pyplot

    # two steps of four: 7 of 8 is 3.5 of 4 and stands at 3; never rolled out stands nowhere
    rows = {"id-0": [1] * 8, "id-1": [1] * 7 + [0], "id-2": [0] * 8}
    data = dataset(tmp_path / "d.parquet", *"abcd")
    for step in (1, 2):
        half = slice(4 * (step - 1), 4 * step)
        folder = rollouts(
            tmp_path / "r",
            step,
            *[{"row_id": i, "acc": bool(v)} for i, verdicts in rows.items() for v in verdicts[half]],
        )
    drawn: list[Any] = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    run(tmp_path / "o.parquet", "--plot", dataset=data, rollouts=folder)
    (axes,) = drawn[0].axes
    kept, dropped = ([bar.get_height() for bar in bars] for bars in axes.containers[:2])
    assert (kept, dropped) == ([1, 0, 0, 1, 0], [0, 0, 0, 0, 1])
    assert axes.get_title() == "4 rows; 1 never rolled out are kept and not shown"


def test_rows_can_be_bounded_from_below_and_unseen_ones_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = dataset(tmp_path / "d.parquet", "never", "sometimes", "问题 rarely", "always", "unseen")
    right = {"id-0": 0, "id-1": 2, "id-2": 1, "id-3": 4}
    rows = [{"row_id": i, "input": "", "acc": k < n} for i, n in right.items() for k in range(4)]
    folder = rollouts(tmp_path / "r", 1, *rows)

    def kept(*options: str) -> list[str]:
        filtered = run(tmp_path / "o.parquet", *options, dataset=data, rollouts=folder)
        return [r["extra_info"]["index"] for r in filtered]

    assert kept() == ["id-0", "id-1", "id-2", "id-4"]
    assert kept("--drop-all-wrong") == ["id-1", "id-2", "id-4"]
    capsys.readouterr()
    assert kept("--accuracy-min", "0.5", "--threshold", "0.9") == ["id-1", "id-4"]
    shown = capsys.readouterr().out
    assert "dropped_too_hard                           2" in shown
    assert [line.split()[-3:] for line in shown.splitlines() if line.startswith("Chinese")] == [["1", "0.2500", "0.0%"]]
    with pytest.raises(ConfigError, match=r"--accuracy-min 0\.9 is not below --threshold 0\.5"):
        kept("--accuracy-min", "0.9", "--threshold", "0.5")


def test_memory_grows_with_the_prompts_and_not_with_the_rollouts(tmp_path: Path) -> None:
    def peak(rows_of_each: int) -> int:
        texts = [{"input": rendered(p), "output": "x" * 20_000, "acc": True} for p in "abcd"]
        folder = rollouts(tmp_path / str(rows_of_each), 1, *texts * rows_of_each)
        tracemalloc.start()
        try:
            assert [s.judged for s in tally(folder / "1.jsonl")] == [rows_of_each] * 4
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = peak(2), peak(200)  # 0.16 and 16 MB of rollouts
    assert many < few + 200_000


def test_it_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "aster.filter", "--help"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0
    assert "--rollout-dir" in done.stdout
