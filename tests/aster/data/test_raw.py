"""Raw problem sets into prompt files: columns, copies, contamination, length, and every kind of bad record."""

import itertools
import json
import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aster.agent.chat import ChatRenderer
from aster.cli import main
from aster.data.card import card
from aster.data.hub import local_files
from aster.data.prompts import INSTRUCTION, read_prompts, user_message
from aster.data.raw import Columns, Overlap, collect, fingerprint
from aster.errors import DataError
from aster.types import PromptRow

REAL = Path(os.environ.get("ASTER_TEST_DATA", "/nowhere"))
needs_real_data = pytest.mark.skipif(
    not (REAL / "aime25.parquet").is_file(), reason="ASTER_TEST_DATA names no folder with the paper's parquet files"
)
DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\nRemember to put your answer on its "
    'own line after "Answer:".'
)


def lines(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), "utf-8")
    return path


def problems(rows):
    return [r.messages[0]["content"] for r in rows]


def test_the_usual_columns_are_found_and_frames_come_off(tmp_path):
    raw = lines(
        tmp_path / "a.jsonl",
        {"problem": "What is 1+1?", "answer": 2, "id": 7},
        {"question": "What is 2+2?", "final_answer": "4"},
        {"prompt": [{"role": "user", "content": DAPO.format("What is 3+3?")}], "reward_model": {"ground_truth": "6"}},
        {"prompt": user_message("What is 4+4?"), "solution": "8"},
    )
    found = collect([raw], source="t")
    assert problems(found.rows) == [user_message(f"What is {n}+{n}?") for n in (1, 2, 3, 4)]
    assert [r.ground_truth for r in found.rows] == ["2", "4", "6", "8"]
    assert found.rows[0].row_id == "t-7"
    assert found.rows[1].row_id == f"t-{fingerprint('What is 2+2?')[:16]}"


def test_a_column_of_another_name_is_named_and_its_absence_says_how(tmp_path):
    raw = lines(tmp_path / "a.jsonl", {"aufgabe": "What is 1+1?", "loesung": {"wert": "2"}})
    with pytest.raises(
        DataError, match=r"no column problem or question .* has aufgabe, loesung: .*--columns problem=NAME"
    ):
        collect([raw], source="t")
    (row,) = collect([raw], source="t", columns=Columns(problem="aufgabe", answer="loesung.wert")).rows
    assert row.ground_truth == "2"


def test_copies_are_counted_and_two_answers_to_one_problem_drop_it(tmp_path):
    raw = lines(
        tmp_path / "a.jsonl",
        *[{"problem": "Same  problem", "answer": "1"}] * 3,
        {"problem": "same problem", "answer": "1"},
        {"problem": "Torn", "answer": "1"},
        {"problem": "Torn", "answer": "2"},
    )
    found = collect([raw], source="t")
    assert (found.records, found.copies, len(found.rows)) == (6, 4, 1)
    assert [(d.reason, d.problem) for d in found.dropped] == [("two answers", "Torn")]


def test_bad_records_are_listed_with_their_place(tmp_path):
    raw = tmp_path / "a.jsonl"
    raw.write_bytes(
        b'{"problem": "ok", "answer": "1"}\n\xff\xfe\n[1]\n{"problem": "cut\n{"problem": "", "answer": "1"}\n'
        b'{"problem": "no answer", "answer": null}\n'
    )
    found = collect([raw], source="t")
    assert len(found.rows) == 1
    assert found.reasons() == {"no answer": 1, "no problem": 1, "unreadable": 3}
    assert found.dropped[0].where == f"{raw}:1"
    assert found.dropped[0].detail.startswith("not UTF-8")


def test_a_parquet_row_that_is_not_utf8_is_listed_and_the_others_are_read(tmp_path):
    texts = pa.array([b"first", b"\xff\xfe bad", b"last"], pa.binary())
    forged = pa.Array.from_buffers(pa.string(), 3, texts.buffers())
    pq.write_table(pa.table({"problem": forged, "answer": pa.array(["1", "2", "3"])}), tmp_path / "a.parquet")
    found = collect([tmp_path / "a.parquet"], source="t")
    assert [r.ground_truth for r in found.rows] == ["1", "3"]
    assert [(d.where, d.reason) for d in found.dropped] == [(f"{tmp_path / 'a.parquet'}:1", "unreadable")]
    assert found.dropped[0].detail.startswith("not UTF-8: invalid start byte")


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("so " * 200 + r"\boxed{3} and \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"We add $2+3$ and get $\boxed{5}$.", "5"),
        (r"\boxed{ 5 }", "5"),
        (r"\boxed{x^{2^{3}}}", "x^{2^{3}}"),
        ("2+3=5\n#### 5", "5"),
        ("a\n#### 1\nb\n####  2\n", "2"),
        ("5", "5"),
    ],
)
def test_a_worked_solution_gives_the_answer_in_its_last_box_or_last_line(tmp_path, solution, answer):
    raw = lines(tmp_path / "a.jsonl", {"problem": "p", "solution": solution})
    assert collect([raw], source="t").rows[0].ground_truth == answer


@pytest.mark.parametrize(
    "solution", ["2+3=5\nThe answer is 5.", "#### 5\nso", r"the answer is \boxed 5", r"\boxed{5", "x" * 401]
)
def test_a_worked_solution_without_a_clear_answer_is_dropped(tmp_path, solution):
    raw = lines(tmp_path / "a.jsonl", {"problem": "p", "solution": solution})
    assert collect([raw], source="t").reasons() == {"answer is a text": 1}


def test_a_truncated_or_foreign_file_is_an_error_that_names_it(tmp_path):
    whole = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"problem": "p", "answer": "1"}] * 100), whole)
    (tmp_path / "b.parquet").write_bytes(whole.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"b\.parquet is not a readable parquet file"):
        collect([tmp_path / "b.parquet"], source="t")
    with pytest.raises(DataError, match=r"unknown kind of file '\.csv'"):
        collect([lines(tmp_path / "a.csv", {})], source="t")


def test_an_id_that_is_taken_is_replaced_by_the_hash(tmp_path):
    raw = lines(
        tmp_path / "a.jsonl", {"id": 1, "problem": "a", "answer": "1"}, {"id": 1, "problem": "b", "answer": "1"}
    )
    found = collect([raw], source="t")
    first, second = found.rows
    assert found.renamed == 1
    assert (first.row_id, second.row_id) == ("t-1", f"t-{fingerprint('b')[:16]}")


def test_contamination_is_a_share_of_the_evaluation_problem_and_names_it(tmp_path):
    aime = PromptRow(
        "aime-3", ({"role": "user", "content": user_message("Find the sum of all integer bases b > 9 ok")},), "70", "a"
    )
    overlap = Overlap([aime], n=4, share=0.5)  # ten words
    assert overlap("Now FIND the sum of all, please, integer BASES: b") == "aime-3 (50% of its words)"
    assert overlap("find the sum of prime numbers below ten") == "", "four words in a row are four of ten"
    assert overlap("find the sum x of all integer y bases b 9") == "", "no four words in a row"
    assert overlap(user_message("find THE sum of all integer bases b > 9 ok")) == "aime-3 (the same problem)"
    raw = lines(tmp_path / "a.jsonl", {"problem": "Find the sum of all integer bases.", "answer": "1"})
    found = collect([raw], source="t", contaminated_by=overlap)
    assert [(d.reason, d.detail) for d in found.dropped] == [("contaminated", "aime-3 (70% of its words)")]


def test_a_short_evaluation_problem_must_be_contained_whole():
    five, four = (PromptRow(w, ({"role": "user", "content": w},), "1", "a") for w in ("a b c d e", "p q r s"))
    overlap = Overlap([five, four])
    assert overlap("x a b c d e y") == "a b c d e (100% of its words)"
    assert (overlap("x a b c d"), overlap("x p q r s y")) == ("", "")
    assert overlap("P  q r s") == "p q r s (the same problem)"


def test_a_prompt_that_is_too_long_is_listed_not_a_crash_in_step_forty(tmp_path):
    raw = lines(tmp_path / "a.jsonl", {"problem": "long " * 50, "answer": "1"}, {"problem": "short", "answer": "1"})
    found = collect(
        [raw], source="t", prompt_tokens=lambda r: len(r.messages[0]["content"].split()), max_prompt_tokens=40
    )
    assert len(found.rows) == 1
    assert found.dropped[0].reason == "too long"
    assert "above 40" in found.dropped[0].detail


def test_names_that_are_neither_file_nor_url_nor_id_say_so(tmp_path):
    with pytest.raises(DataError, match="neither a URL nor a data set's id"):
        local_files(str(tmp_path / "absent.parquet"))
    with pytest.raises(DataError, match="holds no file of the kinds"):
        local_files(str(tmp_path))


def tree(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    return folder


@pytest.mark.parametrize(
    ("there", "data"),
    [
        (["dropped.jsonl", "report.json", "sft.parquet"], ["sft.parquet"]),
        (["b.ndjson", "a.jsonl", "state.json"], ["a.jsonl", "b.ndjson"]),
        (["dataset_infos.json", "all.json"], ["all.json"]),
    ],
)
def test_a_directory_stands_for_its_data_and_not_for_what_is_said_about_it(tmp_path, there, data):
    assert [p.name for p in local_files(str(tree(tmp_path, *there)))] == data


GSM8K = [f"{c}/{s}-0000{n}-of-00002.parquet" for c in ("main", "socratic") for s in ("test", "train") for n in (0, 1)]


@pytest.mark.parametrize(
    ("there", "name", "data"),
    [
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"], "o/d", ["data/train"] * 2),
        (["train.jsonl", "test.jsonl", "dataset_infos.json"], "o/d:train", ["train"]),
        (["default/train/0000.parquet", "default/train/0001.parquet"], "o/d", ["default/train/"] * 2),
        (["train/a.parquet", "train/b.parquet", "test/c.parquet"], "o/d:train", ["train/a", "train/b"]),
        (GSM8K, "o/d:main/train", ["main/train"] * 2),
    ],
)
def test_a_data_set_is_one_split(tmp_path, monkeypatch, there, name, data):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tree(tmp_path, *there)))
    found = [str(p.relative_to(tmp_path)) for p in local_files(name)]
    assert len(found) == len(data)
    assert all(file.startswith(start) for file, start in zip(found, data, strict=True))


@pytest.mark.parametrize(
    ("there", "name", "words"),
    [
        (["data/train.parquet", "data/test.parquet"], "o/d", "has data/test, data/train: name one, e.g. o/d:data/tr"),
        (GSM8K, "o/d:train", "has not one 'train', but main/test, main/train, socratic/test, socratic/train: name one"),
        (["train.jsonl"], "o/d:rain", "has not one 'rain', but train: name one, e.g. o/d:train"),
    ],
)
def test_a_data_set_of_several_splits_is_not_read_whole(tmp_path, monkeypatch, there, name, words):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tree(tmp_path, *there)))
    with pytest.raises(DataError, match=words):
        local_files(name)


def test_a_hub_that_cannot_be_reached_is_an_error_with_a_cure(monkeypatch):
    import huggingface_hub

    def refuse(*_, **__):
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(
        DataError, match=r"open-r1/DAPO-Math-17k-Processed cannot be fetched from the hub .*give the path"
    ):
        local_files("open-r1/DAPO-Math-17k-Processed")


def test_a_url_that_cannot_be_fetched_leaves_nothing_behind(tmp_path):
    with pytest.raises(DataError, match=r"http://127\.0\.0\.1:9/x\.parquet cannot be fetched"):
        local_files("http://127.0.0.1:9/x.parquet", cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_half_a_surrogate_pair_drops_its_record_and_no_other(tmp_path):
    half = "\ud835"
    raw = lines(
        tmp_path / "a.jsonl",
        {"problem": f"What is {half}?", "answer": "1"},
        {"problem": "1+1?", "answer": half},
        {"problem": half, "answer": None},
        {"problem": "2+2?", "answer": "4", "row_id": half, "ability": half},
    )
    assert main(["prepare", "--data", str(raw), "--source", "s", "--out", str(tmp_path / "out")]) == 0
    (row,) = read_prompts([tmp_path / "out/train.parquet"])
    assert (row.ground_truth, row.row_id) == ("4", "\\ud835")
    dropped = [json.loads(line) for line in (tmp_path / "out/dropped.jsonl").read_text("utf-8").splitlines()]
    assert [(d["where"], d["reason"]) for d in dropped] == [(f"{raw}:{n}", "unreadable") for n in range(3)]
    assert dropped[0]["problem"] == f"What is {half}?"


def test_a_table_with_holes_that_pandas_wrote_has_its_integers_back(tmp_path):
    nan = float("nan")
    table = {"problem": ["a", "b", "c", "d"], "answer": [4.0, nan, 2.5, -7.0], "id": [1.0, 2.0, nan, 4.0]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    found = collect([tmp_path / "a.parquet"], source="t")
    assert [(r.row_id, r.ground_truth) for r in found.rows] == [
        ("t-1", "4"),
        (f"t-{fingerprint('c')[:16]}", "2.5"),
        ("t-4", "-7"),
    ]
    assert found.reasons() == {"no answer": 1}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("NaN", "no answer"),
        ("Infinity", "no answer"),
        ("-1e999", "no answer"),
        ("[NaN]", "no answer"),
        ("null", "no answer"),
        ("true", "answer is no text"),
        ("[false]", "answer is no text"),
    ],
)
def test_what_is_no_answer_never_becomes_one(tmp_path, answer, reason):
    (tmp_path / "a.jsonl").write_text(f'{{"problem": "a", "answer": {answer}}}\n{{"problem": "b", "answer": [8.0]}}\n')
    found = collect([tmp_path / "a.jsonl"], source="t")
    assert [r.ground_truth for r in found.rows] == ["8"]
    assert [(d.where, d.reason) for d in found.dropped] == [(f"{tmp_path}/a.jsonl:0", reason)]


def test_a_byte_order_mark_costs_no_record_and_deep_nesting_only_its_own(tmp_path):
    deep = '{"problem": ' + "[" * 3000 + "]" * 3000 + ', "answer": "1"}'
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"problem": "a", "answer": "1"}}\n{deep}\n{{"problem": "b", "answer": "2"}}\n', "utf-8-sig")
    found = collect([path], source="t")
    assert [r.ground_truth for r in found.rows] == ["1", "2"]
    assert [(d.where, d.reason) for d in found.dropped] == [(f"{path}:1", "unreadable")]
    path.write_text("", "utf-8-sig")
    assert collect([path], source="t").records == 0


def test_the_command_writes_rows_card_and_list(tmp_path, capsys):
    records = [{"problem": "What is 1+1?", "answer": "2", "id": 1}, {"problem": "2+2?", "answer": "4", "id": 1}]
    raw = lines(tmp_path / "a.jsonl", *records, {"problem": "", "answer": "2"})
    assert main(["prepare", "--data", str(raw), "--source", "mine", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "3 records: 2 rows, 0 copies, dropped: 1 no problem; 1 ids stood twice and were replaced" in said
    row, _ = read_prompts([tmp_path / "out/train.parquet"])
    assert row.data_source == "mine"
    assert json.loads((tmp_path / "out/dropped.jsonl").read_text())["reason"] == "no problem"
    assert "| mine | 2 |" in (tmp_path / "out/card.md").read_text()


def test_a_prepare_that_cannot_work_says_so(tmp_path, capsys):
    raw, empty = lines(tmp_path / "a.jsonl", {"problem": "1+1?", "answer": "2"}), lines(tmp_path / "empty.jsonl")
    array = tmp_path / "latin.json"
    array.write_bytes('[{"problem": "é"}]'.encode("latin-1"))
    for options, words in (
        (["--data", str(raw)], "--source is missing"),
        (["--data", str(empty), "--source", "s"], "empty.jsonl: no record in these files"),
        (["--data", str(array), "--source", "s"], "latin.json is not a readable JSON file"),
        (["--data", str(raw), "--source", "s", "--columns", "solution=x"], "only problem, answer and row_id can be"),
        (
            ["--data", str(raw), "--source", "s", "--columns", "problem"],
            "--columns problem must look like problem=NAME",
        ),
        (["--data", str(raw), "--source", "s", "--ngram", "0"], "--ngram 0 must be at least 1"),
        (["--data", str(raw), "--source", "s", "--overlap", "1.5"], "--overlap 1.5 must be above 0 and at most 1"),
    ):
        assert main(["prepare", "--out", str(tmp_path / "out"), *options]) == 1
        assert words in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_files_of_different_schemas_are_read_one_by_one(tmp_path):
    pq.write_table(pa.Table.from_pylist([{"question": "2+2?", "final_answer": "4"}]), tmp_path / "b.parquet")
    raw = lines(tmp_path / "a.jsonl", {"problem": "1+1?", "answer": "2"}, {"problem": "3+3?", "answer": "6", "id": 9})
    found = collect([raw, tmp_path / "b.parquet"], source="t")
    assert [r.ground_truth for r in found.rows] == ["2", "6", "4"]
    with pytest.raises(DataError, match=r"c\.jsonl:1: no column .* for the answer; the record has problem"):
        collect([lines(tmp_path / "c.jsonl", {"problem": "a", "answer": "1"}, {"problem": "b"})], source="t")


def test_a_list_of_one_answer_is_that_answer_and_of_several_is_dropped(tmp_path):
    raw = lines(
        tmp_path / "a.jsonl",
        {"problem": "a", "answer": '["$\\\\frac{1}{2}$"]'},
        {"problem": "b", "answer": ["7"]},
        {"problem": "c", "answer": '["1", "2"]'},
        {"problem": "d", "answer": [1, 2]},
        {"problem": "e", "answer": "[1, 2]"},
        {"problem": "f", "answer": {"value": 1}},
        {"problem": {"text": "g"}, "answer": "1"},
    )
    found = collect([raw], source="t")
    assert [r.ground_truth for r in found.rows] == ["$\\frac{1}{2}$", "7", "[1, 2]"]
    assert found.reasons() == {"answer is no text": 1, "no problem": 1, "several answers": 2}


@needs_real_data
def test_the_card_of_the_published_set_names_the_rows_that_were_never_judged():
    found = card(REAL / "dapo_filter_all_correct.parquet")
    assert (found.rows, found.duplicates, found.negative_answers, found.longest_answer) == (5104, 0, 70, 23)
    assert found.languages == {"English or other": 3906, "Chinese": 1198}
    assert found.answers == {"integer": 5104}
    judged = found.judged
    assert judged is not None
    assert judged.mean == pytest.approx(0.4855, abs=5e-5)
    assert {k: round(v, 3) for k, v in judged.by_language.items()} == {"English or other": 0.501, "Chinese": 0.434}
    assert judged.histogram == {
        "0": 1216,
        "1": 353,
        "2": 279,
        "3": 274,
        "4": 312,
        "5": 410,
        "5.5": 1,
        "6": 643,
        "7": 1493,
    }
    assert len(judged.never_judged) == 123


@needs_real_data
def test_preparing_the_published_set_again_gives_the_same_prompts_and_ids(tmp_path):
    source = REAL / "dapo_filter_all_correct.parquet"
    found = collect([source], source="math_dapo")
    # no two messages are equal, but 48 differ from another in blanks or case only, and two of those in the answer too
    assert (found.records, found.copies, found.reasons()) == (5104, 48, {"two answers": 2})
    published = {r.row_id: r for r in read_prompts([source])}
    assert len(found.rows) == 5104 - 48 - 2
    assert all(published[r.row_id].messages == r.messages for r in found.rows)
    assert all(published[r.row_id].ground_truth == r.ground_truth for r in found.rows)


@needs_real_data
@pytest.mark.parametrize(("name", "source"), [("aime25", "aime2025"), ("hmmt25", "hmmt25")])
def test_raw_aime_and_hmmt_become_the_published_rows(tmp_path, name, source):
    published = read_prompts([REAL / f"{name}.parquet"])
    raw = [
        {"id": record["id"], "problem": record["problem"], "answer": record["reward_model"]["ground_truth"]}
        for record in pq.read_table(REAL / f"{name}.parquet").to_pylist()
    ]
    rows = collect([lines(tmp_path / "raw.jsonl", *raw)], source=source).rows
    assert [(r.row_id, r.messages, r.ground_truth, r.data_source) for r in rows] == [
        (r.row_id, r.messages, r.ground_truth, r.data_source) for r in published
    ]


@needs_real_data
def test_the_evaluation_sets_do_not_touch_each_other():
    aime, hmmt = read_prompts([REAL / "aime25.parquet"]), read_prompts([REAL / "hmmt25.parquet"])
    overlap = Overlap(aime)
    assert all(overlap(r.messages[0]["content"]) for r in aime)
    assert not [r.row_id for r in hmmt if overlap(r.messages[0]["content"])]


@needs_real_data
def test_competition_phrases_are_no_contamination_and_a_disguised_problem_is():
    rows = read_prompts([REAL / "aime25.parquet", REAL / "hmmt25.parquet"])
    overlap = Overlap(rows)
    published = read_prompts([REAL / "dapo_filter_all_correct.parquet"])
    assert sum(bool(overlap(r.messages[0]["content"])) for r in published) == 5
    problems = [r.messages[0]["content"].removesuffix(INSTRUCTION) for r in rows]
    assert sum(bool(overlap(p[: len(p) // 2])) for p in problems) == 59
    numbers = itertools.count(2)
    disguised = [re.sub(r"\d+", lambda _: str(next(numbers)), p) for p in problems]
    assert sum(bool(overlap(p)) for p in disguised) > 48


QWEN3 = Path(os.environ.get("ASTER_QWEN3_TOKENIZER", "/nowhere"))


@pytest.fixture(scope="module")
def qwen3():
    if not (QWEN3 / "tokenizer.json").is_file():
        pytest.skip("ASTER_QWEN3_TOKENIZER names no folder with Qwen3's tokenizer.json")
    return ChatRenderer.from_model_dir(QWEN3)


@needs_real_data
@pytest.mark.parametrize(
    ("name", "summary"),
    [  # measured with another program
        ("aime25", {"mean": 347, "p50": 279, "p90": 663, "p99": 929, "max": 1002}),
        ("hmmt25", {"mean": 280, "p50": 261, "p90": 306, "p99": 669, "max": 797}),
        ("dapo_filter_all_correct", {"mean": 283, "p50": 269, "p90": 349, "p99": 541, "max": 1660}),
    ],
)
def test_the_card_counts_the_tokens_of_the_published_prompts_with_their_tool_block(qwen3, name, summary):
    found = card(REAL / f"{name}.parquet", prompt_tokens=lambda row: len(qwen3.prompt_ids(row.messages))).tokens
    assert found is not None
    assert found.summary == summary
    assert sum(found.histogram.values()) == {"aime25": 30, "hmmt25": 30}.get(name, 5104)


@needs_real_data
def test_the_published_set_is_prepared_and_its_made_up_accuracies_are_listed(tmp_path, capsys):
    source = REAL / "dapo_filter_all_correct.parquet"
    assert main(["prepare", "--data", str(source), "--source", "math_dapo", "--out", str(tmp_path / "out")]) == 0
    assert "5,104 records: 5,054 rows, 48 copies, dropped: 2 two answers" in capsys.readouterr().out
    assert main(["prepare", "--card", str(source)]) == 0
    shown = capsys.readouterr().out
    assert "**123 rows have an accuracy that no number of responses explains**" in shown
    assert "mean 0.4855 over judged rows (English or other 0.501, Chinese 0.434)" in shown
    named = shown.strip().splitlines()[-1].split(", ")
    ids = {r.row_id for r in read_prompts([source])}
    assert (len(set(named)), set(named) <= ids) == (123, True)


def test_the_original_set_of_a_hundred_copies_becomes_the_processed_one(tmp_path):
    # the original file frames every problem for "Answer:" and repeats it; the processed one has neither
    texts = {f"What is {n} + {n}?": str(2 * n) for n in range(40)} | {"求 1 + 1 的值。": "2"}
    original = [
        {
            "data_source": "math_dapo",
            "prompt": [{"content": DAPO.format(text), "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": f"uuid-{number}"},
        }
        for number, (text, answer) in enumerate(texts.items())
    ]
    pq.write_table(pa.Table.from_pylist(original * 100), tmp_path / "original.parquet")
    processed = [
        {
            "prompt": text,
            "solution": answer,
            "data_source": "math_dapo",
            "source_prompt": o["prompt"],
            "ability": "MATH",
            "reward_model": o["reward_model"],
            "extra_info": o["extra_info"],
        }
        for o, (text, answer) in zip(original, texts.items(), strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(processed), tmp_path / "processed.parquet")
    one, two = (collect([tmp_path / f"{name}.parquet"], source="math_dapo") for name in ("original", "processed"))
    assert (one.records, one.copies, two.records, two.copies) == (4100, 4059, 41, 0)
    assert one.rows == two.rows
    assert [r.row_id for r in one.rows] == [f"uuid-{n}" for n in range(41)]
    assert problems(one.rows)[0] == user_message("What is 0 + 0?")
