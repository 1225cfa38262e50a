"""The answer that a text of a model or of a solution gives: what its last box holds."""

from __future__ import annotations

BOX = "\\boxed{"


def last_boxed(text: str) -> str | None:
    r"""None without a box, and where the last one never closes.

    >>> last_boxed(r"\boxed{3} and \boxed{\frac{1}{\sqrt{2}}}."), last_boxed(r"\boxed{3} and \boxed{4")
    ('\\frac{1}{\\sqrt{2}}', None)
    """
    start = text.rfind(BOX)
    if start < 0:
        return None
    depth = 0
    for at in range(start + len(BOX) - 1, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[start + len(BOX) : at]
    return None
