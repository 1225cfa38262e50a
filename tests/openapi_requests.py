"""Requests that an OpenAPI document allows, and some that it nearly allows, as hypothesis strategies."""

import base64
import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from hypothesis import strategies as st

_TEXT = st.text(max_size=40)
_ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _TEXT,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(_TEXT, children, max_size=3),
    max_leaves=8,
)
_SOME_CODE = st.sampled_from(["", "x = 1", "x", "1/0", "print('é' * 9)", "\x00", "raise SystemExit(3)", "input()"])
_BASE64 = st.binary(max_size=20).map(lambda data: base64.b64encode(data).decode())


@dataclass(frozen=True)
class Operation:
    method: str
    path: str
    body: dict[str, Any] | None
    content_type: str
    statuses: frozenset[str]


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    body: bytes
    content_type: str


def operations(document: dict[str, Any]) -> list[Operation]:
    found = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            content = operation.get("requestBody", {}).get("content", {})
            kind, body = next(iter(content.items()), ("application/json", {}))
            found.append(Operation(method.upper(), path, body.get("schema"), kind, frozenset(operation["responses"])))
    return found


@st.composite
def requests_of(draw: st.DrawFn, document: dict[str, Any], operation: Operation, *, session_ids: list[str]) -> Request:
    ids = st.sampled_from(session_ids) | _TEXT.filter(bool)
    names = st.sampled_from(["a", "d/b", "..", "a/../../b", "/etc/passwd", "."]) | _TEXT.filter(bool)
    path = operation.path.replace("{session_id}", _escaped(draw(ids), safe=""))
    path = path.replace("{path}", _escaped(draw(names), safe="/"))
    if operation.content_type != "application/json":
        return Request(operation.method, path, draw(st.binary(max_size=200)), operation.content_type)
    body = b""
    if operation.body is not None:
        value = draw(_values(document, operation.body))
        if draw(st.integers(0, 19)) == 0:
            body = draw(st.binary(max_size=50))
        elif value is not None:
            body = json.dumps(value, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    return Request(operation.method, path, body, operation.content_type)


def _escaped(text: str, *, safe: str) -> str:
    """Dots too, or the client would take `..` out of the path before the service sees it."""
    return quote(text.encode("utf-8", "surrogatepass"), safe=safe).replace(".", "%2E")


@st.composite
def _values(draw: st.DrawFn, document: dict[str, Any], schema: dict[str, Any], name: str = "") -> Any:
    """Of `schema`; one in twenty is anything else."""
    if draw(st.integers(0, 19)) == 0:
        return draw(_ANY_JSON)
    if "$ref" in schema:
        part: Any = document
        for key in schema["$ref"].removeprefix("#/").split("/"):
            part = part[key]
        return draw(_values(document, part, name))
    if "anyOf" in schema:
        return draw(_values(document, draw(st.sampled_from(schema["anyOf"])), name))
    if "enum" in schema or "const" in schema:
        return draw(st.sampled_from(schema.get("enum") or [schema["const"]]))
    kind = schema.get("type")
    if kind == "object":
        extra = schema.get("additionalProperties")
        if isinstance(extra, dict):
            return draw(st.dictionaries(_TEXT, _values(document, extra), max_size=2))
        required = set(schema.get("required", ()))
        return {
            key: draw(_values(document, value, key))
            for key, value in schema.get("properties", {}).items()
            if key in required or draw(st.booleans())
        }
    if kind == "array":
        return draw(st.lists(_values(document, schema["items"], name), max_size=2))
    if kind in ("integer", "number"):
        low = schema.get("minimum", schema.get("exclusiveMinimum", -(1 << 40)))
        high = schema.get("maximum", schema.get("exclusiveMaximum", 1 << 40))
        if name.endswith(("timeout", "timeout_s")):  # what no cell here comes near, and no fuzzing would wait for
            low, high = 1, min(high, 60)
        return draw(st.integers(int(low), int(high)) | st.sampled_from([low, high]))
    if kind == "boolean":
        return draw(st.booleans())
    if kind == "null":
        return None
    if name in ("code", "cells"):
        return draw(_SOME_CODE)
    return draw(_TEXT | _BASE64)
