"""SFT samples: conversations from files, rendered by the one renderer that rollouts use, loss where the model spoke."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aster.data.formats import Form, Message, form_of, read_messages, valid
from aster.data.hub import local_files
from aster.data.raw import read_records
from aster.errors import DataError
from aster.types import Sample

Messages = list[Message]


class Conversation(Messages):
    """The messages of one row, and where it stands, for an error that is only seen when it is rendered."""

    def __init__(self, messages: Messages, *, where: str) -> None:
        super().__init__(messages)
        self.where = where


class Renderer(Protocol):
    """What is needed of `agent.chat.ChatRenderer`: token ids [S] and loss mask [S] of a whole conversation, and the raw
    turn of a text that was written down with the prompt's `<think>` before it or the end of turn after it."""

    def as_sampled(self, written: str) -> str: ...

    def conversation(self, messages: Messages, *, train_on_newline: bool = False) -> tuple[np.ndarray, np.ndarray]: ...


def read_conversations(files: Sequence[str | Path], *, form: Form | None = None) -> list[Messages]:
    """The conversations of all files (.parquet, .jsonl, .json) in order; `form` null = told apart file by file.

    A directory, a URL or a data set's id stands for its files (`hub.local_files`). Nothing is skipped: a row that
    cannot be read is a `DataError` naming the file, the row and what is wrong with it.
    """
    out: list[Messages] = []
    for file in (path for name in files for path in local_files(str(name))):
        records = []
        for index, record in enumerate(read_records(file)):
            if isinstance(record, str):
                raise DataError(f"{file}, row {index}: {record}")
            records.append(record)
        if not records:
            raise DataError(f"{file} holds no conversation")
        kind = form or form_of(records, where=str(file))
        for index, record in enumerate(records):
            where = f"{file}, row {index}"
            out.append(Conversation(read_messages(record, kind, where=where), where=where))
    return out


def write_conversations(path: str | Path, conversations: Sequence[Messages]) -> None:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".tmp")
    pq.write_table(pa.Table.from_pylist([{"messages": c} for c in conversations]), partial)
    partial.replace(target)


def split(conversations: Sequence[Messages], *, fraction: float, seed: int) -> tuple[list[Messages], list[Messages]]:
    """(training, validation), each in the order given; about `fraction` of the problems are kept for validation.

    The side is a property of the text before the first assistant turn, and so two answers to one problem are never on
    different sides, and a conversation keeps its side when others join the file.
    """
    sides: tuple[list[Messages], list[Messages]] = ([], [])
    for messages in conversations:
        first = next(i for i, m in enumerate(messages) if m["role"] == "assistant")
        problem = "\n".join(m["content"] for m in messages[:first])
        digest = hashlib.sha256(valid(f"{seed}/{problem}").encode()).digest()
        sides[int.from_bytes(digest[:8], "big") < fraction * 2.0**64].append(messages)
    return sides


def to_samples(
    conversations: Sequence[Messages], renderer: Renderer, *, max_length: int, train_on_newline: bool = False
) -> tuple[list[Sample], int]:
    """Rendered samples and how many conversations were longer than `max_length` tokens (dropped whole, never cut).

    Raises `DataError` with the file and row of a conversation that the renderer refuses, or its number where it is of
    no file.
    """
    samples: list[Sample] = []
    dropped = 0
    for index, messages in enumerate(conversations):
        try:
            turns = [_as_sampled(message, renderer) for message in messages]
            ids, mask = renderer.conversation(turns, train_on_newline=train_on_newline)
        except DataError as error:
            where = messages.where if isinstance(messages, Conversation) else f"conversation {index}"
            raise DataError(f"{where}: {error}") from None
        if len(ids) > max_length:
            dropped += 1
        else:
            samples.append(Sample(ids=ids, mask=mask, group=len(samples)))
    return samples, dropped


def _as_sampled(message: Message, renderer: Renderer) -> Message:
    raw = message["role"] == "assistant" and not {"reasoning_content", "tool_calls"} & message.keys()
    return {**message, "content": renderer.as_sampled(message["content"])} if raw else message
