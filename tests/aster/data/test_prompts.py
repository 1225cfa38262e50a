"""Prompt files: the three real ones read, ids are stable and unique, and the order resumes exactly."""

import os
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aster.data.prompts import PromptStream, read_prompts, write_prompts
from aster.data.tasks import draw_problems, to_row
from aster.errors import DataError
from aster.types import PromptRow

REAL = Path(os.environ.get("ASTER_TEST_DATA", ""))
needs_real_data = pytest.mark.skipif(
    not os.environ.get("ASTER_TEST_DATA"), reason="ASTER_TEST_DATA names no folder with the paper's parquet files"
)


def rows(number):
    return [PromptRow(f"r{i}", ({"role": "user", "content": f"{i}?"},), str(i), "test") for i in range(number)]


def record(text="1+1?", **more):
    base = {
        "prompt": [{"role": "user", "content": text}],
        "reward_model": {"ground_truth": "2", "style": "x"},
        "data_source": "test",
    }
    return base | more


def parquet(path, records):
    pq.write_table(records if isinstance(records, pa.Table) else pa.Table.from_pylist(records), path)
    return path


@needs_real_data
@pytest.mark.parametrize(
    ("name", "number", "source", "first_answer"),
    [
        ("aime25", 30, "aime2025", "70"),
        ("hmmt25", 30, "hmmt25", "103"),
        ("dapo_filter_all_correct", 5104, "math_dapo", "34"),
    ],
)
def test_the_paper_s_files_read(name, number, source, first_answer):
    found = read_prompts([REAL / f"{name}.parquet"])
    assert len(found) == len({r.row_id for r in found}) == number
    assert {r.data_source for r in found} == {source}
    assert found[0].ground_truth == first_answer
    assert all(r.messages[0]["content"].startswith("\n") and len(r.messages) == 1 for r in found)
    assert all("tools_kwargs" not in r.extra for r in found), "the answer would travel with the row"


@needs_real_data
def test_real_ids_are_the_file_s_own_and_the_same_at_every_reading():
    dapo = REAL / "dapo_filter_all_correct.parquet"
    assert read_prompts([dapo], max_rows=1)[0].row_id == "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079"
    assert [r.row_id for r in read_prompts([dapo])] == [r.row_id for r in read_prompts([dapo])]


def test_written_rows_read_back_with_their_ids(tmp_path):
    before = [to_row(p) for p in draw_problems(20, seed=0, heldout=False)]
    write_prompts(tmp_path / "deep" / "rows.parquet", before)
    after = read_prompts([tmp_path / "deep" / "rows.parquet"])
    assert [(r.row_id, r.messages, r.ground_truth, r.data_source, r.agent_name) for r in after] == [
        (r.row_id, r.messages, r.ground_truth, r.data_source, r.agent_name) for r in before
    ]


def test_an_id_comes_from_row_id_then_index_then_id_then_the_prompt(tmp_path):
    full = record(row_id="own", extra_info={"index": "idx"}, id=7)
    index = record(extra_info={"index": "idx"}, id=7)
    own_id = record(id=7)
    ids = [
        read_prompts([parquet(tmp_path / f"{i}.parquet", [r])])[0].row_id for i, r in enumerate([full, index, own_id])
    ]
    assert ids == ["own", "idx", "test-7"]
    hashed = [read_prompts([parquet(tmp_path / f"h{t}.parquet", [record(t)])])[0].row_id for t in ("a", "b")]
    assert hashed[0] != hashed[1]
    assert hashed[0] == read_prompts([tmp_path / "ha.parquet"])[0].row_id


def test_duplicates_are_numbered_in_order_of_appearance(tmp_path):
    path = parquet(tmp_path / "twice.parquet", [record(row_id="a"), record(row_id="b"), record(row_id="a")])
    assert [r.row_id for r in read_prompts([path])] == ["a", "b", "a#2"]
    assert [r.row_id for r in read_prompts([path, path])] == ["a", "b", "a#2", "a#3", "b#2", "a#4"]


def test_a_suffix_that_the_file_itself_uses_is_passed_over(tmp_path):
    for order, ids in ((["a#2", "a", "a"], ["a#2", "a", "a#3"]), (["a", "a", "a#2"], ["a", "a#2", "a#2#2"])):
        path = parquet(tmp_path / "ids.parquet", [record(row_id=i) for i in order])
        assert [r.row_id for r in read_prompts([path])] == ids


def test_files_of_different_columns_read_together(tmp_path):
    first = parquet(tmp_path / "1.parquet", [record(row_id="own", ability="MATH")])
    second = parquet(tmp_path / "2.parquet", [record(extra_info={"index": "idx"}, id=3)])
    assert [r.row_id for r in read_prompts([first, second])] == ["own", "idx"]


def test_broken_pages_under_a_sound_footer_are_an_error(tmp_path):
    path = parquet(tmp_path / "pages.parquet", [record(str(n) * 50) for n in range(500)])
    content = bytearray(path.read_bytes())
    content[4:400] = bytes(396)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"pages\.parquet is not a readable parquet file"):
        read_prompts([path])


def test_bad_files_are_named_with_the_cure(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.parquet does not exist"):
        read_prompts([tmp_path / "nowhere.parquet"])
    with pytest.raises(DataError, match="is a directory: name the parquet file in it"):
        read_prompts([tmp_path])
    (tmp_path / "raw.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"raw\.jsonl is no parquet file: `aster prepare --data .*raw\.jsonl"):
        read_prompts([tmp_path / "raw.jsonl"])
    (tmp_path / "text.parquet").write_text("not parquet")
    with pytest.raises(DataError, match=r"text\.parquet is not a readable parquet"):
        read_prompts([tmp_path / "text.parquet"])
    lacking = {k: v for k, v in record().items() if k != "reward_model"}
    with pytest.raises(DataError, match=r"lacks the columns \['reward_model'\]"):
        read_prompts([parquet(tmp_path / "lacking.parquet", [lacking])])
    with pytest.raises(DataError, match=r"no rows in .*empty\.parquet"):
        read_prompts([parquet(tmp_path / "empty.parquet", pa.Table.from_pylist([record()]).slice(1))])
    for name, wrong, words in (
        ("text", {"prompt": "1+1?"}, r"row 0: prompt must be a list of messages with a role and a text, got '1\+1\?'"),
        ("void", {"prompt": [{"role": "user", "content": None}]}, "prompt must be a list of messages"),
        ("none", {"prompt": []}, "row 0: column prompt is empty"),
        ("truth", {"reward_model": "2"}, "reward_model must be a struct with ground_truth, got str"),
    ):
        with pytest.raises(DataError, match=words):
            read_prompts([parquet(tmp_path / f"{name}.parquet", [record(**wrong)])])
    with pytest.raises(DataError, match=r"row 1: reward_model\.ground_truth is missing"):
        read_prompts([parquet(tmp_path / "hole.parquet", [record(), record(reward_model={"ground_truth": None})])])


def test_a_stream_shows_every_row_once_an_epoch_and_drops_the_last_incomplete_batch():
    stream = PromptStream(rows(10), batch=3, seed=1, epochs=2)
    assert stream.total_steps == 6
    epochs = [[stream.take().row_id for _ in range(9)] for _ in range(2)]
    assert all(max(Counter(e).values()) == 1 for e in epochs)
    assert epochs[0] != epochs[1], "each epoch has its own order"
    assert stream.epoch == 2


def test_total_steps_of_the_paper_s_first_stage():
    assert PromptStream(rows(17398), batch=128, seed=1, epochs=3).total_steps == 405


def test_a_stream_resumes_in_the_middle_of_an_epoch_with_the_same_rows():
    whole = PromptStream(rows(10), batch=3, seed=1, epochs=3)
    expected = [whole.take() for _ in range(27)]
    first = PromptStream(rows(10), batch=3, seed=1, epochs=3)
    got = [first.take() for _ in range(11)]
    for row in got:
        first.done(row)
    second = PromptStream(rows(10), batch=3, seed=1, epochs=3)
    second.load_state_dict(first.state_dict())
    assert got + [second.take() for _ in range(16)] == expected


def test_rows_that_were_taken_and_not_finished_come_first_after_a_restart_and_once():
    first = PromptStream(rows(6), batch=2, seed=1, epochs=3)
    a, b, c, d = (first.take() for _ in range(4))
    first.done(c)  # out of order: c was faster than a and b
    second = PromptStream(rows(6), batch=2, seed=1, epochs=3)
    second.load_state_dict(first.state_dict())
    second.done(second.take())  # a; killed again with b and d still waiting to be taken
    third = PromptStream(rows(6), batch=2, seed=1, epochs=3)
    third.load_state_dict(second.state_dict())
    rest = [third.take() for _ in range(4)]
    assert [r.row_id for r in rest[:2]] == [b.row_id, d.row_id]
    assert {r.row_id for r in (a, b, c, d, *rest)} == {r.row_id for r in rows(6)}


def test_a_row_that_is_open_twice_is_finished_once_at_a_time():
    stream = PromptStream(rows(2), batch=2, seed=1, epochs=2)
    row = stream.take()
    others = [stream.take() for _ in range(3)]
    assert row.row_id in {r.row_id for r in others}
    stream.done(row)
    assert stream.state_dict()["open"] == [r.row_id for r in others]


def test_a_stream_refuses_a_state_of_other_data():
    state = PromptStream(rows(10), batch=3, seed=1, epochs=1).state_dict()
    with pytest.raises(DataError, match=r"seed was 1, is 2"):
        PromptStream(rows(10), batch=3, seed=2, epochs=1).load_state_dict(state)
    with pytest.raises(DataError, match="rows was"):
        PromptStream(rows(11), batch=3, seed=1, epochs=1).load_state_dict(state)


def test_too_few_rows_for_one_step_are_refused_with_the_numbers():
    with pytest.raises(DataError, match=r"2 prompts do not fill .*prompts_per_step=3"):
        PromptStream(rows(2), batch=3, seed=1, epochs=1)
