"""SFT samples: conversations from parquet, rendered by the one renderer that rollouts use, loss where the model spoke.

A row's `messages` are user, assistant and tool turns; an assistant's content is its raw turn, exactly what a sampler
emits after the generation prompt, without the end-of-turn token.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aster.errors import DataError
from aster.types import Sample

Messages = list[dict[str, str]]
_ROLES = frozenset({"system", "user", "assistant", "tool"})


class Renderer(Protocol):
    """What is needed of `agent.chat.ChatRenderer`: token ids [S] and loss mask [S] of a whole conversation."""

    def conversation(self, messages: Messages, *, train_on_newline: bool = False) -> tuple[np.ndarray, np.ndarray]: ...


def read_conversations(files: Sequence[str | Path]) -> list[Messages]:
    """The `messages` column of all files in order. Raises `DataError` naming the file, the row and the cure."""
    out: list[Messages] = []
    for file in files:
        path = Path(file)
        if not path.is_file():
            raise DataError(f"{path} does not exist")
        try:
            table = pq.read_table(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{path} is not a readable parquet file: {error}") from None
        if "messages" not in table.column_names:
            raise DataError(f"{path} lacks the column messages; it has {table.column_names}")
        for index, messages in enumerate(table.column("messages").to_pylist()):
            out.append(_checked(messages, where=f"{path}, row {index}"))
    return out


def write_conversations(path: str | Path, conversations: Sequence[Messages]) -> None:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".tmp")
    pq.write_table(pa.Table.from_pylist([{"messages": c} for c in conversations]), partial)
    partial.replace(target)


def to_samples(
    conversations: Sequence[Messages], renderer: Renderer, *, max_length: int, train_on_newline: bool = False
) -> tuple[list[Sample], int]:
    """Rendered samples and how many conversations were longer than `max_length` tokens (dropped whole, never cut)."""
    samples: list[Sample] = []
    dropped = 0
    for messages in conversations:
        ids, mask = renderer.conversation(messages, train_on_newline=train_on_newline)
        if len(ids) > max_length:
            dropped += 1
        else:
            samples.append(Sample(ids=ids, mask=mask, group=len(samples)))
    return samples, dropped


def _checked(messages: Messages | None, *, where: str) -> Messages:
    if not messages or not any(m["role"] == "assistant" for m in messages):
        raise DataError(f"{where}: a conversation needs at least one assistant turn")
    for turn, message in enumerate(messages):
        if message["role"] not in _ROLES:
            raise DataError(f"{where}, turn {turn}: role {message['role']!r} is none of {sorted(_ROLES)}")
        if not isinstance(message["content"], str):
            raise DataError(f"{where}, turn {turn}: content must be text, got {type(message['content']).__name__}")
    return [{"role": m["role"], "content": m["content"]} for m in messages]
