"""Three ways to write the same conversation become the same messages; what cannot be read is named."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aster.data.conversations import read_conversations
from aster.errors import DataError

CODE = "print(6 * 7)"
CALL = {"name": "code_interpreter", "arguments": {"code": CODE}}
EXPECTED = [
    {"role": "system", "content": "Be exact."},
    {"role": "user", "content": "6 * 7?"},
    {"role": "assistant", "content": "", "reasoning_content": "I ask.", "tool_calls": [CALL]},
    {"role": "tool", "content": "42\n"},
    {"role": "assistant", "content": "\\boxed{42}", "reasoning_content": "Good.", "tool_calls": []},
]
REFERENCE = {
    "conversations": [
        {"role": "system", "content": "Be exact."},
        {"role": "user", "content": "6 * 7?"},
        {"role": "function", "content": f"<think>\nI ask.\n</think>\n\n{json.dumps(CALL)}"},
        {"role": "tool", "content": "42\n"},
        {"role": "assistant", "content": "<think>\nGood.\n</think>\n\n\\boxed{42}"},
    ],
    "tools": "[]",
}
TAGS = {"system": "system", "user": "human", "function": "function_call", "tool": "observation", "assistant": "gpt"}
SHAREGPT = {"conversations": [{"from": TAGS[m["role"]], "value": m["content"]} for m in REFERENCE["conversations"]]}
OPENAI = {
    "messages": [
        {"role": "developer", "content": "Be exact."},
        {"role": "user", "content": [{"type": "text", "text": "6 * "}, {"type": "text", "text": "7?"}]},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "I ask.",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": CALL | {"arguments": json.dumps(CALL["arguments"])}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "42\n"},
        {"role": "assistant", "content": "\\boxed{42}", "reasoning_content": "Good."},
    ]
}


def lines(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), "utf-8")
    return path


@pytest.mark.parametrize("record", [REFERENCE, SHAREGPT, OPENAI], ids=["reference", "sharegpt", "openai"])
def test_every_format_gives_the_same_messages(tmp_path, record):
    assert read_conversations([lines(tmp_path / "a.jsonl", record)]) == [EXPECTED]


def test_the_reference_parquet_is_read(tmp_path):
    pq.write_table(pa.Table.from_pylist([REFERENCE, REFERENCE]), tmp_path / "train.parquet")
    assert read_conversations([tmp_path / "train.parquet"]) == [EXPECTED, EXPECTED]


def test_parquet_fills_structs_with_nulls_that_mean_nothing(tmp_path):
    # arguments as structs: the second call's `timeout` gives the first one a null of that name
    calls = [{"function": {"name": "code_interpreter", "arguments": a}} for a in ({"code": "1"}, {"timeout": 3})]
    talk = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "t", "tool_calls": calls},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "1"},
    ]
    pq.write_table(pa.Table.from_pylist([{"messages": talk}]), tmp_path / "a.parquet")
    [(_, turn, _, last)] = read_conversations([tmp_path / "a.parquet"])
    assert [c["arguments"] for c in turn["tool_calls"]] == [{"code": "1"}, {"timeout": 3}]
    assert last == {"role": "assistant", "content": "1", "reasoning_content": "", "tool_calls": []}


def test_files_of_different_formats_can_stand_side_by_side(tmp_path):
    raw = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "hm\n</think>\n\n1"}]}
    files = [lines(tmp_path / "raw.jsonl", raw), lines(tmp_path / "openai.jsonl", OPENAI)]
    first, second = read_conversations(files)
    assert first == raw["messages"], "a raw turn stays as it is"
    assert second == EXPECTED


def test_a_plain_chat_can_be_declared_openai(tmp_path):
    chat = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "1"}]}
    [(_, turn)] = read_conversations([lines(tmp_path / "a.jsonl", chat)], form="openai")
    assert turn == {"role": "assistant", "content": "1", "reasoning_content": "", "tool_calls": []}


def test_words_and_lists_of_calls_before_the_end_of_a_function_message(tmp_path):
    content = f"<think>\na {{set}}\n</think>\n\nLet {{1, 2}} be.\n{json.dumps([CALL, CALL])}"
    talk = [{"from": "human", "value": "?"}, {"from": "function_call", "value": content}]
    [(_, turn)] = read_conversations([lines(tmp_path / "a.jsonl", {"conversations": talk})])
    assert (turn["reasoning_content"], turn["content"]) == ("a {set}", "Let {1, 2} be.")
    assert turn["tool_calls"] == [CALL, CALL]


DEEP = "[" * 3000 + "]" * 3000


def message(role, content, **more):
    return {"messages": [{"role": "user", "content": "?"}, {"role": role, "content": content, **more}]}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"conversations": [{"from": "robot", "value": "x"}]}, r"row 0, turn 0: role 'robot' is none of \['assistant'"),
        ({"conversations": [{"from": "function_call", "value": "no call"}]}, "no JSON of a call ends this message"),
        ({"conversations": [{"from": "function_call", "value": '{"name": "f"}'}]}, "an object with name and arguments"),
        ({"conversations": [{"from": "gpt", "value": 3}]}, "turn 0: content must be text, got int"),
        ({"conversations": "hello"}, "conversations must be a list of messages, got str"),
        ({"conversations": []}, "must be a list of messages, got list"),
        ({"conversations": [None]}, "turn 0: a message must be an object, got nothing"),
        (message("assistant", None), "turn 1: content must be text, got nothing"),
        (message("user", "x"), "needs at least one assistant turn"),
        (message(["assistant"], "x"), r"role \['assistant'\] is none of"),
        (message("assistant", "x", tool_calls=[{"function": {"name": "f", "arguments": "{"}}]), "of f are not JSON"),
        (message("assistant", "x", tool_calls=[{"function": {"name": "f", "arguments": "3"}}]), "must be an object"),
        (message("assistant", "x", tool_calls=5), "row 0, turn 1: tool_calls must be a list of calls, got int"),
        (message("assistant", "x", tool_calls=[5]), "an object with name and arguments, got '5'"),
        (message("assistant", "x", tool_calls=[{"name": [1], "arguments": {}}]), "an object with name and arguments"),
        (message("assistant", "x", tool_calls=[{"name": "f", "arguments": DEEP}]), "of f are not JSON"),
        ({"conversations": [{"from": "function_call", "value": DEEP}]}, "no JSON of a call ends this message"),
        ({"messages": 5}, "row 0: messages must be a list of messages, got int"),
        ({"text": "x"}, r"lacks the column messages \(or conversations\); it has \['text'\]"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, record, words):
    with pytest.raises(DataError, match=words):
        read_conversations([lines(tmp_path / "a.jsonl", record)])


def test_a_directory_stands_for_its_files_and_a_wrong_name_says_what_may_stand_there(tmp_path):
    (tmp_path / "set").mkdir()
    for name in ("b.jsonl", "a.jsonl"):
        lines(tmp_path / "set" / name, OPENAI)
    (tmp_path / "set" / "README.md").write_text("about")
    assert read_conversations([tmp_path / "set"]) == [EXPECTED, EXPECTED]
    with pytest.raises(DataError, match=r"missing\.jsonl: no such file or directory, and neither a URL nor a data set"):
        read_conversations([tmp_path / "missing.jsonl"])


def test_a_file_with_calls_cannot_be_read_as_raw_turns(tmp_path):
    with pytest.raises(DataError, match=r"row 0, turn 0: role 'developer'"):
        read_conversations([lines(tmp_path / "a.jsonl", OPENAI)], form="raw")
    record = {"messages": OPENAI["messages"][2:]}
    with pytest.raises(DataError, match=r"turn 0: a raw turn has no tool_calls .* read it with sft\.format=openai"):
        read_conversations([lines(tmp_path / "a.jsonl", record)], form="raw")


def test_files_that_are_empty_cut_off_or_not_utf8_are_named(tmp_path):
    whole = tmp_path / "whole.parquet"
    pq.write_table(pa.Table.from_pylist([REFERENCE] * 50), whole)
    files = {
        "empty.jsonl": (b"", "empty.jsonl holds no conversation"),
        "empty.parquet": (b"", "empty.parquet is not a readable parquet file"),
        "cut.parquet": (whole.read_bytes()[:-40], "cut.parquet is not a readable parquet file"),
        "deep.jsonl": (DEEP.encode(), "deep.jsonl, row 0: not JSON"),
        "deep.json": (DEEP.encode(), "deep.json is not a readable JSON file"),
        "cut.jsonl": (json.dumps(OPENAI).encode()[:-9], "cut.jsonl, row 0: not JSON"),
        "latin.jsonl": ('{"messages": "é"}'.encode("latin-1"), "latin.jsonl, row 0: not UTF-8"),
        "mixed.jsonl": (
            f"{json.dumps(OPENAI)}\n{json.dumps(REFERENCE)}\n".encode(),
            "mixed.jsonl, row 1: messages must",
        ),
        "table.csv": (b"a,b\n", "unknown kind of file '.csv'"),
    }
    for name, (content, words) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=words):
            read_conversations([tmp_path / name])
    pq.write_table(pa.table({"messages": pa.array([], pa.list_(pa.struct([("role", pa.string())])))}), whole)
    with pytest.raises(DataError, match="holds no conversation"):
        read_conversations([whole])


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    for name, content in (("a.jsonl", json.dumps(OPENAI)), ("a.json", json.dumps([OPENAI]))):
        (tmp_path / name).write_text(content, "utf-8-sig")
        assert read_conversations([tmp_path / name]) == [EXPECTED]
