"""The event loop's clock, moved on by the test: what a deadline does, without waiting for one and without fear that a
stalled machine reaches it first, in another place than the one that is looked at."""

from __future__ import annotations

import asyncio

import pytest


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of the running loop, whose timers follow."""
        self._ahead = 0.0
        loop = asyncio.get_running_loop()
        time = loop.time
        monkeypatch.setattr(loop, "time", lambda: time() + self._ahead)

    def move(self, seconds: float) -> None:
        self._ahead += seconds
