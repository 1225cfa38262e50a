"""Which sampled tokens are thought, which are code, and which one decides to call: entropy means another thing in each.

A turn is a run of model tokens. Its regions, in the order in which they are written:

    Let me multiply . </think> \\n\\n <tool_call> {"name": ... "code": "2*3"} </tool_call> <|im_end|>
    think think think                 call_start  code ...             code

`think` goes up to the end of the thought or to the call, whichever comes first, and is the whole of a turn that has
neither. The text of an answer after its thought belongs to no region. Pure functions of arrays; ids are found as the
tokenizer spells the tags, so a model that spells one otherwise has no such region, rather than a wrong one.

Legend: T tokens of a trajectory · S of a training sequence, prompt included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

REGIONS = ("think", "code", "call_start")


@dataclass(frozen=True)
class Markers:
    """How a tokenizer spells the tags, one or more ids each."""

    call: tuple[int, ...]
    call_end: tuple[int, ...]
    think_end: tuple[int, ...]

    @classmethod
    def of(cls, encode: Callable[[str], Sequence[int] | np.ndarray]) -> Markers:
        """`encode` turns a tag into the ids that the model samples for it."""

        def ids(tag: str) -> tuple[int, ...]:
            return tuple(int(token) for token in encode(tag))

        return cls(call=ids("<tool_call>"), call_end=ids("</tool_call>"), think_end=ids("</think>"))


def regions_of(ids: np.ndarray, mask: np.ndarray, markers: Markers) -> dict[str, np.ndarray]:
    """`{region: [T] bool}` of ids [T] and mask [T] bool (True = sampled).

    >>> found = regions_of(np.array([1, 9, 5, 8, 0, 2]), np.array([1, 1, 1, 1, 0, 1], bool), Markers((9,), (8,), (7,)))
    >>> {name: np.flatnonzero(chosen).tolist() for name, chosen in found.items()}
    {'think': [0, 5], 'code': [2], 'call_start': [1]}
    """
    out = {name: np.zeros(len(ids), bool) for name in REGIONS}
    calls, ends, thoughts = (_places(ids, tag) for tag in (markers.call, markers.call_end, markers.think_end))
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    for turn, (start, stop) in enumerate(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)):
        given = _last(calls, start) if turn == 0 else None
        if given is not None and _first(ends, given, start) == start:  # `tool.force_first_call`: on with the code
            out["code"][start : _first(ends, start, stop)] = True
            continue
        call = _first(calls, start, stop)
        out["think"][start : min(_first(thoughts, start, stop), call)] = True
        if call < stop:
            out["call_start"][call] = True
            begin = call + len(markers.call)
            out["code"][begin : _first(ends, begin, stop)] = True
    return out


@dataclass(frozen=True)
class Sums:
    """Sum and number of a value over the tokens of each region; adds up over trajectories."""

    total: Mapping[str, float]
    count: Mapping[str, int]

    @classmethod
    def of(cls, values: np.ndarray, ids: np.ndarray, mask: np.ndarray, markers: Markers) -> Sums:
        found = regions_of(ids, mask, markers)
        return cls(
            {name: float(values[chosen].sum(dtype=np.float64)) for name, chosen in found.items()},
            {name: int(chosen.sum()) for name, chosen in found.items()},
        )


def region_means(parts: Iterable[Sums]) -> dict[str, float]:
    """Mean over all tokens of each region that has any."""
    listed = list(parts)
    counts = {name: sum(part.count[name] for part in listed) for name in REGIONS}
    return {name: sum(part.total[name] for part in listed) / counts[name] for name in REGIONS if counts[name]}


def _places(ids: np.ndarray, tag: tuple[int, ...]) -> np.ndarray:
    """Where `tag` begins in `ids`, ascending."""
    if not tag or len(ids) < len(tag):
        return np.zeros(0, np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(ids, len(tag))
    return np.flatnonzero((windows == np.array(tag)).all(axis=1))


def _last(places: np.ndarray, stop: int) -> int | None:
    """The last of `places` before `stop`."""
    at = int(np.searchsorted(places, stop)) - 1
    return int(places[at]) if at >= 0 else None


def _first(places: np.ndarray, start: int, stop: int) -> int:
    """The first of `places` in [start, stop), else `stop`."""
    at = int(np.searchsorted(places, start))
    return min(int(places[at]), stop) if at < len(places) else stop
