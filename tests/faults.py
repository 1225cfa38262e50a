"""What the fault tests share: a model that shows every loss of state, what must hold of its trajectories, and how to
kill a part of a running stack from outside.

The model knows one conversation by heart: two calls in one session, the second of which needs the first one's variable,
then an answer that is right every other time. So lost state, a repeated cell and a loss booked as a wrong answer show.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import docker
import numpy as np
import psutil
from taught import teach

from aster.agent.rewards import math_verify_verdict
from aster.data.coldstart import final_turn, tool_turn
from aster.data.prompts import user_message
from aster.types import PromptRow, Trajectory

FIRST, SECOND = "x=3*4;print(x)", "import time;time.sleep(1);x+=1;print(x)"
RIGHT, WRONG = "13", "14"
ROWS = [
    PromptRow(f"row-{a}x{b}", ({"role": "user", "content": user_message(f"Let x={a}*{b}. Find x+1.")},), RIGHT, "tiny")
    for a, b in ((3, 4), (4, 3), (2, 6), (6, 2))
]


def taught_model(path: Path) -> Path:
    return teach(
        path,
        [
            [
                *row.messages,
                {"role": "assistant", "content": tool_turn("multiply", FIRST)},
                {"role": "tool", "content": "12\n"},
                {"role": "assistant", "content": tool_turn("add", SECOND)},
                {"role": "tool", "content": "13\n"},
                {"role": "assistant", "content": final_turn("done", answer)},
            ]
            for row in ROWS
            for answer in (RIGHT, WRONG)
        ],
    )


def assert_whole(t: Trajectory) -> None:
    """Nothing of ours shows in a trajectory: its tool answered as if alone, its reward is what its answer earns."""
    n = len(t.ids)
    assert n == len(t.mask) == len(t.versions) == len(t.behaviour_logprobs)
    assert np.isfinite(t.behaviour_logprobs).all()
    if [call.code for call in t.calls] == [FIRST, SECOND]:
        assert [call.observation for call in t.calls] == ["12\n", "13\n"], t
    if t.reward is not None:
        assert t.reward == float(math_verify_verdict(t.final_text, RIGHT)), t


def verifiers() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if "aster.agent.verifier" in p.cmdline()]


def kill_cells(node: str) -> int:
    """SIGKILL to every cell of this Ray node, from outside, as the kernel does when memory is short."""
    label, killed = node[:12], 0
    with suppress(docker.errors.DockerException):  # no daemon, then no cell is a container
        for container in docker.from_env().containers.list(filters={"label": f"aster.node={label}"}):
            container.kill()
            killed += 1
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(f"/{label}-" in word for word in process.cmdline()):
                process.kill()
                killed += 1
    return killed
