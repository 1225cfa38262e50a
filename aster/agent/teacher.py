"""A teacher behind an OpenAI-compatible chat endpoint, as the engine of our own agent loop.

    Episode.generate  ->  POST /chat/completions with the messages so far  ->  content, reasoning_content, tool_calls
                      <-  the ids of that turn as the student's template writes it, end of turn included

The endpoint keeps no state and shows no ids. So a trajectory of a teacher is a stream in the student's tokens, its
budgets count those, and its log-probs are zeros: it can be learned from by SFT, not by RL. One call a turn.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import numpy as np

from aster.agent.chat import ChatRenderer
from aster.agent.episode import Generation
from aster.data.formats import read_messages
from aster.errors import ConfigError, DataError, EngineLost
from aster.types import Sampling

_RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_OF_ONE_CONVERSATION = frozenset({400, 413, 422})  # too long, or not to a content filter's liking
_FIRST_PAUSE_S = 0.5
_PROBE = "PROBE"


class ChatTeacher:
    """`conversation(messages)` is the `Generate` of one trajectory. Close it when all of them have ended."""

    def __init__(
        self,
        url: str,
        *,
        model: str,
        renderer: ChatRenderer,
        api_key: str | None = None,
        request_timeout_s: float = 1800.0,
        attempts: int = 5,
    ) -> None:
        """`url` ends where the API begins, e.g. http://host:8000/v1."""
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"--endpoint {url} is no URL: give http://HOST:PORT/v1")
        self.model = model
        self.renderer = renderer
        self.attempts = attempts
        self._has_answered = False
        self._client = httpx.AsyncClient(
            base_url=url.rstrip("/") + "/",
            timeout=httpx.Timeout(request_timeout_s, connect=30.0),
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            limits=httpx.Limits(max_connections=None),
        )

    def conversation(self, messages: Sequence[dict[str, str]]) -> _Conversation:
        return _Conversation(self, messages)

    async def close(self) -> None:
        await self._client.aclose()

    async def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        """The first choice of a completion. A busy or broken server is asked again, with pauses that double.

        Raises EngineLost when it stays that way, and when a server that has answered others refuses this conversation;
        ConfigError when it refuses any request.
        """
        problem = ""
        for attempt in range(self.attempts):
            if attempt:
                await asyncio.sleep(_FIRST_PAUSE_S * 2 ** (attempt - 1))
            try:
                answer = await self._client.post(
                    "chat/completions",
                    content=json.dumps(body),  # ASCII: a reply may hold half a surrogate pair, which UTF-8 cannot
                    headers={"Content-Type": "application/json"},
                )
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            if answer.status_code in _RETRIED:
                problem = f"status {answer.status_code}: {answer.text[:200]}"
                continue
            refusal = f"with status {answer.status_code}: {answer.text[:400]}"
            if self._has_answered and answer.status_code in _OF_ONE_CONVERSATION:
                raise EngineLost(f"the teacher refuses this conversation {refusal}")
            if answer.is_error:
                raise ConfigError(f"{self._client.base_url} refuses requests for model {self.model!r} {refusal}")
            try:
                choice = dict(answer.json()["choices"][0])
                self._has_answered = True
                return choice
            except (ValueError, KeyError, IndexError, TypeError) as error:
                problem = f"no completion in its answer ({type(error).__name__}): {answer.text[:200]}"
        raise EngineLost(f"the teacher did not answer in {self.attempts} attempts ({problem})")


class _Conversation:
    """What has been said in one trajectory, in the endpoint's messages; an `aster.agent.episode.Generate`."""

    def __init__(self, teacher: ChatTeacher, messages: Sequence[dict[str, str]]) -> None:
        self._teacher = teacher
        self._messages: list[dict[str, Any]] = [dict(m) for m in messages]
        self._seen = 0  # ids of the stream that the messages cover
        self._call_id = ""

    async def __call__(
        self,
        ids: np.ndarray,
        *,
        max_tokens: int,
        sampling: Sampling,
        stop_token_ids: tuple[int, ...],
        seed: int,
        request_id: str,
    ) -> Generation:
        teacher = self._teacher
        if self._seen:
            observation = _observation(ids[self._seen :], teacher.renderer)
            self._messages.append({"role": "tool", "tool_call_id": self._call_id, "content": observation})
        choice = await teacher.ask(
            {
                "model": teacher.model,
                "messages": self._messages,
                "tools": list(teacher.renderer.tools),
                "parallel_tool_calls": False,
                "max_tokens": max_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "seed": seed & 0x7FFFFFFF,
            }
        )
        message = _normalised(choice)
        turn = self._turn(message)
        finished = choice.get("finish_reason") != "length" and len(turn) <= max_tokens
        if not finished:  # without its end of turn nothing in it is run
            turn = turn[:-1][:max_tokens]
        if not len(turn):
            raise EngineLost("the teacher's turn is empty")
        calls = message.get("tool_calls")
        self._call_id = calls[0].get("id") or "call" if calls else ""
        self._messages.append(message)
        self._seen = len(ids) + len(turn)
        n = len(turn)
        reason = "stop" if finished else "length"
        return Generation(turn, np.zeros(n, np.float32), np.zeros(n, np.int32), reason)

    def _turn(self, message: dict[str, Any]) -> np.ndarray:
        """The ids of the teacher's turn as the student would sample it. EngineLost where it cannot be written so."""
        renderer = self._teacher.renderer
        try:
            (ours,) = read_messages({"messages": [message]}, "openai", where="the teacher's reply")
            ids = renderer.turn_ids(renderer.raw_turn(ours))
        except DataError as error:
            raise EngineLost(f"the teacher's turn cannot be written: {error}") from None
        if renderer.parse(ids).attempted and "tool_calls" not in message:
            raise EngineLost("the teacher writes its calls as text: start its server with a parser for tool calls")
        return ids


def _normalised(choice: Mapping[str, Any]) -> dict[str, Any]:
    """The message of a completion as it is read here and sent back: one call at most, the thought under one name."""
    message = choice.get("message")
    if not isinstance(message, dict) or not isinstance(message.get("tool_calls") or [], list):
        raise EngineLost(f"the teacher's reply is no message: {str(message)[:200]}")
    out: dict[str, Any] = {"role": "assistant", "content": message.get("content") or ""}
    thought = message.get("reasoning_content")
    if thought is None:
        thought = message.get("reasoning")
    if thought is not None:
        out["reasoning_content"] = thought
    if message.get("tool_calls"):
        out["tool_calls"] = message["tool_calls"][:1]
    return out


def _observation(delta: np.ndarray, renderer: ChatRenderer) -> str:
    """The text between what the template writes around an observation."""
    head, tail = renderer.decode(renderer.observation_delta(_PROBE)).split(_PROBE)
    return renderer.decode(delta).removeprefix(head).removesuffix(tail)
