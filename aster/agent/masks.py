"""A training sample for a person's eyes: its tokens, and which of them the loss is taken on. Text only."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from rich.text import Text

from aster.agent.chat import ChatRenderer
from aster.types import Sample

_TRAINED = ("bold black on green", "bold black on bright_green")  # token borders show, on 16 colours too
_CONTEXT = ("grey62", "grey46")


def masks_text(sample: Sample, renderer: ChatRenderer) -> Text:
    """One heading per stretch of the sample with its number of tokens, below it the tokens; green = trained on."""
    out = Text()
    borders = np.flatnonzero(np.diff(sample.mask)) + 1
    for ids, mask in zip(np.split(sample.ids, borders), np.split(sample.mask, borders), strict=True):
        trained = bool(mask[0])
        out.append(f"--- {'trained' if trained else 'context'}: {len(ids)} tokens ---\n", style="bold")
        for number, piece in enumerate(_pieces(ids, renderer)):
            out.append(piece.replace("\n", "↵\n"), style=(_TRAINED if trained else _CONTEXT)[number % 2])
        out.append("\n")
    return out


def _pieces(ids: np.ndarray, renderer: ChatRenderer) -> Iterator[str]:
    """The text of each token; tokens that share a character come as one piece."""
    start = 0
    for stop in range(1, len(ids) + 1):
        text = renderer.decode(ids[start:stop])
        if text.endswith("\ufffd") and stop - start < 4 and stop < len(ids):
            continue
        yield text
        start = stop
