"""What SFT trains on is what a rollout of the same conversation holds: ids and masks, for real tokenizers too."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from agent_models import HYBRID, MARKS, SPECIAL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aster.agent.call_format import call_forms, runs
from aster.agent.chat import ChatRenderer
from aster.agent.masks import masks_text
from aster.agent.rollout import Generation, run_episode
from aster.config import ToolConfig
from aster.data.conversations import to_samples
from aster.data.formats import read_messages
from aster.data.templates import STATIC_TEMPLATE, TOOLS_TEMPLATE
from aster.errors import DataError, TemplateError
from aster.types import Budget, Cause, Sample, Sampling, Task
from serve.schema import ExecuteResponse, Status

USER = {"role": "user", "content": "\nWhat is 2 + 2?\nPlease reason step by step.\n"}
FAST = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

plain = st.text(alphabet=st.sampled_from("abc xyz.,(){}[]'\"\\é中😀1234567890\n"), max_size=30).map(lambda t: f"w{t}w")
outputs = st.one_of(
    plain, st.lists(st.sampled_from([*MARKS, *SPECIAL, "\n", ")", "中", "4"]), min_size=1, max_size=6).map("".join)
)
steps = st.lists(st.tuples(plain, plain, outputs), max_size=3)


def openai(turns: list[tuple[str, str, str]]) -> list[dict]:
    """The conversation as OpenAI's clients write it."""
    messages: list[dict] = [USER]
    for number, (thought, code, output) in enumerate(turns):
        function = {"name": "code_interpreter", "arguments": json.dumps({"code": code})}
        call = {"id": f"c{number}", "type": "function", "function": function}
        messages.append({"role": "assistant", "content": None, "reasoning_content": thought, "tool_calls": [call]})
        messages.append({"role": "tool", "tool_call_id": f"c{number}", "content": output})
    return [*messages, {"role": "assistant", "content": "\\boxed{4}", "reasoning_content": "So."}]


async def episode(renderer: ChatRenderer, turns: list[tuple[str, str, str]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of a real episode whose engine writes these turns and whose sandbox prints these outputs."""
    thoughts = "<think>\n" if "<think>" not in renderer.generation_prompt else ""
    said = [
        f"{thoughts}{thought}\n</think>\n\n<tool_call>\n"
        + json.dumps({"name": "code_interpreter", "arguments": {"code": code}}, ensure_ascii=False)
        + "\n</tool_call>"
        for thought, code, _ in turns
    ] + [f"{thoughts}So.\n</think>\n\n\\boxed{{4}}"]
    printed = [output for *_, output in turns]

    class Session:
        session_id = "s"

        async def open(self, key: str) -> Session:
            return self

        async def execute(self, code: str, *, timeout_s: float, call_id: str) -> ExecuteResponse:
            text = printed.pop(0)
            return ExecuteResponse(status=Status.OK, text=text, stdout=text)

        async def close(self) -> None: ...

    async def generate(ids, *, stop_token_ids, **_) -> Generation:
        tokens = [*renderer._tokenizer.encode_turn(said.pop(0)), stop_token_ids[0]]
        return Generation(
            np.array(tokens, np.int32), np.zeros(len(tokens), np.float32), np.zeros(len(tokens), np.int32), "stop"
        )

    budget = Budget(max_prompt_tokens=4000, max_response_tokens=4000, max_tool_calls=5, trajectory_timeout_s=120)
    task = Task("u", "row", 0, (USER,), "code_agent", budget, Sampling(), 5)
    out = await run_episode(
        task, generate=generate, sandboxes=Session(), renderer=renderer, tool=ToolConfig(), engine="e"
    )
    assert out.cause is Cause.ANSWERED
    mask = np.concatenate([np.zeros(len(out.prompt_ids), bool), out.mask])
    return np.concatenate([out.prompt_ids, out.ids]), mask


def check(renderer: ChatRenderer, turns: list[tuple[str, str, str]]) -> None:
    expected_ids, expected_mask = asyncio.run(episode(renderer, turns))
    messages = read_messages({"messages": openai(turns)}, "openai", where="test")
    ids, mask = renderer.conversation(messages)
    assert ids.tolist() == expected_ids.tolist()
    assert mask.tolist() == expected_mask.tolist()


@FAST
@given(steps)
def test_sft_ids_are_rollout_ids_with_a_template_that_opens_no_thought(hybrid: ChatRenderer, turns: list) -> None:
    check(hybrid, turns)


@FAST
@given(steps)
def test_sft_ids_are_rollout_ids_with_a_template_that_opens_one(thinking: ChatRenderer, turns: list) -> None:
    check(thinking, turns)


@FAST
@given(steps)
def test_sft_ids_are_rollout_ids_for_qwen3(qwen3: ChatRenderer, turns: list) -> None:
    check(qwen3, turns)


@FAST
@given(steps)
def test_sft_ids_are_rollout_ids_for_smollm2(smollm2: ChatRenderer, turns: list) -> None:
    check(smollm2, turns)


@FAST
@given(steps, st.sampled_from(["", "<|im_end|>", "<|im_end|>\n"]))
def test_turns_written_with_their_think_and_their_end_have_the_ids_of_a_rollout(
    hybrid: ChatRenderer, thinking: ChatRenderer, turns: list, end: str
) -> None:
    """Most files of chats look like this, whatever the prompt of the model opens."""
    messages: list[dict] = [USER]
    for thought, code, output in turns:
        call = json.dumps({"name": "code_interpreter", "arguments": {"code": code}}, ensure_ascii=False)
        said = f"<think>\n{thought}\n</think>\n\n<tool_call>\n{call}\n</tool_call>{end}"
        messages += [{"role": "assistant", "content": said}, {"role": "tool", "content": output}]
    messages.append({"role": "assistant", "content": f"<think>\nSo.\n</think>\n\n\\boxed{{4}}{end}"})
    for renderer in (hybrid, thinking):
        expected_ids, expected_mask = asyncio.run(episode(renderer, turns))
        (sample,), _ = to_samples([messages], renderer, max_length=10_000)
        assert sample.ids.tolist() == expected_ids.tolist()
        assert sample.mask.tolist() == expected_mask.tolist()


class TestRawTurn:
    def test_as_files_write_it(self, hybrid: ChatRenderer, thinking: ChatRenderer) -> None:
        written = "<think>\nhm\n</think>\n\n4"
        assert thinking.as_sampled(written) == "hm\n</think>\n\n4"
        assert thinking.as_sampled(f"\n{written}<|im_end|>\n") == "hm\n</think>\n\n4"
        assert thinking.as_sampled("<think>hm</think>4") == "hm</think>4"
        assert thinking.as_sampled("hm <think>\n</think> 4\n") == "hm <think>\n</think> 4\n"
        assert hybrid.as_sampled(written) == written
        for renderer in (hybrid, thinking):
            with pytest.raises(DataError, match=r"goes on after its end of turn '<\|im_end\|>': '4<\|im_end\|>5'"):
                renderer.as_sampled("4<|im_end|>5<|im_end|>")

    def test_a_turn_is_what_follows_the_generation_prompt(self, hybrid: ChatRenderer, thinking: ChatRenderer) -> None:
        turn = {"role": "assistant", "content": "4", "reasoning_content": "hm", "tool_calls": []}
        assert hybrid.raw_turn(turn) == "<think>\nhm\n</think>\n\n4"
        assert thinking.raw_turn(turn) == "hm\n</think>\n\n4"
        assert thinking.raw_turn({"role": "assistant", "content": "as it is"}) == "as it is"

    def test_a_turn_without_a_thought_after_a_prompt_that_opens_one(
        self, thinking: ChatRenderer, model_dir: Callable[[str], Path]
    ) -> None:
        turn = {"role": "assistant", "content": "4", "reasoning_content": "", "tool_calls": []}
        with pytest.raises(DataError, match=r"a sampler could not write it; give the turn a thought"):
            thinking.raw_turn(turn)
        ours = ChatRenderer.from_model_dir(model_dir(STATIC_TEMPLATE))
        assert ours.raw_turn(turn) == "\n</think>\n\n4", (
            "a template that writes the empty thought out has a turn for it"
        )

    @pytest.mark.parametrize(
        ("call", "words"),
        [
            ({"name": "search", "arguments": {"q": "x"}}, "unknown tool 'search'"),
            ({"name": "code_interpreter", "arguments": {"code": "1", "timeout": 3}}, "unknown argument 'timeout'"),
            ({"name": "code_interpreter", "arguments": {}}, "missing argument 'code'"),
        ],
    )
    def test_a_call_that_a_rollout_would_refuse_is_not_taught(
        self, hybrid: ChatRenderer, call: dict, words: str
    ) -> None:
        with pytest.raises(DataError, match=words):
            hybrid.raw_turn({"role": "assistant", "content": "", "reasoning_content": "t", "tool_calls": [call]})

    @pytest.mark.parametrize(("thought", "code"), [("a <tool_call> is", "1"), ("t", "print('</tool_call>')")])
    def test_a_tag_in_the_text_around_a_call_is_the_datas_fault_and_a_strange_call_the_templates(
        self, hybrid: ChatRenderer, model_dir: Callable[[str], Path], thought: str, code: str
    ) -> None:
        call = {"name": "code_interpreter", "arguments": {"code": code}}
        turn = {"role": "assistant", "content": "", "reasoning_content": thought, "tool_calls": [call]}
        with pytest.raises(DataError, match="a call's tag stands in the turn's own text"):
            hybrid.raw_turn(turn)
        strange = ChatRenderer.from_model_dir(model_dir(HYBRID.replace('"arguments": ', '"parameters": ')))
        with pytest.raises(TemplateError, match="writes calls that our grammar does not read back"):
            strange.raw_turn(turn)


@pytest.mark.parametrize("template", [HYBRID, TOOLS_TEMPLATE, STATIC_TEMPLATE], ids=["hybrid", "tools", "static"])
def test_the_form_of_a_call_is_all_but_its_opening_tag_and_its_code(
    model_dir: Callable[[str], Path], template: str
) -> None:
    renderer = ChatRenderer.from_model_dir(model_dir(template))
    turns = [("é 中😀", 'print("😀")\nx = "}}"', "1"), ("w", "", "2")]
    messages = read_messages({"messages": openai(turns)}, "openai", where="test")
    ids, mask = renderer.conversation(messages)
    forms = call_forms(ids, mask, renderer)
    assert len(forms) == 2
    # the token that ends the code may hold its last characters, and the one that opens it its first
    begins = '\n{"name": "code_interpreter", "arguments": {"code": "'
    first, second = (renderer.decode(ids[form]) for form in forms)
    assert first.startswith(begins)
    assert first.endswith('"}}\n</tool_call>')
    assert 0 <= len(first) - len(begins) - len('"}}\n</tool_call>') <= 4
    assert second == begins + '"}}\n</tool_call>'
    assert all(mask[form].all() for form in forms)


def test_runs_of_a_mask() -> None:
    assert runs(np.zeros(3, bool)) == []
    assert runs(np.ones(3, bool)) == [(0, 3)]


def test_masks_are_shown_with_their_tokens_and_counts(thinking: ChatRenderer) -> None:
    messages = [USER, {"role": "assistant", "content": "é😀"}]
    ids, mask = thinking.conversation(messages)
    shown = masks_text(Sample(ids=ids, mask=mask), thinking)
    trained = shown.plain.split("--- trained: ")[1]
    assert shown.plain.startswith(f"--- context: {int((~mask).sum())} tokens ---\n<|im_start|>")
    assert trained == f"{int(mask.sum())} tokens ---\né😀<|im_end|>\n"
    green = "".join(shown.plain[s.start : s.end] for s in shown.spans if "green" in str(s.style))
    assert green == "é😀<|im_end|>"
    assert shown.plain.replace("↵", "").count("Please reason step by step.\n") == 1
