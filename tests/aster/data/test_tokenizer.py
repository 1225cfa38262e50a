"""The small tokenizer and the two templates: lossless, whole words, single digits, one stream however it is encoded."""

import random

import pytest

from aster.agent.chat import ChatRenderer
from aster.agent.tokenization import ChatTemplate, ModelTokenizer
from aster.data.coldstart import final_turn, tool_turn
from aster.data.prompts import user_message
from aster.data.tasks import FAMILIES, draw_problems
from aster.data.templates import STATIC_TEMPLATE, TOOLS_TEMPLATE
from aster.data.tokenizer import CALL_OPEN, EOS, MARKS, PAD, PHRASES, SPECIAL, train_tokenizer


def dense(problem):
    """The plan with made-up outputs: what matters here is only their shape."""
    turns = [{"role": "user", "content": user_message(problem.text)}]
    for thought, code in problem.plan:
        turns += [{"role": "assistant", "content": tool_turn(thought, code)}, {"role": "tool", "content": "12"}]
    return [*turns, {"role": "assistant", "content": final_turn("done", problem.answer)}]


CONVERSATIONS = [dense(p) for p in draw_problems(160, seed=0, heldout=False)]
STATIC = ChatTemplate(STATIC_TEMPLATE, special_tokens={})
TOOLS = ChatTemplate(TOOLS_TEMPLATE, special_tokens={})
RENDERED = [STATIC.render(c, tools=None, add_generation_prompt=False) for c in CONVERSATIONS]
TOKENIZER = train_tokenizer(RENDERED)


@pytest.fixture
def renderer():
    return ChatRenderer(ModelTokenizer(TOKENIZER, eos=EOS, pad=PAD), STATIC)


def test_any_text_survives_also_what_no_trajectory_contains():
    for text in ["NameError: naïve 变量 is not defined\n\t🙂", "\x00\x7f  \n\n\n", "3.14e-10 \\boxed{", *RENDERED[:20]]:
        ids = TOKENIZER.encode(text, add_special_tokens=False).ids
        assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


def test_digits_are_single_and_the_vocabulary_small():
    assert list(TOKENIZER.encode("40729%31").tokens) == list("40729%31")
    assert TOKENIZER.get_vocab_size() <= 448


def test_marks_and_phrases_are_one_id_and_only_the_special_ones_are_skipped():
    for text in (*SPECIAL, *MARKS, *PHRASES):
        assert len(TOKENIZER.encode(text, add_special_tokens=False).ids) == 1, text
    ids = TOKENIZER.encode("<|im_start|><think>x<|im_end|>", add_special_tokens=False).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "<think>x"
    assert CALL_OPEN in tool_turn("t", "x=1")


def test_the_words_of_the_tasks_are_whole():
    for word in ("assistant\n", "user\n", " range", "lambda", "print"):
        assert len(TOKENIZER.encode(word, add_special_tokens=False).ids) == 1, word


def test_every_prompt_is_short(renderer):
    prompts = [renderer.prompt_ids(c[:1]) for c in CONVERSATIONS]
    assert max(map(len, prompts)) <= 150


def test_the_stream_built_piece_by_piece_is_the_encoding_of_the_whole_rendering(renderer):
    for conversation, rendered in zip(CONVERSATIONS, RENDERED, strict=True):
        ids, mask = renderer.conversation(conversation)
        assert renderer.decode(ids) + "\n" == rendered
        assert [*ids, TOKENIZER.token_to_id("Ċ")] == TOKENIZER.encode(rendered, add_special_tokens=False).ids
        said = "".join(m["content"] + EOS for m in conversation if m["role"] == "assistant")
        assert renderer.decode(ids[mask]) == said


@pytest.mark.parametrize("template", [STATIC, TOOLS])
def test_both_templates_keep_the_thinking_of_every_turn_and_open_the_next(template):
    text = template.render(CONVERSATIONS[0], tools=None, add_generation_prompt=True)
    assert text.count("<think>\n") == len(CONVERSATIONS[0]) // 2 + 1
    assert text.endswith("<|im_start|>assistant\n<think>\n")


def test_a_call_given_as_a_record_is_written_as_the_model_writes_it():
    problem = FAMILIES["digits"](random.Random(0))
    thought, code = problem.plan[0]
    arguments = {"name": "code_interpreter", "arguments": {"code": code}}
    record = {"role": "assistant", "content": "", "reasoning_content": thought, "tool_calls": [{"function": arguments}]}
    raw = {"role": "assistant", "content": tool_turn(thought, code)}
    user = {"role": "user", "content": "x"}
    assert STATIC.render([user, record], tools=None, add_generation_prompt=False) == STATIC.render(
        [user, raw], tools=None, add_generation_prompt=False
    )


def test_the_tools_template_shows_the_schema_and_the_static_one_says_that_it_does_not():
    schema = {"type": "function", "function": {"name": "abacus"}}
    user = [{"role": "user", "content": "x"}]
    assert '{"type": "function", "function": {"name": "abacus"}}' in TOOLS.render(
        user, tools=[schema], add_generation_prompt=True
    )
    assert "aster: tools-implicit" in STATIC_TEMPLATE
    assert "code_interpreter" in STATIC.render(user, tools=None, add_generation_prompt=True)


def test_several_outputs_of_one_turn_share_a_user_turn():
    tools = [{"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]
    text = TOOLS.render([{"role": "user", "content": "x"}, *tools], tools=None, add_generation_prompt=False)
    assert text.endswith(
        "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n"
    )
