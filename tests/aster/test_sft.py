"""`aster sft` without a learner: what it reads, what it keeps for validation, what it shows, how it validates."""

import json
import math

import numpy as np
import pytest
from fakes import FakeLearners

from aster import sft
from aster.agent.call_format import call_forms
from aster.agent.chat import ChatRenderer
from aster.cli import main
from aster.config import Recipe
from aster.data.conversations import write_conversations
from aster.data.templates import STATIC_TEMPLATE
from aster.data.tokenizer import EOS, PAD, train_tokenizer
from aster.errors import ConfigError, DataError
from aster.types import Sample

CALL = '<tool_call>\n{"name": "code_interpreter", "arguments": {"code": "print(1)"}}\n</tool_call>'


def talk(number, thought="x"):
    return [
        {"role": "user", "content": f"{number}?"},
        {"role": "assistant", "content": f"{thought}\n</think>\n\n{CALL}"},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "so\n</think>\n\n\\boxed{1}"},
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model directory as far as `--show` needs it: tokenizer, template and a config.json."""
    folder = tmp_path_factory.mktemp("model")
    train_tokenizer([CALL, "<|im_start|>user\n1?<|im_end|>\n<|im_start|>assistant\n"]).save(
        str(folder / "tokenizer.json")
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS, "pad_token": PAD}))
    (folder / "chat_template.jinja").write_text(STATIC_TEMPLATE)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def data(tmp_path):
    write_conversations(tmp_path / "sft.parquet", [*(talk(n) for n in range(60)), talk(60, thought="x" * 2000)])
    return tmp_path / "sft.parquet"


def recipe(model, data, *more):
    return Recipe.load("cpu_sft", [f"model.path={model}", f"data.train_files=[{data}]", "sft.max_length=500", *more])


def test_samples_are_split_and_the_too_long_are_counted(model, data):
    renderer = ChatRenderer.from_model_dir(model)
    alone = sft.load_samples(recipe(model, data), renderer)
    assert (len(alone.train), len(alone.val), alone.dropped) == (60, 0, 1)
    parted = sft.load_samples(recipe(model, data, "sft.val_fraction=0.2"), renderer)
    assert 3 <= len(parted.val) <= 24
    assert len(parted.train) + len(parted.val) == 60
    assert parted.dropped + parted.val_dropped == 1
    named = sft.load_samples(recipe(model, data, f"data.val_files=[{data}]", "data.val_max_rows=5"), renderer)
    assert (len(named.train), len(named.val), named.val_dropped) == (60, 5, 0)
    whole = sft.load_samples(recipe(model, data, f"data.val_files=[{data}]", "data.val_max_rows=61"), renderer)
    assert (len(whole.val), whole.val_dropped) == (60, 1)
    assert len(sft.load_samples(recipe(model, data, "data.max_rows=7"), renderer).train) == 7


def test_what_leaves_nothing_is_an_error(model, data, tmp_path):
    renderer = ChatRenderer.from_model_dir(model)
    with pytest.raises(DataError, match=r"all 61 conversations are longer than sft\.max_length=9 tokens"):
        sft.load_samples(recipe(model, data, "sft.max_length=9"), renderer)
    with pytest.raises(DataError, match=r"val_fraction=1e-06 leaves 61 conversations to train on and 0 to validate"):
        sft.load_samples(recipe(model, data, "sft.val_fraction=1.0e-6"), renderer)
    with pytest.raises(ConfigError, match=r"data\.train_files is empty"):
        sft.load_samples(Recipe.load("cpu_sft", [f"model.path={model}", "data.train_files=[]"]), renderer)
    with pytest.raises(ConfigError, match=r"both name a validation set"):
        recipe(model, data, "sft.val_fraction=0.1", f"data.val_files=[{data}]")


async def test_validation_counts_target_tokens_and_calls_whose_form_would_come_out(model, data):
    renderer = ChatRenderer.from_model_dir(model)
    samples = sft.load_samples(recipe(model, data, "data.max_rows=3"), renderer).train
    forms = [call_forms(s.ids, s.mask, renderer) for s in samples]
    assert [len(f) for f in forms] == [1, 1, 1]
    said = []
    for number, sample in enumerate(samples):
        p = np.full(len(sample), 0.4)
        p[forms[number][0]] = 0.9
        said.append(p)
    said[1][forms[1][0][-1]] = 0.49  # the closing tag of one call is less likely than not
    scored = [
        Sample(s.ids, s.mask, behaviour_logprobs=np.log(p).astype(np.float32))
        for s, p in zip(samples, said, strict=True)
    ]
    found = await sft.validate(FakeLearners([], dp_size=2), scored, forms, row_tokens=300)
    mean = np.mean([-math.log(x) for s, p in zip(samples, said, strict=True) for x in p[s.mask]])
    assert found == {
        "val/loss": pytest.approx(mean, rel=1e-6),
        "val/tokens": sum(int(s.mask.sum()) for s in samples),
        "val/tool_format_accuracy": pytest.approx(2 / 3),
        "val/tool_calls": 3.0,
    }
    without = await sft.validate(FakeLearners([]), scored, [[], [], []], row_tokens=300)
    assert set(without) == {"val/loss", "val/tokens"}, "no call, no accuracy"


def test_show_prints_tokens_and_counts_and_starts_nothing(model, data, capsys):
    options = [f"model.path={model}", f"data.train_files=[{data}]", "sft.max_length=500"]
    assert main(["sft", "--recipe", "cpu_sft", "--show", "2", *options]) == 0
    out = capsys.readouterr().out
    assert out.count("--- trained: ") == 4
    assert "sample 1: " in out
    assert "sample 2: " not in out
    assert '{"name": "code_interpreter", "arguments": {"code": "print(1)"}}↵' in out
    assert "60 samples of " in out
    assert "1 conversations dropped as too long; 0 samples for validation, 0 too long" in out.replace("\n", " ")
    assert main(["sft", "--recipe", "cpu_sft", "--show", "0", *options]) == 1
    assert "--show 0 must be at least 1" in capsys.readouterr().err
