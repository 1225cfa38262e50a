"""Conversations as other programs write them, in one shape: what a file calls its roles, thoughts and calls.

    raw        `messages`: an assistant's content is its raw turn, exactly what a sampler emits (`aster prepare`);
               a `<think>` that the prompt opens too and an end of turn come off (`ChatRenderer.as_sampled`)
    openai     `messages` with `tool_calls` and `reasoning_content`
    sharegpt   `conversations` with role/content or from/value; a call is a message of its own, role `function` or
               `function_call`, whose content is a thought and the call's JSON (the reference's SFT set)

The last two become messages whose assistant turns carry `reasoning_content` (a string, maybe empty) and `tool_calls`
(`[{"name", "arguments"}]`): how a turn is written is the business of the model's own template
(`agent.chat.ChatRenderer.raw_turn`). A file's `tools` are not read: rollouts offer our tool, and so does SFT.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from aster.errors import DataError

Form = Literal["raw", "openai", "sharegpt"]
Message = dict[str, Any]

_SHAREGPT_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function": "call",
    "function_call": "call",
    "tool": "tool",
    "observation": "tool",
}
_ROLES = frozenset({"system", "user", "assistant", "tool"})


def form_of(records: Sequence[Mapping[str, Any]], *, where: str) -> Form:
    """Which of the three a file holds; `openai` where any message has a call or a thought of its own."""
    if "conversations" in records[0]:
        return "sharegpt"
    if "messages" not in records[0]:
        cure = ": these are prompts, and SFT reads conversations (README, Data)" if "prompt" in records[0] else ""
        raise DataError(f"{where} lacks the column messages (or conversations); it has {sorted(records[0])}{cure}")
    lists = (record.get("messages") for record in records)
    messages = (m for turns in lists if isinstance(turns, list) for m in turns if isinstance(m, Mapping))
    structured = any(m.get("tool_calls") or isinstance(m.get("reasoning_content"), str) for m in messages)
    return "openai" if structured else "raw"


def read_messages(record: Mapping[str, Any], form: Form, *, where: str) -> list[Message]:
    """One record in our shape. Raises `DataError` naming `where`, the turn and what is wrong with it."""
    column = "conversations" if form == "sharegpt" else "messages"
    turns = record.get(column)
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: {column} must be a list of messages, got {_kind(turns)}")
    out = []
    for number, turn in enumerate(turns):
        at = f"{where}, turn {number}"
        if not isinstance(turn, Mapping):
            raise DataError(f"{at}: a message must be an object, got {_kind(turn)}")
        out.append(_READERS[form](turn, at))
    if not any(m["role"] == "assistant" for m in out):
        raise DataError(f"{where}: a conversation needs at least one assistant turn")
    return out


def _raw(turn: Mapping[str, Any], where: str) -> Message:
    if turn.get("tool_calls") or turn.get("reasoning_content"):
        raise DataError(
            f"{where}: a raw turn has no tool_calls and no reasoning_content: read it with sft.format=openai"
        )
    return {"role": _role(turn.get("role"), where), "content": _text(turn.get("content"), where)}


def _openai(turn: Mapping[str, Any], where: str) -> Message:
    role = _role("system" if turn.get("role") == "developer" else turn.get("role"), where)
    content = turn.get("content")
    if isinstance(content, list):  # parts; text is the only kind that a text model reads
        content = "".join(_text(part.get("text") if isinstance(part, Mapping) else part, where) for part in content)
    if role != "assistant":
        return {"role": role, "content": _text(content, where)}
    written = turn.get("tool_calls") or []
    if not isinstance(written, list):
        raise DataError(f"{where}: tool_calls must be a list of calls, got {_kind(written)}")
    calls = [_call((isinstance(c, Mapping) and c.get("function")) or c, where) for c in written]
    content = "" if content is None and calls else _text(content, where)
    thought = turn.get("reasoning_content")
    return _assistant(content, calls) if thought is None else _structured(_text(thought, where), content, calls)


def _sharegpt(turn: Mapping[str, Any], where: str) -> Message:
    tag = turn.get("role") or turn.get("from")
    if not isinstance(tag, str) or tag not in _SHAREGPT_ROLES:
        raise DataError(f"{where}: role {tag!r} is none of {sorted(_SHAREGPT_ROLES)}")
    role = _SHAREGPT_ROLES[tag]
    content = _text(turn.get("value") if turn.get("content") is None else turn.get("content"), where)
    if role == "assistant":
        return _assistant(content, [])
    if role != "call":
        return {"role": role, "content": content}
    thought, rest = split_thought(content)
    text, calls = _calls_at_the_end(rest, where)
    return _structured(thought, text, calls)


_READERS = {"raw": _raw, "openai": _openai, "sharegpt": _sharegpt}


def split_thought(content: str) -> tuple[str, str]:
    """(thought, what follows it); no thought where nothing closes one.

    >>> split_thought("<think>\\nhm\\n</think>\\n\\n4")
    ('hm', '4')
    """
    thought, closed, rest = content.partition("</think>")
    if not closed:
        return "", content
    return thought.removeprefix("\n").removeprefix("<think>").strip("\n"), rest.lstrip("\n")


def valid(text: str) -> str:
    """Half surrogate pairs, which JSON may spell and neither a tokenizer nor UTF-8 takes, written out as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _assistant(content: str, calls: list[dict[str, Any]]) -> Message:
    return _structured(*split_thought(content), calls)


def _structured(thought: str, content: str, calls: list[dict[str, Any]]) -> Message:
    return {"role": "assistant", "content": content, "reasoning_content": thought, "tool_calls": calls}


def _calls_at_the_end(text: str, where: str) -> tuple[str, list[dict[str, Any]]]:
    """(what is said before the call, calls); the JSON of a call, or of a list of calls, ends the message."""
    stripped = text.strip()
    for start, character in enumerate(stripped):
        if character not in "[{":
            continue
        try:
            found = json.loads(stripped[start:])
        except (ValueError, RecursionError):
            continue
        calls = found if isinstance(found, list) else [found]
        return stripped[:start].rstrip(), [_call(call, where) for call in calls]
    raise DataError(f"{where}: no JSON of a call ends this message: {stripped[-80:]!r}")


def _call(call: Any, where: str) -> dict[str, Any]:
    """`arguments` may be an object or, as OpenAI writes it, the JSON of one."""
    named = isinstance(call, Mapping) and isinstance(call.get("name"), str) and call["name"]
    if not named or "arguments" not in call:
        raise DataError(f"{where}: a call must be an object with name and arguments, got {str(call)[:80]!r}")
    arguments = call["arguments"]
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: the arguments of {call['name']} are not JSON: {error}") from None
    if not isinstance(arguments, Mapping):
        raise DataError(f"{where}: the arguments of {call['name']} must be an object, got {_kind(arguments)}")
    # parquet gives every struct of a column all the keys that any of them has
    return {"name": call["name"], "arguments": {k: v for k, v in arguments.items() if v is not None}}


def _role(role: Any, where: str) -> str:
    if not isinstance(role, str) or role not in _ROLES:
        raise DataError(f"{where}: role {role!r} is none of {sorted(_ROLES)}")
    return role


def _text(content: Any, where: str) -> str:
    if not isinstance(content, str):
        raise DataError(f"{where}: content must be text, got {_kind(content)}")
    return content


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__
