"""An episode that is kept turn by turn, and that goes on from what a killed run or a lost attempt kept of it.

    recalled turns                                 | new turns
    generate, answer, observe give what was kept   | before the first new call the old ones run again, in a fresh
    engine and sandbox are not asked               | session, and have to answer what they answered then

The agent loop does not know: it takes the same way through the kept turns as it took then, and so arrives in the same
state. Turns are kept when their observation stands, or when the trajectory has ended; what was half done then is done
again, with its seed. A cell that answers otherwise, or ended by the clock, leaves a session that nobody can vouch for:
`PastDiffers`, and the trajectory begins afresh.
"""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from aster.agent.episode import Episode
from aster.agent.grammar import ParsedCall, ParsedTurn
from aster.data.journal import prompt_digest
from aster.types import FinishedTurn, Task, ToolCall, ToolOutcome, Trajectory, Turn

log = logging.getLogger(__name__)

_REPEATABLE = frozenset({"ok", "error"})  # how far a cell came that was stopped is chance


class Journal(Protocol):
    """Where finished turns go (`data.journal.TurnJournal`)."""

    def append(self, task: Task, prompt: str, number: int, turn: FinishedTurn) -> None: ...


class PastDiffers(Exception):
    """The session of a recalled trajectory cannot be made again."""


class KeptEpisode(Episode):
    """`Episode` with a journal and a past, both of which may be missing: a tree has neither, and begins afresh."""

    def __init__(self, task: Task, *, journal: Journal | None = None, **episode: Any) -> None:
        super().__init__(task, **episode)
        self._journal = journal
        self._prompt = prompt_digest(self._prompt_ids)
        self._past: deque[FinishedTurn] = deque()
        if task.past is not None and task.past.prompt == self._prompt:
            self._past.extend(task.past.turns)
        elif task.past is not None:
            log.warning("%s starts afresh: its prompt is another one than when it was kept", task.uid)
        self.recalled_turns = 0
        self._recalled: FinishedTurn | None = None  # the latest turn, if it is one
        self._to_repeat: list[tuple[ParsedCall, ToolCall, str]] = []  # calls that the session has not seen
        self._seen: tuple[str, ...] = ()
        self._unkept: int | None = None  # where in the token stream's chunks the turn begins that is not kept yet

    # the loop's side -------------------------------------------------------------------------------------------------

    async def generate(self) -> Turn:
        self.finish_turn()  # a loop may go on without an observation
        self._seen = ()
        if not self._past:
            self._recalled, began = None, len(self._ids)
            turn = await super().generate()
            self._unkept = began
            return turn
        kept = self._recalled = self._past.popleft()
        self.recalled_turns += 1
        n = kept.turn.stop - kept.turn.start
        self._append(kept.ids[:n], kept.mask[:n], kept.logprobs[:n], kept.versions[:n])
        turn = replace(kept.turn, began_s=0.0, ended_s=0.0, call=None, further_calls=())
        self.turns.append(turn)
        return turn

    async def answer(self, parsed: ParsedTurn) -> list[ToolCall]:
        if self._recalled is None:
            await self._repeat()
            calls = await super().answer(parsed)
            self._seen = tuple(_digest(call) for call in calls)
            return calls
        turn = self._recalled.turn
        assert turn.call is not None, f"{self.task.uid}: turn {len(self.turns) - 1} was kept without its call"
        calls = [replace(call, seconds=0.0, queue_s=0.0) for call in (turn.call, *turn.further_calls)]
        self._to_repeat += zip(parsed.calls, calls, self._recalled.seen, strict=False)
        self.calls_made += len(calls)
        self._record(calls)
        return calls

    def observe(self, calls: Sequence[ToolCall]) -> bool:
        if self._recalled is None:
            if not super().observe(calls):
                return False
            self.finish_turn()
            return True
        kept, n = self._recalled, self._recalled.turn.stop - self._recalled.turn.start
        if len(kept.ids) > n:
            self._append(kept.ids[n:], kept.mask[n:], kept.logprobs[n:], kept.versions[n:])
        return len(kept.ids) > n

    # keeping and recalling -------------------------------------------------------------------------------------------

    def finish_turn(self) -> None:
        """The latest turn is finished: its observation stands, or the loop came to a cause of the model's."""
        since, self._unkept = self._unkept, None
        if since is None or self._journal is None:
            return
        turn = FinishedTurn(
            turn=self.turns[-1],
            ids=np.concatenate(self._ids[since:]),
            mask=np.concatenate(self._mask[since:]),
            logprobs=np.concatenate(self._logprobs[since:]),
            versions=np.concatenate(self._versions[since:]),
            seen=self._seen,
        )
        self._journal.append(self.task, self._prompt, len(self.turns) - 1, turn)

    async def _repeat(self) -> None:
        """Run the recalled calls again, in order. Raises `PastDiffers`, and what the tools raise."""
        calls, self._to_repeat = self._to_repeat, []
        made = self.calls_made
        for number, (call, then, seen) in enumerate(calls, 1):
            if then.outcome is ToolOutcome.FORMAT_ERROR:  # it never reached a tool
                continue
            if then.status not in _REPEATABLE or then.state_lost:
                raise PastDiffers(f"call {number} ended with {then.status}, which cannot be repeated")
            if _digest(await self._answer(call)) != seen:
                raise PastDiffers(f"call {number} answered otherwise when it ran again")
        self.calls_made = made

    def trajectory(self, *args: Any, **more: Any) -> Trajectory:
        return replace(super().trajectory(*args, **more), recalled_turns=self.recalled_turns)


def _digest(call: ToolCall) -> str:
    """Of what a call answered. Compared before any cut, since the cut depends on the room that was left."""
    text = f"{call.status}\n{call.outcome}\n{call.observation}"
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
