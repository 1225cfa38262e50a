"""The page's colours: every text on what it stands on, light and dark, has the contrast of WCAG AA."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

STYLE = (Path(__file__).parents[2] / "aster" / "page" / "style.css").read_text("utf-8")
ON = {
    "bg": "ink soft accent good bad warn r0 r1 r2 r3 r4 r5 r6 r7 bt0 bt1 bt2 bt3 bt4 bt5",
    "card": "ink soft accent",
    "good-bg": "good",
    "bad-bg": "bad ink",
    "warn-bg": "warn",
    "line2": "soft",
    "obs-bg": "soft",
    "model-bg": "ink",
    "code": "ink k s c n",
    **{f"b{n}": f"bi{n}" for n in range(6)},
}


def _palette(selector: str) -> dict[str, str]:
    block = re.search(re.escape(selector) + r" \{(.*?)\n\}", STYLE, re.DOTALL)
    assert block is not None
    return dict(re.findall(r"--([\w-]+): #([0-9a-f]{3,6});", block[1]))


def _luminance(colour: str) -> float:
    """https://www.w3.org/TR/WCAG22/#dfn-relative-luminance"""
    full = "".join(2 * c for c in colour) if len(colour) == 3 else colour
    channels = [int(full[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_black_on_white_has_the_contrast_of_the_standard() -> None:
    assert _contrast("000", "ffffff") == pytest.approx(21)


@pytest.mark.parametrize("selector", [":root", ':root[data-theme="dark"]'])
def test_every_text_can_be_read_on_its_ground(selector: str) -> None:
    colours = _palette(selector)
    pairs = [(text, ground) for ground, texts in ON.items() for text in texts.split()]
    faint = {f"{t} on {g}": round(_contrast(colours[t], colours[g]), 2) for t, g in pairs}
    assert {pair: value for pair, value in faint.items() if value < 4.5} == {}
