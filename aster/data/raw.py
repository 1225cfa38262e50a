"""Raw problem sets, whatever their columns, become rows of the paper's prompt files. What is left out is listed.

    records -> problem and answer -> deduplicated -> decontaminated -> short enough -> PromptRow

Reading is streaming: the original DAPO-Math-17k file holds a hundred copies of each row.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from aster.data.answers import last_boxed
from aster.data.formats import valid
from aster.data.prompts import INSTRUCTION, user_message
from aster.errors import DataError
from aster.types import PromptRow

PROBLEM_COLUMNS = ("problem", "question", "prompt", "source_prompt", "input")
ANSWER_COLUMNS = ("reward_model.ground_truth", "answer", "final_answer", "ground_truth", "solution", "expected_answer")
ID_COLUMNS = ("row_id", "extra_info.index", "uuid", "unique_id")

NGRAM, SHARE = 8, 0.4
"""When a problem is contaminated (`Overlap`). Against AIME25 and HMMT25 these flag 5 of the 5,104 published rows, where
one shared run of 10 words would flag 262; of the 60 problems themselves 59 are still found cut in half, all with one
word in twenty lost, 52 with every number replaced."""
_SHORTEST = 5  # words: fewer are a phrase of any problem
_ANSWER_CHARS = 400  # longer is a worked solution, not an answer that a verifier can compare
_WORD = re.compile(r"[a-z0-9]+|[\u3400-\u9fff]")
_DAPO_HEAD = re.compile(
    r"\ASolve the following math problem step by step\. The last line of your response.*?\n\n", re.S
)
_DAPO_TAIL = re.compile(r"\n\nRemember to put your answer on its own line after \"Answer:\"\.\s*\Z")
_FINAL_LINE = re.compile(r"^#### *(.+)\Z", re.M)  # how GSM8K ends a solution


@dataclass(frozen=True)
class Columns:
    """Where a record keeps what we need; "" = the first of the usual names that is there. Dots reach into structs."""

    problem: str = ""
    answer: str = ""
    row_id: str = ""


@dataclass(frozen=True)
class Dropped:
    """One record that is not among the rows. `where`: file and record number, from 0."""

    where: str
    reason: str
    problem: str = ""
    detail: str = ""


@dataclass
class Collected:
    rows: list[PromptRow] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    records: int = 0
    copies: int = 0
    """Records whose problem and answer were seen before; counted, not listed."""
    renamed: int = 0
    """Rows whose own id another row had already."""

    def reasons(self) -> dict[str, int]:
        out: dict[str, int] = {}
        for drop in self.dropped:
            out[drop.reason] = out.get(drop.reason, 0) + 1
        return dict(sorted(out.items()))


def collect(
    files: Sequence[Path],
    *,
    source: str,
    columns: Columns = Columns(),
    contaminated_by: Callable[[str], str] = lambda _: "",
    prompt_tokens: Callable[[PromptRow], int] | None = None,
    max_prompt_tokens: int = 2048,
) -> Collected:
    """All files as rows of `source`, in order of first appearance.

    `contaminated_by(problem)` names the evaluation row that the problem overlaps with, or is empty. A problem that
    comes back with another answer is dropped whole: one of the two is wrong. Raises `DataError` for a file that cannot
    be read, or has no usable column.
    """
    out = Collected()
    answers: dict[str, str] = {}
    conflicting: set[str] = set()
    kept: dict[str, PromptRow] = {}
    ids: set[str] = set()
    for file in files:
        for number, record in enumerate(read_records(file)):
            where = f"{file}:{number}"
            out.records += 1
            if isinstance(record, str):
                out.dropped.append(Dropped(where, "unreadable", detail=record))
                continue
            problem, answer, reason = _extract(record, columns, where=where)
            if valid(problem + answer) != problem + answer:
                reason, answer = "unreadable", "not Unicode: half of a surrogate pair"
            if reason:
                out.dropped.append(Dropped(where, reason, problem, answer[:200]))
                continue
            key = fingerprint(problem)
            if key in answers:
                out.copies += 1
                if answers[key] != answer and key not in conflicting:
                    conflicting.add(key)
                    out.dropped.append(Dropped(where, "two answers", problem, f"{answers[key]!r} and {answer!r}"))
                continue
            answers[key] = answer
            row, renamed = _row(record, problem, answer, key, source=source, column=columns.row_id, taken=ids)
            ids.add(row.row_id)
            out.renamed += renamed
            overlap = contaminated_by(problem)
            tokens = prompt_tokens(row) if prompt_tokens and not overlap else 0
            if overlap:
                out.dropped.append(Dropped(where, "contaminated", problem, overlap))
            elif tokens > max_prompt_tokens:
                detail = f"{tokens} tokens with the tool block, above {max_prompt_tokens}"
                out.dropped.append(Dropped(where, "too long", problem, detail))
            else:
                kept[key] = row
    out.rows = [row for key, row in kept.items() if key not in conflicting]
    return out


# reading --------------------------------------------------------------------------------------------------------------


def read_records(path: Path) -> Iterator[dict[str, Any] | str]:
    """Records of a parquet, JSON Lines or JSON file; a line that is no object comes as words that say so."""
    if not path.is_file():
        raise DataError(f"{path} {'is a directory: name a file in it' if path.is_dir() else 'does not exist'}")
    if path.suffix == ".parquet":
        yield from _parquet(path)
    elif path.suffix in (".jsonl", ".ndjson"):
        yield from _json_lines(path)
    elif path.suffix == ".json":
        yield from _json_array(path)
    else:
        raise DataError(f"{path}: unknown kind of file {path.suffix!r}; give .parquet, .jsonl or .json")


def _parquet(path: Path) -> Iterator[dict[str, Any] | str]:
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=4096):
            try:
                records: list[dict[str, Any] | str] = batch.to_pylist()
            except UnicodeDecodeError:  # some row's text; which one is seen by reading them one by one
                records = [_one_record(batch.slice(row, 1)) for row in range(batch.num_rows)]
            yield from records
    except (pa.ArrowInvalid, pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file: {error}") from None


def _one_record(row: pa.RecordBatch) -> dict[str, Any] | str:
    try:
        return dict(row.to_pylist()[0])
    except UnicodeDecodeError as error:
        return f"not UTF-8: {error.reason} at byte {error.start}"


def _json_lines(path: Path) -> Iterator[dict[str, Any] | str]:
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            text = line if number else line.removeprefix(codecs.BOM_UTF8)
            if not text.strip():
                continue
            try:
                record = json.loads(text.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield f"not UTF-8: {error.reason} at byte {error.start}"
            except (ValueError, RecursionError) as error:
                yield f"not JSON: {error}"
            else:
                yield record if isinstance(record, dict) else f"a JSON {type(record).__name__}, not an object"


def _json_array(path: Path) -> Iterator[dict[str, Any] | str]:
    try:
        content = json.loads(path.read_text("utf-8-sig"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not a readable JSON file: {error}") from None
    if not isinstance(content, list):
        raise DataError(f"{path} holds a JSON {type(content).__name__}: give an array of objects, or JSON Lines")
    for record in content:
        yield record if isinstance(record, dict) else f"a JSON {type(record).__name__}, not an object"


# one record -----------------------------------------------------------------------------------------------------------


def _extract(record: Mapping[str, Any], columns: Columns, *, where: str) -> tuple[str, str, str]:
    """Problem, answer, and why the record cannot be used or ""."""
    values = []
    for name, given, usual in (
        ("problem", columns.problem, PROBLEM_COLUMNS),
        ("answer", columns.answer, ANSWER_COLUMNS),
    ):
        names = (given,) if given else usual
        if not any(n.partition(".")[0] in record for n in names):
            raise DataError(
                f"{where}: no column {' or '.join(names)} for the {name}; the record has {', '.join(sorted(record))}: "
                f"name the right one with --columns {name}=NAME"
            )
        values.append(_first(record, names))
    problem, (answer, reason) = _problem_text(values[0]), _answer_text(values[1])
    return problem, answer, reason if problem.strip() else "no problem"


def _first(record: Mapping[str, Any], names: Sequence[str]) -> Any:
    for name in names:
        value = _whole(_get(record, name))
        if value is not None:
            return value
    return None


def _get(record: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        if not isinstance(record, Mapping):
            return None
        record = record.get(part)
    return record


def _whole(value: Any) -> Any:
    """A column of integers with a hole is one of floats, the hole NaN, once pandas has written it: taken back here."""
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() else value


def _problem_text(value: Any) -> str:
    """The bare problem: the last user message of a list, without the frames that DAPO and we put around it."""
    if isinstance(value, list):
        users = [m.get("content", "") for m in value if isinstance(m, Mapping) and m.get("role") == "user"]
        value = users[-1] if users else ""
    text = value if isinstance(value, str) else ""
    if text.endswith(INSTRUCTION):
        return text.removesuffix(INSTRUCTION).removeprefix("\n")
    return _DAPO_TAIL.sub("", _DAPO_HEAD.sub("", text))


def _answer_text(value: Any) -> tuple[str, str]:
    r"""(the answer alone, why it cannot be used or ""). Of a worked solution: what its last box holds,
    or its last line after `####`.

    >>> _answer_text('["$\\\\frac{1}{2}$"]'), _answer_text(70), _answer_text("[1, 2]"), _answer_text(["1", "2"])
    (('$\\frac{1}{2}$', ''), ('70', ''), ('[1, 2]', ''), ('1; 2', 'several answers'))
    """
    if isinstance(value, str) and value.lstrip().startswith('["'):  # a list of answers as JSON, as Skywork-OR1 has it
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if isinstance(value, list) and len(value) > 1:
        return "; ".join(map(str, value)), "several answers"
    if isinstance(value, list):
        value = _whole(value[0]) if value else None
    if isinstance(value, bool) or (value is not None and not isinstance(value, str | int | float)):
        return str(value), "answer is no text"
    text = str(value if value is not None else "").strip()
    if (boxed := last_boxed(text)) is not None:
        text = boxed.strip()
    elif final := _FINAL_LINE.search(text):
        text = final[1]
    if len(text) > _ANSWER_CHARS or "\n" in text or "\\boxed" in text:
        return text, "answer is a text"
    return text, "" if text else "no answer"


def _row(
    record: Mapping[str, Any], problem: str, answer: str, key: str, *, source: str, column: str, taken: set[str]
) -> tuple[PromptRow, bool]:
    """The row under the file's own id where that is free, else under a hash of the problem (stable over files and
    orders); and whether the id was taken.

    A plain `id` is a number in most sets and says nothing without its source, which stands before it as in
    `prompts.read_prompts`.
    """
    own = _first(record, (column,) if column else ID_COLUMNS)
    if own is None and not column and (number := _first(record, ("id",))) is not None:
        own = f"{source}-{number}"
    own = None if own is None else valid(str(own))
    renamed = own in taken
    ability = record.get("ability")
    row = PromptRow(
        row_id=f"{source}-{key[:16]}" if own is None or renamed else own,
        messages=({"role": "user", "content": user_message(problem)},),
        ground_truth=answer,
        data_source=source,
        extra={"ability": valid(str(ability))} if ability else {},
    )
    return row, renamed


def fingerprint(problem: str) -> str:
    """Equal for problems that differ in case, blanks and Unicode form only."""
    text = " ".join(unicodedata.normalize("NFKC", problem).casefold().split())
    return hashlib.sha256(valid(text).encode()).hexdigest()


# contamination --------------------------------------------------------------------------------------------------------


class Overlap:
    """Names the evaluation row that a problem contains too much of, and how much; words are compared, not signs.

    A word of an evaluation problem is contained when it is part of `n` words in a row that both have (a CJK character
    counts as a word); a problem is contaminated when at least `share` of an evaluation problem's words are. A phrase
    alone is no contamination: "where m and n are relatively prime positive integers" stands in every second
    competition problem. An evaluation problem of fewer than `n` words must be contained whole, one of fewer than 5 is
    compared exactly.

    >>> row = PromptRow("aime-1", ({"role": "user", "content": "a b c d e f"},), "1", "aime")
    >>> seen = Overlap([row], n=3, share=0.5)
    >>> seen("x a b c y d e f"), seen("x a b c y"), seen("a b x c d y e f")
    ('aime-1 (100% of its words)', 'aime-1 (50% of its words)', '')
    """

    def __init__(self, rows: Iterable[PromptRow], *, n: int = NGRAM, share: float = SHARE) -> None:
        self._share = share
        self._ids: list[str] = []
        self._words: list[int] = []  # of each evaluation problem
        self._grams: dict[tuple[str, ...], list[tuple[int, int]]] = {}  # where each stands: (problem, first word)
        self._whole: dict[str, str] = {}
        for number, row in enumerate(rows):
            problem = _problem_text(list(row.messages))
            words = _WORD.findall(problem.lower())
            self._whole[fingerprint(problem)] = row.row_id
            self._ids.append(row.row_id)
            self._words.append(len(words))
            size = min(n, len(words))
            if size >= min(n, _SHORTEST):
                for start in range(len(words) - size + 1):
                    self._grams.setdefault(tuple(words[start : start + size]), []).append((number, start))
        self._sizes = sorted({len(gram) for gram in self._grams})

    def __call__(self, problem: str) -> str:
        problem = _problem_text(problem)
        if exact := self._whole.get(fingerprint(problem)):
            return f"{exact} (the same problem)"
        words = _WORD.findall(problem.lower())
        contained: dict[int, set[int]] = {}
        for size in self._sizes:
            for start in range(len(words) - size + 1):
                for number, at in self._grams.get(tuple(words[start : start + size]), ()):
                    contained.setdefault(number, set()).update(range(at, at + size))
        shares = {number: len(found) / self._words[number] for number, found in contained.items()}
        worst = max(shares, key=lambda number: shares[number], default=None)
        if worst is None or shares[worst] < self._share:
            return ""
        return f"{self._ids[worst]} ({shares[worst]:.0%} of its words)"
