"""Trajectories as the report's table and viewer read them: one short row each, and their turns in compressed chunks.

Rows are small and always loaded; the texts of a chunk are unpacked by the browser when one of them is opened. The
reference's own rollout files, which have no turns, are taken apart by their tool-response markers.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aster.data.rollouts import read_rows, rollout_files

CHUNK = 40  # trajectories whose texts are unpacked together
_SNIPPET = 160
_DETAILS = (
    "uid",
    "reward",
    "score",
    "error",
    "engine",
    "model_tokens",
    "prompt_tokens",
    "policy_version",
    "policy_version_oldest",
    "generate_s",
    "tool_s",
    "queue_s",
    "acc_strict",
    "acc_math_verify",
    "mean_logprob",
)
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


@dataclass
class Trajectories:
    """What goes into the page. `rows` are dicts of short values; `chunks` base64 of gzip of a JSON list of details."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    chunks: list[str] = field(default_factory=list)
    total: int = 0  # on disk


def collect(runs: Sequence[tuple[int, Path]], *, limit: int, max_chars: int) -> Trajectories:
    """Rows of all rollout files of `runs` (index, directory). Past `limit` every file gives the same number, its first
    ones; `max_chars` cuts the middle out of longer texts."""
    files = [
        (index, kind, step, file)
        for index, path in runs
        for kind, folder in (("train", path / "rollout_data"), ("val", path / "val_rollout_data"))
        if folder.is_dir()
        for step, file in rollout_files(folder)
    ]
    sizes = [_count_lines(file) for *_, file in files]
    quota = _quota(sizes, limit)
    out = Trajectories(total=sum(sizes))
    pending: list[dict[str, Any]] = []
    for index, kind, step, file in files:
        for number, row in enumerate(read_rows(file)):
            if number >= quota:
                break
            if len(pending) == CHUNK:
                out.chunks.append(_pack(pending))
                pending = []
            out.rows.append(_row(row, run=index, kind=kind, step=step) | {"c": len(out.chunks), "i": len(pending)})
            pending.append(_details(row, max_chars=max_chars))
    if pending:
        out.chunks.append(_pack(pending))
    return out


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def _quota(sizes: Sequence[int], limit: int) -> int:
    """The largest number of rows per file such that the sum stays within `limit`; small files leave room to others."""
    if sum(sizes) <= limit:
        return max(sizes, default=0)
    low, high = 0, max(sizes)
    while low < high:
        middle = (low + high + 1) // 2
        if sum(min(size, middle) for size in sizes) <= limit:
            low = middle
        else:
            high = middle - 1
    return low


def _pack(details: list[dict[str, Any]]) -> str:
    raw = json.dumps(details, ensure_ascii=False, separators=(",", ":")).encode()
    return base64.b64encode(gzip.compress(raw, mtime=0)).decode()


def _row(row: dict[str, Any], *, run: int, kind: str, step: int) -> dict[str, Any]:
    accuracy = row.get("acc")
    truth = row.get("ground_truth") or (row.get("non_tensor_reward_model") or {}).get("ground_truth")
    problem = " ".join(_problem(str(row.get("input") or "")).split())
    return {
        "run": run,
        "kind": kind,
        "step": step,
        "src": row.get("data_source") or row.get("non_tensor_data_source") or "",
        "id": row.get("row_id") or "",
        "n": row.get("sample"),
        "ok": None if accuracy is None else int(bool(accuracy)),
        "cause": row.get("stop_reason") or "",
        "calls": row.get("tool_calls"),
        "tok": row.get("response_tokens"),
        "s": None if row.get("seconds") is None else round(float(row["seconds"]), 2),
        "pred": str(row.get("pred") or "")[:80],
        "gt": str(truth if truth is not None else "")[:80],
        "q": problem[:_SNIPPET],
    }


def _details(row: dict[str, Any], *, max_chars: int) -> dict[str, Any]:
    return {
        "input": _cut(str(row.get("input") or ""), max_chars),
        "turns": list(_turns(row, max_chars=max_chars)),
        **{name: row[name] for name in _DETAILS if row.get(name) is not None},
    }


def _problem(text: str) -> str:
    match = _PROBLEM.search(text)
    return _SPECIAL.sub("", match[1] if match else text)


def _turns(row: dict[str, Any], *, max_chars: int) -> Iterator[dict[str, Any]]:
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
            "think": _cut(think, max_chars),
            "text": _cut(text, max_chars),
            "code": _cut(call.get("code") if call else written, max_chars),
            "obs": _cut(observation, max_chars) if call or responses else "",
            "more": [_cut(c["code"], max_chars) for c in measured.get("further_calls", ())],
            "status": call.get("status"),
            "outcome": call.get("outcome"),
            "lost": call.get("state_lost"),
            "call_s": call.get("seconds"),
            "s": measured.get("seconds"),
            "tok": measured.get("tokens"),
            "end": measured.get("finish_reason"),
        }
        yield {name: value for name, value in turn.items() if value not in (None, "", [], False)} | (
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


def _cut(text: str | None, max_chars: int) -> str:
    if not text or len(text) <= max_chars:
        return text or ""
    half = max_chars // 2
    return f"{text[:half]}\n\n[… {len(text) - 2 * half:,} characters are not in this page …]\n\n{text[-half:]}"
