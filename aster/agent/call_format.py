"""Which tokens of a conversation are the form of a call, as against what it says. For measuring, not for training.

Of `<tool_call>\\n{"name": "code_interpreter", "arguments": {"code": "print(1)"}}\\n</tool_call>` the form is everything
after the opening tag but the code itself. The token that ends the code belongs to it: a code that goes on for ever is
no call. The opening tag does not: whether to call is a decision, not a format.
"""

from __future__ import annotations

import re

import numpy as np

from aster.agent.chat import ChatRenderer

_CALL = re.compile(r"<tool_call>(.*?</tool_call>)", re.DOTALL)
_CODE_BEGINS = re.compile(r'"code"\s*:\s*"')


def call_forms(ids: np.ndarray, mask: np.ndarray, renderer: ChatRenderer) -> list[np.ndarray]:
    """For each call in the masked turns of a sample (`ids` [S], `mask` [S]): where in `ids` its form stands, int64."""
    out = []
    for start, stop in runs(mask):
        turn = ids[start:stop]
        text = renderer.decode(turn)
        for call in _CALL.finditer(text):
            code = _CODE_BEGINS.search(text, call.start(1), call.end(1))
            if code is None:
                continue
            closing = text.rfind('"', code.end(), call.end(1))
            pieces = ((call.start(1), code.end()), (closing, call.end(1)))
            where = [_tokens(turn, first, last, renderer) for first, last in pieces]
            out.append(start + np.unique(np.concatenate(where)))
    return out


def runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """The stretches of True, as (start, stop).

    >>> runs(np.array([False, True, True, False, True]))
    [(1, 3), (4, 5)]
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return [(int(start), int(stop)) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def _tokens(turn: np.ndarray, first: int, last: int, renderer: ChatRenderer) -> np.ndarray:
    """Tokens that hold the characters first..last (exclusive) of the turn's text."""
    start = _covering(turn, first + 1, renderer) - 1
    return np.arange(start, _covering(turn, last, renderer))


def _covering(turn: np.ndarray, characters: int, renderer: ChatRenderer) -> int:
    """The fewest tokens whose text has so many characters. Characters at a border are ASCII, so none is half there."""
    low, high = 0, len(turn)
    while low < high:
        middle = (low + high) // 2
        if len(renderer.decode(turn[:middle])) >= characters:
            high = middle
        else:
            low = middle + 1
    return low
