"""Rows of a rollout file as the page may rely on them: types are checked once, here, so that nobody checks them again.

What is not declared here does not reach the page. A row with an odd value costs itself and a note.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from aster.data.rollouts import read_rows
from aster.tracking import LATEST


def _as_text(value: object) -> object:
    """A ground truth may be the number 0."""
    return str(value) if isinstance(value, bool | int | float) else value


_Text = Annotated[str, BeforeValidator(_as_text)]
_Seconds = Annotated[float, Field(gt=-LATEST, lt=LATEST)]  # neither NaN nor infinite
_Count = Annotated[int, Field(ge=0)]


class _Call(BaseModel):
    code: str
    seconds: _Seconds
    tool: _Text | None = None
    status: _Text | None = None
    outcome: _Text | None = None
    state_lost: bool | None = None


class _Turn(BaseModel):
    text: tuple[_Count, _Count]
    seconds: _Seconds
    tokens: _Count | None = None
    finish_reason: _Text | None = None
    call: _Call | None = None
    further_calls: list[_Call] = []


class _Truth(BaseModel):
    ground_truth: _Text | None = None


class _Row(BaseModel):
    """Every field may be missing: the reference's rows have a few of them."""

    input: _Text | None = None
    output: _Text | None = None
    pred: _Text | None = None
    ground_truth: _Text | None = None
    non_tensor_reward_model: _Truth | None = None
    data_source: _Text | None = None
    non_tensor_data_source: _Text | None = None
    row_id: _Text | None = None
    uid: _Text | None = None
    sample: int | None = None
    acc: Annotated[float, Field(allow_inf_nan=False)] | None = None
    acc_strict: bool | None = None
    acc_math_verify: bool | None = None
    score: float | None = None
    reward: float | None = None
    stop_reason: _Text | None = None
    error: _Text | None = None
    engine: _Text | None = None
    tool_calls: _Count | None = None
    prompt_tokens: _Count | None = None
    response_tokens: _Count | None = None
    model_tokens: _Count | None = None
    policy_version: int | None = None
    policy_version_oldest: int | None = None
    mean_logprob: float | None = None
    began_unix: _Seconds | None = None
    seconds: _Seconds | None = None
    generate_s: _Seconds | None = None
    tool_s: _Seconds | None = None
    queue_s: _Seconds | None = None
    turns: list[_Turn] | None = None


def sound_rows(path: Path, *, on_bad_row: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """The rows of one file; what is wrong with each of the others goes to `on_bad_row`. Blank lines do not count."""
    bad = 0

    def torn(message: str) -> None:
        nonlocal bad
        bad += 1
        on_bad_row(message)

    for good, row in enumerate(read_rows(path, on_bad_line=torn), 1):
        try:
            sound = _Row.model_validate(row)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            on_bad_row(f"{path}, line {good + bad}: {where}: {first['msg']}")
        else:
            yield sound.model_dump(exclude_unset=True)
