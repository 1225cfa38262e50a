"""The base corpus: true numbers, nothing held out, and the short echoes first."""

import contextlib
import io
import json

from aster.data.base_corpus import base_conversations
from aster.data.prompts import INSTRUCTION
from aster.data.tasks import is_heldout

CORPUS = base_conversations(echoes=100, drills=600, seed=0)
DRILLS = CORPUS[100:]


def code_of(turn):
    return json.loads(turn.partition("<tool_call>\n")[2].partition("\n</tool_call>")[0])["arguments"]["code"]


def problem_of(conversation):
    return conversation[0]["content"].removeprefix("\n").removesuffix(INSTRUCTION)


def test_the_same_seed_gives_the_same_corpus():
    assert base_conversations(echoes=100, drills=600, seed=0) == CORPUS
    assert base_conversations(echoes=100, drills=600, seed=1) != CORPUS


def test_echoes_come_first_and_repeat_what_was_said():
    assert all(c[0]["content"] == f"Echo {c[1]['content']}" and len(c) == 2 for c in CORPUS[:100])
    assert not any(c[0]["content"].startswith("Echo") for c in DRILLS)


def test_no_drill_shows_a_held_out_problem():
    assert not any(is_heldout(problem_of(c)) for c in DRILLS if len(c) == 2)


def test_every_computed_output_is_what_the_cell_prints():
    calculations = [c for c in DRILLS if len(c) == 4]
    assert len(calculations) > 100
    for _, call, output, final in calculations:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code_of(call["content"]), {})
        assert printed.getvalue().strip() == output["content"]
        assert final["content"].endswith(f"\\boxed{{{output['content']}}}")


def test_a_transcription_takes_its_numbers_from_the_problem():
    for user, call in (c for c in DRILLS if len(c) == 2):
        numbers = "".join(ch if ch.isdigit() else " " for ch in code_of(call["content"])).split()
        assert set(numbers) - {"2"} <= set("".join(ch if ch.isdigit() else " " for ch in user["content"]).split())
