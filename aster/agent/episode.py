"""The state of one trajectory while it runs: its token stream, its turns, its tools' session, its deadline.

An agent loop (`rollout.py`) decides what happens next; this file makes it happen token-exactly. Ids that the engine
produced are appended as they are, never decoded and encoded again.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import numpy as np

from aster.agent.chat import ChatRenderer
from aster.agent.grammar import FormatError, ParsedCall, ParsedTurn, read_arguments
from aster.agent.observations import FORMAT_ERROR, extra_calls, truncate_chars, truncate_tokens
from aster.agent.session import ToolSession
from aster.agent.tools import Tool
from aster.config import ToolConfig
from aster.data.formats import valid
from aster.errors import ConfigError, DataError, EngineLost, SandboxLost
from aster.roles import SandboxFactory
from aster.types import Cause, Sampling, Task, Timing, ToolCall, ToolOutcome, Trajectory, Turn


@dataclass(frozen=True)
class Generation:
    """What the engine sampled: ids, their log-probs under the sampling distribution, the policy version of each."""

    ids: np.ndarray  # [N] int32, the stop token included
    logprobs: np.ndarray  # [N] float32
    versions: np.ndarray  # [N] int32
    finish_reason: str  # "stop" | "length" | "abort"


class Generate(Protocol):
    """One turn of one engine. Raises EngineLost; an aborted request returns what it has, with "abort".

    An answer that is not whole (no ids or too many, other lengths, a log-prob that is no number) counts as EngineLost.
    """

    async def __call__(
        self,
        ids: np.ndarray,
        *,
        max_tokens: int,
        sampling: Sampling,
        stop_token_ids: tuple[int, ...],
        seed: int,
        request_id: str,
    ) -> Generation: ...


class Aborted(Exception):
    """The engine was told to drop the request; the trajectory ends as cancelled, at its last whole turn."""


def turn_seed(seed: int, turn: int) -> int:
    """63 bits; a turn that is generated again after a restart is generated with the same seed."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{turn}".encode(), digest_size=8).digest(), "big") >> 1


class Episode:
    """One running trajectory. Awaits raise EngineLost, SandboxError or Aborted; `trajectory` packs what there is."""

    def __init__(
        self,
        task: Task,
        *,
        generate: Generate,
        sandboxes: SandboxFactory | None,
        renderer: ChatRenderer,
        tool: ToolConfig,
        engine: str,
        tools: Sequence[Tool],
        deadline: float | None = None,
    ) -> None:
        """`renderer` is one for the loop's tools; `tools` is empty where they are switched off. `deadline` on the event
        loop's clock; None = the task's seconds from now."""
        self.task = task
        self.tool = tool
        self.renderer = renderer
        self.turns: list[Turn] = []
        self.calls_made = 0
        self.before_turn: Callable[[int], Awaitable[None]] | None = None  # called with the number of the coming turn
        self._generate = generate
        self._engine = engine
        self._tools = {str(tool.schema["function"]["name"]): tool for tool in tools}
        self._began_unix, self._began = time.time(), time.monotonic()
        own = asyncio.get_running_loop().time() + task.budget.trajectory_timeout_s
        self._deadline = own if deadline is None else deadline
        self._prompt_ids = renderer.prompt_ids(task.messages, tools_enabled=bool(tools))
        if len(self._prompt_ids) > task.budget.max_prompt_tokens:
            raise DataError(
                f"row {task.row_id!r}: the prompt has {len(self._prompt_ids)} tokens, more than "
                f"budget.max_prompt_tokens={task.budget.max_prompt_tokens}: raise the budget or drop the row"
            )
        self._ids: list[np.ndarray] = []
        self._mask: list[np.ndarray] = []
        self._logprobs: list[np.ndarray] = []
        self._versions: list[np.ndarray] = []
        self._length = 0
        self._generate_s = self._tool_s = 0.0
        self._opening = renderer.call_opening() if tools and tool.force_first_call else np.zeros(0, np.int32)
        if len(self._opening) >= task.budget.max_response_tokens:
            raise ConfigError(
                f"tool.force_first_call begins a response with {len(self._opening)} tokens, and the budget has "
                f"{task.budget.max_response_tokens}: raise budget.max_response_tokens"
            )
        self.session = ToolSession(
            sandboxes,
            key=f"{task.uid}/{task.attempt}",
            timeout_s=task.budget.tool_timeout_s,
            deadline=self._deadline,
        )

    @property
    def calls_left(self) -> int:
        return self.task.budget.max_tool_calls - self.calls_made

    @property
    def tokens_left(self) -> int:
        """Of the response budget."""
        return self.task.budget.max_response_tokens - self._length

    # the model's side ------------------------------------------------------------------------------------------------

    async def generate(self) -> Turn:
        """Sample the next turn, at most `max_turn_tokens` and never beyond the response budget.

        With `tool.force_first_call` the first turn goes on from the opening of a call, which is part of the turn and
        of the budget, but nobody sampled it: mask 0, log-prob 0.
        """
        budget, number = self.task.budget, len(self.turns)
        if self.before_turn is not None:
            await self.before_turn(number)
        forced = self._opening if number == 0 else self._opening[:0]
        room = self.tokens_left - len(forced)
        limit = min(room, budget.max_turn_tokens or room)
        assert limit > 0, f"{self.task.uid}: no token of the response budget is left"
        began = time.monotonic()
        try:
            async with asyncio.timeout_at(self._deadline) as clock:
                out = await self._generate(
                    np.concatenate([self._prompt_ids, *self._ids, forced]),
                    max_tokens=limit,
                    sampling=self.task.sampling,
                    stop_token_ids=self.renderer.stop_ids,
                    seed=turn_seed(self.task.seed, number),
                    request_id=f"{self.task.uid}/{self.task.attempt}/{number}",
                )
        except TimeoutError as error:
            late = self._late("the engine was still generating") if clock.expired() else f"timed out: {error!r}"
            raise EngineLost(late) from error
        ended = time.monotonic()
        self._generate_s += ended - began
        if out.finish_reason == "abort":
            raise Aborted(self.task.uid)
        n = len(out.ids)
        if not (0 < n <= limit and n == len(out.logprobs) == len(out.versions) and np.isfinite(out.logprobs).all()):
            raise EngineLost(
                f"{self._engine}: {self.task.uid}: malformed answer: {n} ids, {len(out.logprobs)} log-probs (finite: "
                f"{int(np.isfinite(out.logprobs).sum())}) and {len(out.versions)} versions for max_tokens={limit}"
            )
        turn = Turn(
            start=self._length,
            stop=self._length + len(forced) + n,
            finish_reason=out.finish_reason,
            began_s=began - self._began,
            ended_s=ended - self._began,
        )
        given = len(forced)
        self._append(
            np.concatenate([forced, out.ids]),
            np.arange(given + n) >= given,
            np.concatenate([np.zeros(given), out.logprobs]),
            np.concatenate([np.full(given, -1), out.versions]),
        )
        self.turns.append(turn)
        return turn

    def parse(self, turn: Turn) -> ParsedTurn:
        """The calls of a turn. One that the template's own end of turn does not close can have no observation."""
        ids = self._ids[-1]
        assert len(ids) == turn.stop - turn.start, "only the latest turn can be parsed"
        return self.renderer.parse(ids) if ids[-1] == self.renderer.turn_end_id else ParsedTurn()

    # the tool's side -------------------------------------------------------------------------------------------------

    async def answer(self, parsed: ParsedTurn) -> list[ToolCall]:
        """Run the calls of the latest turn, in order, as many as a turn and the trajectory may; record them there.

        Calls that could not be read come last, and only where room is left: one that can run goes first.
        """
        most = min(self.tool.max_calls_per_turn, self.calls_left)
        calls: list[ToolCall] = []
        for call in parsed.calls[:most]:
            calls.append(await self._answer(call))
            self._record(calls)
        for reason in parsed.malformed[: most - len(calls)]:
            calls.append(_refused("", "", reason if self._tools else _DISABLED))
            self.calls_made += 1
        extra = len(parsed.calls) + len(parsed.malformed) - len(calls)
        calls[-1] = replace(calls[-1], extra_calls_dropped=extra)
        self._record(calls)
        return calls

    def observe(self, calls: Sequence[ToolCall]) -> bool:
        """Append the observations of `calls`. False, and nothing appended, when no token would be left after them."""
        texts = [valid(call.observation) for call in calls]
        if calls[-1].extra_calls_dropped:
            texts.append(extra_calls(executed=len(calls), total=len(calls) + calls[-1].extra_calls_dropped))
        texts = self._cut(texts)
        self._record([replace(call, observation=text) for call, text in zip(calls, texts, strict=False)])
        delta = self.renderer.observation_delta(*texts)
        if len(delta) >= self.tokens_left:
            return False
        n = len(delta)
        self._append(delta, np.zeros(n, dtype=bool), np.zeros(n, np.float32), np.full(n, -1, np.int32))
        return True

    def _cut(self, texts: list[str]) -> list[str]:
        tool, renderer = self.tool, self.renderer
        if tool.max_response_chars is not None:
            texts = [truncate_chars(text, tool.max_response_chars, tool.truncate_side) for text in texts]
        if tool.max_response_tokens is None:
            return texts
        for i in range(len(texts)):

            def own(text: str) -> int:
                return len(renderer.content_spans(text))

            def whole(text: str, i: int = i) -> int:
                return len(renderer.observation_delta(*texts[:i], text, *texts[i + 1 :]))

            for limit, count in ((tool.max_response_tokens, own), (self.tokens_left - 1, whole)):
                texts[i] = truncate_tokens(
                    texts[i], limit, tool.truncate_side, spans=renderer.content_spans, count=count
                )
        return texts

    async def _answer(self, call: ParsedCall) -> ToolCall:
        self.calls_made += 1
        session, name = self.session, str(call.name)
        began, queued = time.monotonic(), session.queue_s
        try:
            if not self._tools:
                raise FormatError(_DISABLED)
            arguments = read_arguments(call, self.renderer.tools)
            async with asyncio.timeout_at(self._deadline) as clock:
                seen = await self._tools[name].run(arguments, session)
        except FormatError as error:
            return _refused(name if name in self._tools else "", _written(call.arguments), str(error))
        except TimeoutError as error:
            late = self._late(f"{name} had not answered") if clock.expired() else f"timed out: {error!r}"
            raise SandboxLost(session.session_id, late) from error
        seconds = time.monotonic() - began
        self._tool_s += seconds
        return ToolCall(
            code=_written(arguments),
            status=seen.status,
            outcome=seen.outcome,
            observation=seen.text,
            seconds=seconds,
            queue_s=session.queue_s - queued,
            state_lost=seen.state_lost,
            tool=name,
        )

    async def close(self) -> None:
        """End the session, if there is one. Waits a little, never raises: the answer no longer matters."""
        await self.session.close()

    async def fork(self, task: Task) -> Self:
        """This episode as it stands between two turns, tokens, budgets, deadline and a copy of the session, as `task`
        from here on. Raises SandboxError."""
        twin = copy.copy(self)
        twin.task, twin.turns, twin.before_turn = task, list(self.turns), None
        twin._ids, twin._mask = list(self._ids), list(self._mask)
        twin._logprobs, twin._versions = list(self._logprobs), list(self._versions)
        try:
            async with asyncio.timeout_at(self._deadline):
                twin.session = await self.session.fork(key=f"{task.uid}/{task.attempt}", deadline=self._deadline)
        except TimeoutError as error:
            raise SandboxLost(self.session.session_id, self._late("a session was still being copied")) from error
        return twin

    # the record ------------------------------------------------------------------------------------------------------

    def trajectory(self, cause: Cause, error: str = "") -> Trajectory:
        last = self.turns[-1] if self.turns else None
        ids = _join(self._ids, np.int32)
        return Trajectory(
            uid=self.task.uid,
            row_id=self.task.row_id,
            sample=self.task.sample,
            prompt_ids=self._prompt_ids,
            ids=ids,
            mask=_join(self._mask, np.bool_),
            behaviour_logprobs=_join(self._logprobs, np.float32),
            versions=_join(self._versions, np.int32),
            turns=tuple(self.turns),
            cause=cause,
            final_text=self.renderer.final_text(ids[last.start : last.stop]) if last else "",
            engine=self._engine,
            sandbox=self.session.node,
            timing=Timing(
                began_unix=self._began_unix,
                total_s=time.monotonic() - self._began,
                generate_s=self._generate_s,
                tool_s=self._tool_s,
                queue_s=self.session.queue_s,
            ),
            error=error,
        )

    def _append(self, ids: np.ndarray, mask: np.ndarray, logprobs: np.ndarray, versions: np.ndarray) -> None:
        self._ids.append(np.asarray(ids, dtype=np.int32))
        self._mask.append(mask)
        self._logprobs.append(np.asarray(logprobs, dtype=np.float32))
        self._versions.append(np.asarray(versions, dtype=np.int32))
        self._length += len(ids)

    def _record(self, calls: Sequence[ToolCall]) -> None:
        self.turns[-1] = replace(self.turns[-1], call=calls[0], further_calls=tuple(calls[1:]))

    def _late(self, what: str) -> str:
        return f"{what} when the trajectory's {self.task.budget.trajectory_timeout_s:g} s were over"


_DISABLED = "there are no tools in this conversation"


def _refused(tool: str, code: str, reason: str) -> ToolCall:
    outcome, told = ToolOutcome.FORMAT_ERROR, FORMAT_ERROR + reason
    return ToolCall(code=code, status=outcome, outcome=outcome, observation=told, seconds=0.0, tool=tool)


def _written(arguments: object) -> str:
    """A call for the records: the code alone where there is one, else the arguments as JSON."""
    if isinstance(arguments, dict) and isinstance(arguments.get("code"), str):
        return valid(arguments["code"])
    return json.dumps(arguments) if isinstance(arguments, dict) and arguments else ""


def _join(chunks: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=dtype), *chunks])
