"""What counts as a tool call in a turn's text, and why a call is refused. Text in, records out; nothing runs here.

The grammar is the Hermes/Qwen one: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, anywhere in the turn,
inside a thought as well. Another model family is another `ToolGrammar`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

CODE_INTERPRETER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "code_interpreter",
        "description": "A tool for executing code.",
        "parameters": {
            "type": "object",
            "properties": {"code": {"type": "string", "description": "The code to execute."}},
            "required": ["code"],
        },
    },
}

MAX_CODE_CHARS = 4 << 20  # serve.schema.ExecuteRequest refuses more
_SHOWN = 80  # characters of a wrong value that an error repeats


@dataclass(frozen=True)
class ParsedCall:
    """A call whose JSON could be read; whether its name and arguments are any good is `read_arguments`' question."""

    name: object
    arguments: object


@dataclass(frozen=True)
class ParsedTurn:
    """The calls of one turn, in order, and why those that could not be read could not be read.

    >>> HermesGrammar().parse('<tool_call>{"name": "code_interpreter", "arguments": {"code": "1"}}</tool_call>').calls
    (ParsedCall(name='code_interpreter', arguments={'code': '1'}),)
    """

    calls: tuple[ParsedCall, ...] = ()
    malformed: tuple[str, ...] = ()

    @property
    def attempted(self) -> bool:
        """False = the turn is a final answer."""
        return bool(self.calls or self.malformed)


class FormatError(ValueError):
    """The model's call cannot be run; the text goes to the model after `Error when executing tool: `."""


class ToolGrammar(Protocol):
    """How one model family writes calls."""

    def parse(self, text: str) -> ParsedTurn: ...

    def without_calls(self, text: str) -> str:
        """The text with every call cut out, so that nothing inside a call can be taken for an answer."""
        ...

    def opening(self, written: str) -> str:
        """The beginning of a turn that holds one call, up to where the model begins to choose what to call."""
        ...


class HermesGrammar:
    """`<tool_call>` JSON `</tool_call>`; an opening tag that nothing closes is a malformed call."""

    _CALL = re.compile(r"<tool_call>(.*?)(?:(</tool_call>)|\Z)", re.DOTALL)

    def parse(self, text: str) -> ParsedTurn:
        calls: list[ParsedCall] = []
        malformed: list[str] = []
        for match in self._CALL.finditer(text):
            if match[2] is None:
                malformed.append("<tool_call> is not closed by </tool_call>")
                continue
            try:
                calls.append(_read_json(match[1]))
            except FormatError as error:
                malformed.append(str(error))
        return ParsedTurn(tuple(calls), tuple(malformed))

    def without_calls(self, text: str) -> str:
        return self._CALL.sub("", text)

    def opening(self, written: str) -> str:
        head, tag, rest = written.partition("<tool_call>")
        return head + tag + rest[: len(rest) - len(rest.lstrip())]


def _read_json(text: str) -> ParsedCall:
    try:
        body = json.loads(text)
    except json.JSONDecodeError as error:
        raise FormatError(f"the call is not valid JSON: {error}") from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; brackets nested thousands deep
        raise FormatError(f"the call is not readable JSON: {type(error).__name__}") from None
    if not isinstance(body, dict):
        raise FormatError(f"the call must be a JSON object with name and arguments, got {_kind(body)}")
    for key in ("name", "arguments"):
        if key not in body:
            raise FormatError(f"the call has no {key!r}")
    return ParsedCall(body["name"], body["arguments"])


def read_arguments(call: ParsedCall, tools: Sequence[Mapping[str, Any]] = (CODE_INTERPRETER,)) -> dict[str, Any]:
    """What a call asks its tool for, checked against the tool's schema. Raises FormatError, worded for the model.

    Arguments that the schema does not know are refused, not ignored: a `timeout` that the model believes in and that
    does nothing is worse than an error. Of a property's schema `type` and `enum` are looked at.
    """
    names = [tool["function"]["name"] for tool in tools]
    if call.name not in names:
        raise FormatError(f"unknown tool {_shown(call.name)}; the tools are: {', '.join(names)}")
    schema = tools[names.index(str(call.name))]["function"]["parameters"]
    known: dict[str, Any] = schema["properties"]
    if not isinstance(call.arguments, dict):
        raise FormatError(f"arguments must be a JSON object with {', '.join(known)}, got {_kind(call.arguments)}")
    for key in schema.get("required", ()):
        if key not in call.arguments:
            raise FormatError(f"missing argument {key!r}")
    for key, value in call.arguments.items():
        if key not in known:
            raise FormatError(f"unknown argument {_shown(key)}; {call.name} takes only: {', '.join(known)}")
        _check(key, value, known[key])
    return call.arguments


def _check(key: str, value: object, schema: Mapping[str, Any]) -> None:
    types = schema.get("type", [])
    wanted = [types] if isinstance(types, str) else list(types)
    if wanted and not any(_is(value, kind) for kind in wanted):
        raise FormatError(
            f"argument {key!r} must be {' or '.join(_KINDS[kind] for kind in wanted)}, got {_kind(value)}"
        )
    if "enum" in schema and value not in schema["enum"]:
        allowed = ", ".join(map(_shown, schema["enum"]))
        raise FormatError(f"argument {key!r} must be one of {allowed}, got {_shown(value)}")
    if not isinstance(value, str):
        return
    if len(value) > MAX_CODE_CHARS:
        raise FormatError(f"argument {key!r} has {len(value)} characters, the limit is {MAX_CODE_CHARS}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # JSON may spell half of a surrogate pair; no wire format carries it
        raise FormatError(f"argument {key!r} is not valid Unicode: it holds half of a surrogate pair") from None


_KINDS = {
    "string": "a string",
    "integer": "an integer",
    "number": "a number",
    "boolean": "a boolean",
    "array": "a list",
    "object": "an object",
    "null": "null",
}


def _is(value: object, kind: str) -> bool:
    if kind == "integer":
        return isinstance(value, int) and not isinstance(value, bool)
    return _kind(value) == _KINDS[kind]


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")
