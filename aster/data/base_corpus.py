"""The base corpus of the small model: copying, which the cold start presupposes and is too short to teach.

A model of this size that starts from nothing learns the format of a trajectory long before it learns to copy a number
out of the problem. Three drills get it there, and the order matters: short echoes first, since copying appears on them
within a hundred steps, then the two that copy at the distances of a trajectory. No cell is executed here; the numbers
a tool would print are computed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from aster.data.coldstart import Messages, final_turn, tool_turn
from aster.data.prompts import user_message
from aster.data.tasks import FAMILIES, Problem, is_heldout

_ECHO_CHARACTERS = "0123456789=()+*%<,;"
_TRANSCRIBE_SHARE = 0.6
_MOST = 10_000  # a result of at most four digits: reading it back is the exercise


def base_conversations(
    *, echoes: int, drills: int, seed: int, families: Sequence[str] = tuple(FAMILIES)
) -> list[Messages]:
    """`echoes` short copies, then `drills` transcriptions and calculations; to be read in this order."""
    rng = random.Random(f"aster-base/{seed}")
    out = [_echo(rng) for _ in range(echoes)]
    for _ in range(drills):
        out.append(_transcribe(rng, families) if rng.random() < _TRANSCRIBE_SHARE else _calculate(rng))
    return out


def _echo(rng: random.Random) -> Messages:
    """Repeat a random line, mostly a short one."""
    length = min(24, 3 + int(rng.expovariate(1 / 3)))
    line = "".join(rng.choice(_ECHO_CHARACTERS) for _ in range(length))
    return [{"role": "user", "content": f"Echo {line}"}, {"role": "assistant", "content": line}]


def _transcribe(rng: random.Random, families: Sequence[str]) -> Messages:
    """A problem of the task, and all its cells that hold a number, in one call: from words to code.

    The thought is the plan's first one that holds a number of the problem, where there is one.
    """
    problem = _trainable(rng, families)
    thought = next((t for t, _ in problem.plan if any(c.isdigit() for c in t)), "copy")
    cells = dict.fromkeys(code for _, code in problem.plan if any(c.isdigit() for c in code))
    return [
        {"role": "user", "content": user_message(problem.text)},
        {"role": "assistant", "content": tool_turn(thought, ";".join(cells))},
    ]


def _trainable(rng: random.Random, families: Sequence[str]) -> Problem:
    while True:  # one problem in ten is held out
        problem = FAMILIES[rng.choice(families)](rng)
        if not is_heldout(problem.text):
            return problem


def _calculate(rng: random.Random) -> Messages:
    """An expression into a call, and the result read back twice."""
    expression, value = _expression(rng)
    ask = rng.choice(["Find {}.", "Let x={}. Find x.", "Find the sum of {}.", "Count {}."])
    code = rng.choice(["print({})", "y={};print(y)", "x={};print(x)", "s={};print(s)"])
    thought = rng.choice(["copy", "add", "multiply", "reduce"])
    return [
        {"role": "user", "content": user_message(ask.format(expression))},
        {"role": "assistant", "content": tool_turn(thought, code.format(expression))},
        {"role": "tool", "content": str(value)},
        {"role": "assistant", "content": final_turn(f"{value}, done", str(value))},
    ]


def _expression(rng: random.Random) -> tuple[str, int]:
    while True:  # about one draw in two is in range
        if rng.random() < 0.4:
            a, b, c = (rng.randint(1, 99) for _ in range(3))
            text = f"({a}{rng.choice('+*-')}{b}){rng.choice('*%+')}{c}"
        else:
            terms = [str(rng.randint(1, 99))]
            for _ in range(min(5, 1 + int(rng.expovariate(1 / 1.2)))):
                terms += [rng.choice("++**-%"), str(rng.choice([rng.randint(1, 9), rng.randint(10, 99)]))]
            text = "".join(terms)
        value = eval(text, {"__builtins__": {}})  # digits and five operators, written three lines above
        if 0 <= value < _MOST:
            return text, value
