"""SFT files and samples: what was written is read, bad rows are named, long ones dropped whole and counted."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aster.data.conversations import read_conversations, split, to_samples, write_conversations
from aster.errors import DataError

TALK = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "easy\n</think>\n\n2"}]


class Words:
    """A renderer of one id per character; the loss on everything that the assistant says."""

    def as_sampled(self, written):
        if "<end>" in written:
            raise DataError("goes on after its end")
        return written.removeprefix("<think>")

    def conversation(self, messages, *, train_on_newline=False):
        mask = [m["role"] == "assistant" for m in messages for _ in m["content"]]
        return np.zeros(len(mask), np.int32), np.array(mask, bool)


def test_conversations_survive_the_file(tmp_path):
    write_conversations(tmp_path / "deep" / "talk.parquet", [TALK, TALK[:]])
    assert read_conversations([tmp_path / "deep" / "talk.parquet"]) == [TALK, TALK]


def test_bad_rows_are_named(tmp_path):
    with pytest.raises(DataError, match="no such file or directory"):
        read_conversations([tmp_path / "none.parquet"])
    path = tmp_path / "bad.parquet"
    for rows, words in [
        ([{"messages": TALK[:1]}], "row 0: a conversation needs at least one assistant turn"),
        ([{"messages": TALK}, {"messages": [{"role": "robot", "content": ""}, *TALK]}], r"row 1, turn 0: role 'robot'"),
        ([{"text": "x"}], r"lacks the column messages \(or conversations\); it has \['text'\]"),
    ]:
        pq.write_table(pa.Table.from_pylist(rows), path)
        with pytest.raises(DataError, match=words):
            read_conversations([path])


def test_a_conversation_over_the_length_is_dropped_whole_and_counted():
    long = [TALK[0], {"role": "assistant", "content": "x" * 100}]
    samples, dropped = to_samples([TALK, long, TALK], Words(), max_length=50)
    assert (len(samples), dropped) == (2, 1)
    assert all(s.mask.sum() == len(TALK[1]["content"]) and len(s) <= 50 for s in samples)


def test_validation_keeps_whole_problems_and_a_side_is_for_ever():
    talks = [
        [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": a}] for n in range(400) for a in "ab"
    ]
    train, val = split(talks, fraction=0.1, seed=1)
    assert len(train) + len(val) == 800
    assert 40 <= len(val) <= 120, "400 problems at 0.1: 40 +- 6 of them, two conversations each"
    problems = [{c[0]["content"] for c in side} for side in (train, val)]
    assert not problems[0] & problems[1]
    fewer = split(talks[:400], fraction=0.1, seed=1)
    assert fewer[1] == [c for c in val if c in talks[:400]]
    assert split(talks, fraction=0.1, seed=2)[1] != val
    assert split(talks, fraction=0.0, seed=1) == (talks, [])


def test_a_conversation_that_cannot_be_rendered_is_numbered():
    class Refuses(Words):
        def conversation(self, messages, *, train_on_newline=False):
            if messages == TALK:
                return super().conversation(messages)
            raise DataError("no thought")

    with pytest.raises(DataError, match="conversation 1: no thought"):
        to_samples([TALK, TALK[1:]], Refuses(), max_length=50)


def test_a_conversation_of_a_file_that_cannot_be_rendered_is_named_by_its_row(tmp_path):
    class Refuses(Words):
        def conversation(self, messages, *, train_on_newline=False):
            if messages[0]["content"] == "bad":
                raise DataError("no thought")
            return super().conversation(messages)

    bad = [{"role": "user", "content": "bad"}, TALK[1]]
    write_conversations(tmp_path / "a.parquet", [TALK, TALK])
    write_conversations(tmp_path / "b.parquet", [TALK, bad])
    for side in split(read_conversations([tmp_path / f"{n}.parquet" for n in "ab"]), fraction=0.5, seed=1):
        if bad in side:
            with pytest.raises(DataError, match=r"b\.parquet, row 1: no thought"):
                to_samples(side, Refuses(), max_length=50)
        else:
            assert len(to_samples(side, Refuses(), max_length=50)[0]) == len(side)


def test_only_a_raw_turn_is_brought_into_the_form_of_a_sampler_and_a_bad_one_is_named(tmp_path):
    def talk(**turn):
        return [{"role": "user", "content": "<think>?"}, {"role": "assistant", **turn}]

    written = talk(content="<think>x")
    (sample,), _ = to_samples([written], Words(), max_length=50)
    assert (len(sample), sample.mask.sum()) == (len("<think>?x"), 1)
    assert written == talk(content="<think>x"), "the caller's messages stay as they are"
    structured = talk(content="<think>x", reasoning_content="", tool_calls=[])
    assert to_samples([structured], Words(), max_length=50)[0][0].mask.sum() == len("<think>x")
    write_conversations(tmp_path / "a.parquet", [TALK, talk(content="a<end>b")])
    with pytest.raises(DataError, match=r"a\.parquet, row 1: goes on after its end"):
        to_samples(read_conversations([tmp_path / "a.parquet"]), Words(), max_length=50)
