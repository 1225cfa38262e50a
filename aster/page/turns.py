"""One trajectory's text taken apart for a reader: thought, visible text, code, observation of each turn.

Where a rollout file carries no turns (the reference's own), they are found by their tool-response markers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

_PYTHON = "code_interpreter"
_SPECIAL = re.compile(r"<\|im_(?:start|end)\|>|<\|endoftext\|>")
_TOOL_CALL = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)
_RESPONSE = re.compile(r"<tool_response>\n?(.*?)\n?</tool_response>", re.DOTALL)
_OBSERVED = re.compile(
    r"(?:<\|im_end\|>)?\n(?:<\|im_start\|>)?user\n<tool_response>.*?</tool_response>(?:<\|im_end\|>)?"
    r"\n(?:<\|im_start\|>)?assistant\n(?:<think>\n)?",
    re.DOTALL,
)
_PROBLEM = re.compile(
    r"(?:\A|\n)(?:<\|im_start\|>)?user\n(.*?)(?:<\|im_end\|>)?\n(?:<\|im_start\|>)?assistant\n", re.DOTALL
)


def problem_of(text: str) -> str:
    match = _PROBLEM.search(text)
    return _SPECIAL.sub("", match[1] if match else text)


def turns_of(row: dict[str, Any], *, max_chars: int) -> Iterator[dict[str, Any]]:
    """`think`, `text`, `code`, `obs` of each turn with what was measured; empty parts are left out."""
    output = str(row.get("output") or "")
    recorded = row.get("turns")
    spans = [tuple(t["text"]) for t in recorded] if recorded else list(_guess_spans(output))
    for number, (start, stop) in enumerate(spans):
        measured = recorded[number] if recorded else {}
        call = measured.get("call") or {}
        then = output[stop : spans[number + 1][0]] if number + 1 < len(spans) else output[stop:]
        think, text, written = _parts(output[start:stop])
        responses = _RESPONSE.findall(then)
        observation = "\n\n".join(responses) if responses else _SPECIAL.sub("", then).strip()
        turn = {
            "think": cut(think, max_chars),
            "text": cut(text, max_chars),
            "code": cut(call.get("code") if call else written, max_chars),
            "obs": cut(observation, max_chars) if call or responses else "",
            "more": [cut(c["code"], max_chars) for c in measured.get("further_calls", ())],
            "status": call.get("status"),
            "outcome": call.get("outcome"),
            "lost": call.get("state_lost"),
            "tool": None if call.get("tool") == _PYTHON else call.get("tool"),
            "call_s": call.get("seconds"),
            "s": measured.get("seconds"),
            "tok": measured.get("tokens"),
            "end": measured.get("finish_reason"),
        }
        # a call that took 0.0 s is no call without a time, and 0.0 == False
        yield {k: v for k, v in turn.items() if v is not None and v is not False and v not in ("", [])} | (
            {"obs": turn["obs"]} if call else {}
        )


def _guess_spans(output: str) -> Iterator[tuple[int, int]]:
    at = 0
    for match in _OBSERVED.finditer(output):
        yield at, match.start()
        at = match.end()
    yield at, len(output)


def _parts(text: str) -> tuple[str, str, str]:
    """(reasoning, visible text, code of the first tool call) of one turn.

    A chat template may open <think> itself, so the turn may begin inside it.
    """
    text = _SPECIAL.sub("", text)
    think, closed, rest = text.partition("</think>")
    if not closed:
        think, rest = (text, "") if text.lstrip().startswith("<think>") else ("", text)
    code = ""
    match = _TOOL_CALL.search(rest)
    if match:
        code = _code_of(match[1])
        rest = _TOOL_CALL.sub("", rest)
    return think.replace("<think>", "", 1).strip(), rest.strip(), code


def _code_of(call: str) -> str:
    """The code argument of a well-formed call, else the call as the model wrote it."""
    try:
        arguments = json.loads(call)["arguments"]
        return str(arguments["code"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return call


def cut(text: str | None, max_chars: int) -> str:
    if not text or len(text) <= max_chars:
        return text or ""
    half = max_chars // 2
    return f"{text[:half]}\n\n[… {len(text) - 2 * half:,} characters are not in this page …]\n\n{text[-half:]}"
