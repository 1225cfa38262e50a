"""What a tool is, and the one that the paper has: a cell in a stateful Python session.

An agent loop names its tools (`rollout.AgentLoop`). Another package brings its own, with or without a sandbox; the
README's "Your own environment" shows one. What a call looks like in the model's text is the business of `grammar.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from aster.agent.grammar import CODE_INTERPRETER
from aster.agent.observations import loses_state, observe, tells_of_fresh
from aster.agent.session import ToolSession
from aster.types import ToolOutcome


@dataclass(frozen=True)
class Observed:
    """What became of one call: the text that the model reads, and the bucket that the call counts in."""

    text: str
    outcome: ToolOutcome = ToolOutcome.SUCCESS
    status: str = "ok"  # the tool's own word, for the records
    state_lost: bool = False


class Tool(Protocol):
    """One function that the model may call. An instance serves all trajectories: their state is in the session."""

    @property
    def schema(self) -> Mapping[str, Any]:
        """OpenAI's form, as the template shows it to the model and as arguments are checked before `run`."""
        ...

    @property
    def needs_sandbox(self) -> bool: ...

    async def run(self, arguments: Mapping[str, Any], session: ToolSession) -> Observed:
        """One call, on the engine's event loop: await what takes long.

        `FormatError` tells the model what is wrong with its arguments; `SandboxLost` says that the failure is ours, so
        that the trajectory runs again elsewhere and is never a wrong answer; anything else is a bug and ends the run.
        """
        ...


@dataclass(frozen=True)
class PythonTool:
    """`code_interpreter(code)`: variables live as long as the trajectory."""

    schema: Mapping[str, Any] = field(default_factory=lambda: CODE_INTERPRETER, hash=False)
    needs_sandbox: bool = True

    async def run(self, arguments: Mapping[str, Any], session: ToolSession) -> Observed:
        response = await session.execute(arguments["code"])
        text, outcome = observe(
            response, timeout_s=session.timeout_s, session_id=session.session_id, loss_told=session.loss_told
        )
        session.loss_told = tells_of_fresh(response)
        return Observed(text, outcome, status=str(response.status), state_lost=loses_state(response))
