"""The data card of a prompt file: what is in it, counted, so that nobody has to guess. Text and numbers only."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from aster.data.prompts import read_prompts
from aster.types import PromptRow

_CJK = re.compile(r"[\u3400-\u9fff]")
_INTEGER = re.compile(r"[+-]?\d+\Z")
_DECIMAL = re.compile(r"[+-]?\d*\.\d+\Z")
_FRACTION = re.compile(r"[+-]?\d+/\d+\Z|-?\\d?frac\{-?\d+\}\{-?\d+\}\Z")
ACCURACY_COLUMN = re.compile(r"acc_mean@(\d+)\Z")
_PERCENTILES = (50, 90, 99, 100)
_BAR = 30  # characters of the longest bar of a histogram


@dataclass(frozen=True)
class Judged:
    """An `acc_mean@N` column as the filter writes it."""

    column: str
    mean: float  # over judged rows
    histogram: dict[str, int]  # right answers of N -> rows
    by_language: dict[str, float]
    never_judged: tuple[str, ...]
    """Row ids with an accuracy that no number of responses explains: the value is made up, whoever made it up."""


@dataclass(frozen=True)
class Lengths:
    summary: dict[str, int]
    """mean, p50, p90, p99, max"""
    histogram: dict[str, int]
    """Rows by length, between powers of two."""


@dataclass(frozen=True)
class Card:
    rows: int
    sources: dict[str, int]
    languages: dict[str, int]
    answers: dict[str, int]
    negative_answers: int
    longest_answer: int
    duplicates: int
    characters: Lengths  # of the user message
    tokens: Lengths | None  # of the prompt with the tool block; null without a tokenizer
    judged: Judged | None

    def markdown(self, *, title: str) -> str:
        lines = [f"# {title}", "", f"{self.rows:,} rows, {self.duplicates:,} repeated problems among them", ""]
        for name, counts in (("source", self.sources), ("language", self.languages), ("answer", self.answers)):
            lines += [f"| {name} | rows | share |", "|---|---|---|"]
            lines += [f"| {key} | {count:,} | {count / max(self.rows, 1):.1%} |" for key, count in counts.items()]
            lines.append("")
        lines.append(
            f"{self.negative_answers:,} answers are negative; the longest has {self.longest_answer} characters."
        )
        for name, lengths in (
            ("characters of the user message", self.characters),
            ("tokens of the prompt", self.tokens),
        ):
            if lengths is not None:
                summary = ", ".join(f"{key} {value:,}" for key, value in lengths.summary.items())
                lines += ["", f"{name}: {summary}", "", f"| {name} | rows | |", "|---|---|---|"]
                most = max(lengths.histogram.values())
                for key, count in lengths.histogram.items():
                    lines.append(f"| {key} | {count:,} | {'#' * -(-count * _BAR // most)} |")
        return "\n".join([*lines, *self._judged_lines()]) + "\n"

    def _judged_lines(self) -> list[str]:
        if self.judged is None:
            return []
        judged = self.judged
        by = ", ".join(f"{language} {value:.3f}" for language, value in judged.by_language.items())
        lines = ["", f"## {judged.column}", "", f"mean {judged.mean:.4f} over judged rows ({by})", ""]
        lines += ["| right | rows |", "|---|---|", *(f"| {k} | {v:,} |" for k, v in judged.histogram.items())]
        if judged.never_judged:
            lines += [
                "",
                f"**{len(judged.never_judged)} rows have an accuracy that no number of responses explains**: they were "
                "never judged, and the value is made up:",
                "",
                ", ".join(judged.never_judged),
            ]
        return lines


def card(path: Path, *, prompt_tokens: Callable[[PromptRow], int] | None = None) -> Card:
    """Read a prompt parquet and count. `prompt_tokens` renders with the tool block."""
    rows = read_prompts([path])
    texts = [row.messages[-1]["content"] for row in rows]
    languages = [language(text) for text in texts]
    answers = [row.ground_truth.strip() for row in rows]
    return Card(
        rows=len(rows),
        sources=_counted(row.data_source for row in rows),
        languages=_counted(languages),
        answers=_counted(_kind(answer) for answer in answers),
        negative_answers=sum(answer.startswith("-") for answer in answers),
        longest_answer=max(map(len, answers)),
        duplicates=len(texts) - len(set(texts)),
        characters=_lengths([len(text) for text in texts]),
        tokens=_lengths([prompt_tokens(row) for row in rows]) if prompt_tokens else None,
        judged=_judged(path, rows, languages),
    )


def language(text: str) -> str:
    """Chinese where there is a CJK character; that is all the paper's data asks for."""
    return "Chinese" if _CJK.search(text) else "English or other"


def _kind(answer: str) -> str:
    if _INTEGER.match(answer):
        return "integer"
    if _DECIMAL.match(answer):
        return "decimal"
    if _FRACTION.match(answer):
        return "fraction"
    return "LaTeX" if re.search(r"[\\^_{}]", answer) else "text"


def _counted(values: Any) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _lengths(values: Sequence[int]) -> Lengths:
    """
    >>> _lengths([100, 130, 140, 520]).histogram
    {'64-127': 1, '128-255': 2, '256-511': 0, '512-1023': 1}
    """
    names = {100: "max"}
    summary = {"mean": round(float(np.mean(values)))} | {
        names.get(p, f"p{p}"): int(np.percentile(values, p)) for p in _PERCENTILES
    }
    bits = Counter(value.bit_length() for value in values)
    ranges = range(min(bits), max(bits) + 1)
    return Lengths(summary, {f"{1 << bit >> 1}-{(1 << bit) - 1}": bits[bit] for bit in ranges})


def _judged(path: Path, rows: Sequence[PromptRow], languages: Sequence[str]) -> Judged | None:
    names = pq.read_schema(path).names
    column = next((name for name in names if ACCURACY_COLUMN.match(name)), None)
    if column is None:
        return None
    n = int(ACCURACY_COLUMN.match(column).group(1))  # type: ignore[union-attr]  # matched in the line above
    accuracies = pq.read_table(path, columns=[column]).column(column).to_pylist()
    responses = (
        pq.read_table(path, columns=["response_count"]).column("response_count").to_pylist()
        if "response_count" in names
        else [n] * len(rows)
    )
    histogram: Counter[float] = Counter()
    judged: dict[str, list[float]] = {}
    unexplained = []
    for row, language, accuracy, count in zip(rows, languages, accuracies, responses, strict=True):
        if accuracy is None or np.isnan(accuracy):
            continue
        right = accuracy * (count or n)
        if not count or abs(right - round(right)) > 1e-6:
            unexplained.append(row.row_id)
            continue
        histogram[round(accuracy * n, 3)] += 1
        judged.setdefault(language, []).append(accuracy)
    everything = [a for values in judged.values() for a in values]
    return Judged(
        column=column,
        mean=float(np.mean(everything)) if everything else float("nan"),
        histogram={f"{right:g}": rows for right, rows in sorted(histogram.items())},
        by_language={language: float(np.mean(values)) for language, values in judged.items()},
        never_judged=tuple(unexplained),
    )
