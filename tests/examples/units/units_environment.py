"""An environment of another package: a table of units instead of Python, its own loop and its own reward.

A data row asks for it with `agent_name: units_agent`. Aster finds it by the entry points in pyproject.toml.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from aster.agent.episode import Episode
from aster.agent.grammar import FormatError
from aster.agent.rollout import AgentLoop
from aster.agent.session import ToolSession
from aster.agent.tools import Observed
from aster.types import Cause

METRES = {"metre": 1.0, "kilometre": 1000.0, "mile": 1609.344, "foot": 0.3048, "inch": 0.0254}


class Convert:
    """`convert(value, unit, to)`. Refuses what it has already answered: it remembers, for each trajectory apart."""

    needs_sandbox = False
    schema: Mapping[str, Any] = {
        "type": "function",
        "function": {
            "name": "convert",
            "description": "Converts a length.",
            "parameters": {
                "type": "object",
                "properties": {
                    "value": {"type": "number"},
                    "unit": {"type": "string", "enum": list(METRES)},
                    "to": {"type": "string", "enum": list(METRES)},
                },
                "required": ["value", "unit", "to"],
            },
        },
    }

    async def run(self, arguments: Mapping[str, Any], session: ToolSession) -> Observed:
        asked = (arguments["value"], arguments["unit"], arguments["to"])
        seen = session.memory.setdefault("asked", [])
        if asked in seen:
            raise FormatError("this has been answered before")
        seen.append(asked)
        return Observed(f"{arguments['value'] * METRES[arguments['unit']] / METRES[arguments['to']]:.6g}")


async def convert_then_answer(episode: Episode) -> Cause:
    """Like `code_agent`, but a wrong call is the last one."""
    while True:
        turn = await episode.generate()
        if turn.finish_reason == "length":
            return Cause.MAX_TOKENS
        parsed = episode.parse(turn)
        if not parsed.attempted:
            return Cause.ANSWERED
        if episode.calls_left <= 0:
            return Cause.MAX_TOOL_CALLS
        calls = await episode.answer(parsed)
        if calls[-1].outcome != "success":
            return Cause.MALFORMED_END
        if not episode.observe(calls):
            return Cause.OBSERVATION_OVERFLOW


def within_a_percent(final_text: str, ground_truth: str) -> float:
    """Runs in a worker process of the reward pool, with a time limit."""
    numbers = re.findall(r"-?\d+(?:\.\d+)?", final_text)
    return float(bool(numbers) and abs(float(numbers[-1]) / float(ground_truth) - 1) < 0.01)


UNITS = AgentLoop(convert_then_answer, tools=(Convert(),), reward="within_a_percent")
