"""The one renderer of SFT, RL and evaluation: prompts, observation deltas and conversations, as token ids.

A trajectory's stream is built by appending, never by rendering again:

    prompt_ids(messages)      <|im_start|>user ... <|im_end|>\\n<|im_start|>assistant\\n
    the engine's ids          <think>...</think>\\n\\n<tool_call>...</tool_call><|im_end|>
    observation_delta("4")    \\n<|im_start|>user\\n<tool_response>\\n4\\n</tool_response><|im_end|>\\n<|im_start|>as...
    the engine's ids          ...

The delta is what the model directory's own template puts there, found by rendering probes once. So for canonical
messages the stream equals the template's rendering, and for any other text the ids before a delta are still exactly
what the engine sampled; earlier thoughts stay, also where the template itself would drop them.
What a call is, is the business of `grammar.py`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aster.agent.grammar import (
    CODE_INTERPRETER,
    FormatError,
    HermesGrammar,
    ParsedCall,
    ParsedTurn,
    ToolGrammar,
    read_arguments,
)
from aster.agent.tokenization import ChatTemplate, ModelTokenizer, generation_stops
from aster.algo.regions import Markers
from aster.data.templates import TOOLS_IMPLICIT
from aster.errors import DataError, TemplateError

__all__ = ["CODE_INTERPRETER", "ChatRenderer"]

_USER, _ASSISTANT, _FIRST, _SECOND = "PROBEUSER", "PROBETURN", "PROBEONE", "PROBETWO"
_CALL_ID = "probe0000"  # nine characters: some templates insist


@dataclass(frozen=True)
class _Delta:
    """What the template writes around the contents of one role: head, content, (separator, content)*, tail.

    Ids are what stands between control tokens; the text between those and a content is tokenised together with the
    content, as the template's rendering would be: `)` + `\\n` may be one token.
    """

    head: tuple[int, ...]
    before: str
    separator: tuple[str, tuple[int, ...], str] | None  # text, ids, text; None: two in a row are joined
    after: str
    tail: tuple[int, ...]
    strips: bool  # the template strips white space off the content


class ChatRenderer:
    """Text to ids and back for one model directory.

    `stop_ids` end a turn; `stop_ids[0]`, the template's own end of turn, is the only one that a delta can follow.
    """

    def __init__(
        self,
        tokenizer: ModelTokenizer,
        template: ChatTemplate,
        *,
        tools: Sequence[dict[str, Any]] = (CODE_INTERPRETER,),
        extra_stops: Sequence[int] = (),
        grammar: ToolGrammar | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._extra_stops = tuple(extra_stops)
        self._others: dict[str, ChatRenderer] = {}
        self.tools = tuple(tools)
        self.grammar: ToolGrammar = grammar or HermesGrammar()
        self.vocab_size = tokenizer.vocab_size
        self._check_tools()
        turn_end, after_turn = self._probe_turn_end()
        self.turn_end_id = tokenizer.token_id(turn_end)
        self._turn_end = turn_end
        self._after_turn = tuple(tokenizer.encode(after_turn))
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys((self.turn_end_id, *extra_stops)))
        self.pad_id: int = self.turn_end_id if tokenizer.pad_id is None else tokenizer.pad_id
        self.generation_prompt = self._probe_generation_prompt()
        self._deltas = {"tool": self._probe_delta("tool")}

    @classmethod
    def from_model_dir(
        cls,
        path: str | Path,
        *,
        tools: Sequence[dict[str, Any]] = (CODE_INTERPRETER,),
        grammar: ToolGrammar | None = None,
    ) -> ChatRenderer:
        """Tokenizer, template and end-of-sequence ids of a Hugging Face directory.

        Raises TemplateError when the template drops `tools` (unless its source says so with the comment
        `{#- aster: tools-implicit -#}`) or the tool role, with the reason.
        """
        tokenizer = ModelTokenizer.from_model_dir(path)
        return cls(
            tokenizer,
            ChatTemplate.from_model_dir(path),
            tools=tools,
            extra_stops=generation_stops(Path(path), tokenizer),
            grammar=grammar,
        )

    def for_tools(self, schemas: Sequence[Mapping[str, Any]], *, grammar: ToolGrammar | None = None) -> ChatRenderer:
        """The renderer of the same model directory for a loop with other tools or another grammar; made once."""
        tools = tuple(dict(schema) for schema in schemas)
        if tools == self.tools and (grammar is None or grammar is self.grammar):
            return self
        key = f"{type(grammar).__qualname__} {json.dumps(tools)}"
        if key not in self._others:
            self._others[key] = ChatRenderer(
                self._tokenizer,
                self._template,
                tools=tools,
                extra_stops=self._extra_stops,
                grammar=grammar or self.grammar,
            )
        return self._others[key]

    @property
    def markers(self) -> Markers:
        """How the tokenizer spells thoughts and calls, to tell their tokens apart."""
        return Markers.of(self._tokenizer.encode_turn)

    # text to ids -----------------------------------------------------------------------------------------------------

    def prompt_ids(self, messages: Sequence[dict[str, Any]], *, tools_enabled: bool = True) -> np.ndarray:
        """The conversation so far and the generation prompt, int32 [P]."""
        text = self._render(messages, add_generation_prompt=True, tools_enabled=tools_enabled)
        return _int32(self._tokenizer.encode(text))

    def observation_delta(self, *texts: str) -> np.ndarray:
        """Everything between a turn's `<|im_end|>` (exclusive) and the next sampled token, int32.

        Several texts answer several calls of one turn. Nothing in a text becomes a control token.
        """
        return _int32(self._delta_ids("tool", texts))

    def call_opening(self) -> np.ndarray:
        """What a turn that calls without a thought begins with, up to what the model chooses, int32: `<tool_call>\\n`.

        As the template writes such a turn when an observation follows; where its generation prompt leads elsewhere
        (it has opened a thought), as it writes the last turn: `\\n</think>\\n\\n<tool_call>\\n`. Raises TemplateError
        when neither begins with the generation prompt.
        """
        user: dict[str, Any] = {"role": "user", "content": _USER}
        call = {"name": _CALL_ID, "arguments": {}}
        written = {**call, "type": "function", "id": _CALL_ID, "function": call}
        turn: dict[str, Any] = {"role": "assistant", "content": "", "reasoning_content": "", "tool_calls": [written]}
        tool = {"role": "tool", "content": _FIRST, "tool_call_id": _CALL_ID}
        opened = self._render([user], add_generation_prompt=True)
        for messages in ([user, turn, tool], [user, turn]):
            text = self._render(messages, add_generation_prompt=False)
            if text.startswith(opened) and _CALL_ID in text:
                return _int32(self._tokenizer.encode(self.grammar.opening(text[len(opened) :].partition(_CALL_ID)[0])))
        raise TemplateError(
            f"{self._template.where} writes a call without a thought where no generation prompt leads "
            f"({self.generation_prompt!r}): tool.force_first_call is not possible with it"
        )

    def content_spans(self, text: str) -> list[tuple[int, int]]:
        """Character span of each token of an observation's text, to cut it at a token's border."""
        return self._tokenizer.literal_spans(text)

    def conversation(
        self, messages: Sequence[dict[str, Any]], *, train_on_newline: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """SFT ids int32 [S] and loss mask bool [S]; the ids of a rollout that went the same way.

        `content` of an assistant message is the raw turn: what is sampled after the generation prompt, without the
        end of turn; one with `reasoning_content` or `tool_calls` is written by `raw_turn`. The mask covers turn and
        end of turn, nothing else; `train_on_newline` adds what the template writes after an end of turn.
        Raises DataError when the roles are out of order.
        """
        roles = [str(message["role"]) for message in messages]
        if "assistant" not in roles or roles[-1] != "assistant":
            raise DataError(f"a conversation must end with an assistant message, got the roles {roles}")
        first = roles.index("assistant")
        if "tool" in roles[:first]:
            raise DataError(f"a tool message before any assistant message, got the roles {roles}")
        ids: list[int] = self.prompt_ids(messages[:first]).tolist()
        mask = [False] * len(ids)
        newline = list(self._after_turn) * train_on_newline
        blocks = itertools.groupby(messages[first:], key=lambda message: str(message["role"]))
        for number, (role, messages_of_role) in enumerate(blocks):
            block = list(messages_of_role)
            is_turn = role == "assistant"
            if is_turn != (number % 2 == 0) or (is_turn and len(block) > 1):
                raise DataError(f"assistant messages must alternate with tool or user messages, got the roles {roles}")
            if is_turn:
                turn = self.turn_ids(self.raw_turn(block[0])).tolist()
                ids += turn
                mask += [True] * len(turn)
            else:
                delta = self._delta_ids(role, [str(message["content"]) for message in block])
                ids += delta
                mask += [True] * len(newline) + [False] * (len(delta) - len(newline))
        ids += newline
        mask += [True] * len(newline)
        return _int32(ids), np.array(mask, dtype=bool)

    def as_sampled(self, written: str) -> str:
        """The raw turn of an assistant's text as other programs write it down: without the `<think>` that the
        generation prompt has opened already, and without the end of turn.

        Raises DataError for an end of turn inside it: what follows could not have been sampled.
        """
        raw = written
        _, opens, blanks = self.generation_prompt.rpartition("<think>")
        if opens and not blanks.strip() and raw.lstrip().startswith("<think>"):
            raw = raw.lstrip().removeprefix("<think>").removeprefix(blanks)
        if raw.rstrip().endswith(self._turn_end):
            raw = raw.rstrip().removesuffix(self._turn_end)
        if self._turn_end in raw:
            shown = raw[max(raw.find(self._turn_end) - 40, 0) :][:80]
            raise DataError(f"an assistant's text goes on after its end of turn {self._turn_end!r}: {shown!r}")
        return raw

    def turn_ids(self, raw: str) -> np.ndarray:
        """A raw turn as a sampler emits it, its end of turn included, int32."""
        return _int32([*self._tokenizer.encode_turn(raw), self.turn_end_id])

    def raw_turn(self, message: Mapping[str, Any]) -> str:
        """What a sampler emits for an assistant message with `reasoning_content` (str) and `tool_calls`
        ([{"name", "arguments"}]), as the template writes its last turn; `content` itself where it has neither key.

        Raises DataError for a call that a rollout would refuse, for one that could not be told from the text around it,
        and for a turn that no generation prompt leads to.
        """
        if "reasoning_content" not in message and "tool_calls" not in message:
            return str(message["content"])
        calls = message.get("tool_calls") or ()
        for call in calls:
            try:
                read_arguments(ParsedCall(call["name"], call["arguments"]), self.tools)
            except FormatError as error:
                raise DataError(f"a call that a rollout would refuse: {error}") from None
        # templates read a call's name from `function` or from the call itself
        written = [{"type": "function", "id": _CALL_ID, "function": dict(call), **call} for call in calls]
        user = {"role": "user", "content": _USER}
        text = self._render([user, {**message, "tool_calls": written}], add_generation_prompt=False)
        opened = self._render([user], add_generation_prompt=True)
        if not text.startswith(opened):
            begins = text[len(opened) - len(self.generation_prompt) :][:40]
            raise DataError(
                f"a turn that {self._template.where} begins with {begins!r}, where its generation prompt is "
                f"{self.generation_prompt!r}: a sampler could not write it; give the turn a thought"
            )
        raw = text[len(opened) :].rpartition(self._turn_end)[0]
        parsed = self.grammar.parse(raw).calls
        if calls and parsed[len(parsed) - len(calls) :] != tuple(ParsedCall(c["name"], c["arguments"]) for c in calls):
            unread = f"{self._template.where} writes calls that our grammar does not read back: {raw[-80:]!r}"
            if self._calls_are_read_back():
                raise DataError(f"a call's tag stands in the turn's own text, and so {unread}")
            raise TemplateError(unread)
        return raw

    def _calls_are_read_back(self) -> bool:
        """Whether our grammar reads what the template writes for a call with nothing odd in it."""
        call = {"name": _CALL_ID, "arguments": {_FIRST: _SECOND}}
        written = {**call, "type": "function", "id": _CALL_ID, "function": call}
        turn = {"role": "assistant", "content": "", "reasoning_content": _ASSISTANT, "tool_calls": [written]}
        text = self._render([{"role": "user", "content": _USER}, turn], add_generation_prompt=False)
        return ParsedCall(_CALL_ID, {_FIRST: _SECOND}) in self.grammar.parse(text).calls

    # ids to text -----------------------------------------------------------------------------------------------------

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special: bool = False) -> str:
        return self._tokenizer.decode(np.asarray(ids).tolist(), skip_special=skip_special)

    def turn_text(self, ids: Sequence[int] | np.ndarray) -> str:
        """A sampled turn without its stop token, other special tokens spelled out."""
        listed = np.asarray(ids).tolist()
        return self._tokenizer.decode(listed[:-1] if listed and listed[-1] in self.stop_ids else listed)

    def parse(self, ids_of_turn: Sequence[int] | np.ndarray) -> ParsedTurn:
        return self.grammar.parse(self.turn_text(ids_of_turn))

    def final_text(self, ids_of_last_turn: Sequence[int] | np.ndarray) -> str:
        """What the reward looks at: the last turn, special tokens skipped, the inside of tool calls cut out."""
        return self.grammar.without_calls(self.decode(ids_of_last_turn, skip_special=True))

    # what the template does, found by rendering probes ---------------------------------------------------------------

    def _render(
        self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool, tools_enabled: bool = True
    ) -> str:
        tools = list(self.tools) if tools_enabled and self.tools else None
        return self._template.render(list(messages), tools=tools, add_generation_prompt=add_generation_prompt)

    def _check_tools(self) -> None:
        if not self.tools or TOOLS_IMPLICIT in self._template.source:
            return
        user = [{"role": "user", "content": _USER}]
        with_tools = self._render(user, add_generation_prompt=True)
        if with_tools == self._render(user, add_generation_prompt=True, tools_enabled=False):
            raise TemplateError(
                f"{self._template.where} drops `tools`: the prompt is the same with and without them, so the model "
                f"never hears of {self.tools[0]['function']['name']}. Give the directory a chat_template.jinja that "
                f"renders them, or say that they are left out on purpose with the comment {TOOLS_IMPLICIT}"
            )

    def _probe_turn_end(self) -> tuple[str, str]:
        """The token that closes an assistant turn, and what is written after it up to the next control token."""
        where = self._template.where
        messages = [{"role": "user", "content": _USER}, {"role": "assistant", "content": _ASSISTANT}]
        text = self._after(self._render(messages, add_generation_prompt=False), _ASSISTANT, "assistant")
        end = self._tokenizer.last_special(text)
        if end is None:
            raise TemplateError(
                f"{where} does not close an assistant turn with a special token: it writes {text!r} after it"
            )
        before, _, after = text.partition(end)
        if before.strip():
            raise TemplateError(f"{where} writes {before!r} between an assistant's text and {end!r}")
        return end, after[: self._tokenizer.split_before_first_control(after)]

    def _probe_generation_prompt(self) -> str:
        user = [{"role": "user", "content": _USER}]
        without = self._render(user, add_generation_prompt=False)
        text = self._render(user, add_generation_prompt=True)
        if not text.startswith(without) or text == without:
            raise TemplateError(
                f"{self._template.where} has no generation prompt: add_generation_prompt changes nothing"
            )
        return text[len(without) :]

    def _probe_delta(self, role: str) -> _Delta:
        where = self._template.where
        head, tail = self._around(role, (_FIRST,), turns=1)
        if (head, tail) != self._around(role, (_FIRST,), turns=2):
            raise TemplateError(f"{where} writes a {role} message differently in the first and in the second turn")
        separator = None
        with contextlib.suppress(TemplateError):  # a template may insist on alternating roles
            head_of_two, rest = self._around(role, (_FIRST, _SECOND), turns=1)
            between, found, tail_of_two = rest.partition(_SECOND)
            if found and (head_of_two, tail_of_two) == (head, tail):
                separator = self._split(between)
        no_text, head_ids, before = self._split(head)
        after, tail_ids, no_text_either = self._split(tail)
        return _Delta(
            head=(*self._tokenizer.encode(no_text), *head_ids),
            before=before,
            separator=separator,
            after=after,
            tail=(*tail_ids, *self._tokenizer.encode(no_text_either)),
            strips=self._strips(role),
        )

    def _split(self, text: str) -> tuple[str, tuple[int, ...], str]:
        """(text before the first control token, ids up to the last one inclusive, text after it)."""
        first = self._tokenizer.split_before_first_control(text)
        last = max(self._tokenizer.split_after_last_control(text), first)
        return text[:first], tuple(self._tokenizer.encode(text[first:last])), text[last:]

    def _around(self, role: str, contents: Sequence[str], *, turns: int) -> tuple[str, str]:
        """(text from the turn's end to the first content, text after it), rendered after `turns` assistant turns."""
        text = self._after(self._render_turns(role, contents, turns=turns), _ASSISTANT * turns, role)
        end = text.find(self._turn_end)
        if end < 0 or _FIRST in text[:end]:
            raise TemplateError(f"{self._template.where} does not close an assistant turn before a {role} message")
        head, found, tail = text[end + len(self._turn_end) :].partition(contents[0])
        if not found:
            raise TemplateError(
                f"{self._template.where} drops the {role} role: a message with it leaves no trace in the rendering, so "
                "the model would never see an observation. Give the directory a chat_template.jinja that renders it"
            )
        return head, tail

    def _strips(self, role: str) -> bool:
        """Whether the role's content loses its outer white space. Any other rewriting is refused."""
        content = f' \n{_FIRST} "<é>&\\\n\t'
        text = self._render_turns(role, (content,), turns=1)
        if content in text:
            return False
        if content.strip() in text:
            return True
        shown = text[max(text.find(_FIRST) - 4, 0) :][:40]
        raise TemplateError(
            f"{self._template.where} rewrites the content of {role} messages: {content!r} became {shown!r}"
        )

    def _render_turns(self, role: str, contents: Sequence[str], *, turns: int) -> str:
        messages: list[dict[str, Any]] = [{"role": "user", "content": _USER}]
        for turn in range(1, turns + 1):
            messages.append({"role": "assistant", "content": _ASSISTANT * turn})
            last = contents if turn == turns else ("",)
            messages += [{"role": role, "content": text, "tool_call_id": _CALL_ID} for text in last]
        return self._render(messages, add_generation_prompt=True)

    def _after(self, text: str, probe: str, role: str) -> str:
        _, found, after = text.rpartition(probe)
        if not found:
            raise TemplateError(
                f"{self._template.where} drops the content of assistant messages before a {role} message"
            )
        return after

    def _delta_ids(self, role: str, contents: Sequence[str]) -> list[int]:
        if role not in self._deltas:
            self._deltas[role] = self._probe_delta(role)
        delta = self._deltas[role]
        if delta.separator is None:  # the template refuses two of a role in a row: one message with both texts
            contents = ("\n".join(contents),)
        ids = list(delta.head)
        text = delta.before
        for i, content in enumerate(contents):
            if i and delta.separator is not None:
                closing, between, opening = delta.separator
                if between:
                    ids += [*self._tokenizer.encode_literal(text + closing), *between]
                    text = opening
                else:
                    text += closing
            text += content.strip() if delta.strips else content
        return [*ids, *self._tokenizer.encode_literal(text + delta.after), *delta.tail]


def _int32(ids: Sequence[int]) -> np.ndarray:
    return np.asarray(ids, dtype=np.int32)
