from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aster.agent.grammar import CODE_INTERPRETER, FormatError, HermesGrammar, ParsedCall, read_arguments

GRAMMAR = HermesGrammar()
PIECES = [
    "<tool_call>",
    "</tool_call>",
    "\n",
    '{"name": "code_interpreter", "arguments": {"code": "1"}}',
    "{",
    "x",
    "</think>",
]
text = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PIECES), max_size=10).map("".join))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9) | st.just("code"), inner, max_size=3)
    ),
    max_leaves=6,
)


def written(code: str, **more: object) -> str:
    body = json.dumps({"name": "code_interpreter", "arguments": {"code": code, **more}})
    return f"<tool_call>\n{body}\n</tool_call>"


def test_the_schema_is_that_of_the_specification() -> None:
    assert json.dumps(CODE_INTERPRETER) == (
        '{"type": "function", "function": {"name": "code_interpreter", "description": "A tool for executing code.", '
        '"parameters": {"type": "object", "properties": {"code": {"type": "string", "description": "The code to '
        'execute."}}, "required": ["code"]}}}'
    )


@given(st.lists(st.text(max_size=40), min_size=1, max_size=4), text.filter(lambda t: "<tool_call>" not in t))
@settings(max_examples=80)
def test_whatever_code_is_written_canonically_is_read_back_in_order(codes: list[str], around: str) -> None:
    codes = [code for code in codes if "</tool_call>" not in code] or ["1"]
    parsed = GRAMMAR.parse(around + around.join(map(written, codes)))
    assert [read_arguments(call)["code"] for call in parsed.calls] == codes
    assert parsed.malformed == ()


@given(text)
@settings(max_examples=300)
def test_any_text_can_be_parsed_and_is_a_final_answer_exactly_when_it_opens_no_call(turn: str) -> None:
    parsed = GRAMMAR.parse(turn)
    assert parsed.attempted == ("<tool_call>" in turn)
    assert "<tool_call>" not in GRAMMAR.without_calls(turn) or turn.count("<tool_call>") > 1
    if not parsed.attempted:
        assert GRAMMAR.without_calls(turn) == turn


@given(json_values, json_values)
@settings(max_examples=300)
def test_any_name_and_arguments_give_code_or_a_reason_that_can_be_encoded(name: object, arguments: object) -> None:
    for named in (name, "code_interpreter"):
        try:
            said = read_arguments(ParsedCall(named, arguments))["code"]
        except FormatError as error:
            said = str(error) or "no reason"
            assert len(said) < 1000
        said.encode("utf-8")


def test_too_much_code_is_refused_with_the_limit() -> None:
    with pytest.raises(FormatError, match="has 4194305 characters, the limit is 4194304"):
        read_arguments(ParsedCall("code_interpreter", {"code": "x" * ((4 << 20) + 1)}))


def test_a_long_wrong_name_is_not_repeated_at_length() -> None:
    with pytest.raises(FormatError) as caught:
        read_arguments(ParsedCall("n" * 5000, {}))
    assert len(str(caught.value)) < 200


TYPED = {
    "type": "function",
    "function": {
        "name": "typed",
        "parameters": {
            "type": "object",
            "properties": {
                "n": {"type": "integer"},
                "x": {"type": ["number", "null"]},
                "b": {"type": "boolean"},
                "l": {"type": "array"},
                "o": {"type": "object"},
                "anything": {},
            },
        },
    },
}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"n": 3, "x": 0.5, "b": False, "l": [], "o": {}, "anything": None}, None),
        ({"x": None}, None),
        ({"x": 2}, None),
        ({"n": True}, "argument 'n' must be an integer, got a boolean"),
        ({"n": 3.0}, "argument 'n' must be an integer, got a number"),
        ({"x": "1"}, "argument 'x' must be a number or null, got a string"),
        ({"x": True}, "argument 'x' must be a number or null, got a boolean"),
        ({"b": 0}, "argument 'b' must be a boolean, got a number"),
        ({"l": {}}, "argument 'l' must be a list, got an object"),
        ({"o": []}, "argument 'o' must be an object, got a list"),
    ],
)
def test_arguments_have_the_types_of_the_schema(arguments: dict, reason: str | None) -> None:
    call = ParsedCall("typed", arguments)
    if reason is None:
        assert read_arguments(call, [TYPED]) == arguments
    else:
        with pytest.raises(FormatError, match=reason):
            read_arguments(call, [TYPED])
