"""What the engine tests share: a tiny tied model, a learner actor that can change it, Hugging Face as the judge."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from actors.weight_sync import WeightSender
from aster.config import Recipe
from aster.data.templates import TOOLS_TEMPLATE
from aster.data.tokenizer import EOS, PAD, train_tokenizer
from aster.types import MicroBatch, TensorMeta, TokenScores

VOCAB = 512
STOP = 2
STALLED, GO_ON = "stalled", "go_on"  # files by which a sender that stalls and a test speak to each other


def build_model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        eos_token_id=STOP,
        pad_token_id=0,
        bos_token_id=None,
        initializer_range=0.2,  # peaked enough that wrong weights show
        dtype="float32",
    )
    return Qwen3ForCausalLM(config).float().eval()


def perturb(model: Qwen3ForCausalLM, seed: int) -> None:
    """Add 10 % of its own standard deviation to every tensor, embeddings included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter.add_(noise * (0.1 * parameter.std().clamp_min(0.1)))


@torch.no_grad()
def log_probs(model: Qwen3ForCausalLM, ids: np.ndarray, *, temperature: float = 1.0, top_p: float = 1.0) -> np.ndarray:
    """float32 [len(ids) - 1]: log-probs of ids[1:] under the model's distribution after temperature and top-p."""
    tokens = torch.tensor(ids, dtype=torch.int64, device=model.device)[None]
    logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0, :-1].float() / temperature
    if top_p < 1.0:
        descending, order = logits.softmax(-1).sort(-1, descending=True)
        outside = descending.cumsum(-1) - descending >= top_p  # the mass before it already reaches top_p
        logits = logits.masked_fill(outside.scatter(-1, order, outside), float("-inf"))
    return logits.log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0].cpu().numpy()


class FaultySender(WeightSender):
    """Damages one bit of one bucket after it was sealed, as a faulty wire would, or dies or stalls at it."""

    damaged: int | None = None
    deadly: int | None = None
    slow: tuple[int, Path] | None = None

    def _post(self, bucket: Any, buffer: torch.Tensor) -> Any:
        if bucket.index == self.deadly:
            os._exit(1)
        if self.slow is not None and bucket.index == self.slow[0]:
            folder, self.slow = self.slow[1], None
            (folder / STALLED).touch()
            deadline = time.monotonic() + 120
            while not (folder / GO_ON).exists():
                if time.monotonic() > deadline:
                    raise TimeoutError(f"nobody made {folder / GO_ON}")
                time.sleep(0.02)
        if bucket.index == self.damaged:
            self.damaged = None
            buffer[40] ^= 1
        return super()._post(bucket, buffer)


class ToyLearner:
    """A learner rank without FSDP: the calls that a `RayWeightSource` makes, and three that the tests make."""

    def __init__(self, *, device: str = "cpu", dtype: str = "float32") -> None:
        self.model = build_model().to(device)
        self.shift = 0.0
        self._dtype = dtype
        self._forgotten = ""
        self._sender = FaultySender(tensors=self._tensors, metadata=self.weight_metadata(), rank=0, device=device)

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self._named():
            yield name, parameter.detach()

    def _named(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(n, p) for n, p in self.model.named_parameters() if n != self._forgotten]  # a tied tensor is named once

    def weight_metadata(self) -> list[TensorMeta]:
        return [TensorMeta(n, self._dtype, tuple(p.shape)) for n, p in self._named()]

    def weight_address(self) -> tuple[str, int]:
        return self._sender.address()

    def weight_open(self, **kwargs: Any) -> None:
        self._sender.open(**kwargs)

    def weight_send(self, *, bucket_bytes: int, hold: bool) -> list[str]:
        return self._sender.send(bucket_bytes=bucket_bytes, hold=hold)

    def weight_keep(self) -> None:
        self._sender.keep()

    def weight_resend(self, *, bucket_bytes: int) -> list[str]:
        return self._sender.resend(bucket_bytes=bucket_bytes)

    def weight_close(self) -> None:
        self._sender.close()

    def log_probs(self, row: MicroBatch) -> TokenScores:
        logprobs = np.append(log_probs(self.model, row.input_ids), 0.0).astype(np.float32) + self.shift
        return TokenScores(logprobs, np.zeros_like(logprobs))

    def perturb(self, seed: int) -> None:
        perturb(self.model, seed)

    def damage_bucket(self, index: int) -> None:
        self._sender.damaged = index

    def forget(self, name: str) -> None:
        """From here on the learner does not know that it has this tensor."""
        self._forgotten = name
        self._sender.metadata = self.weight_metadata()

    def die_at_bucket(self, index: int) -> None:
        self._sender.deadly = index

    def stall_at_bucket(self, index: int, folder: Path) -> None:
        """Until the file `GO_ON` is in `folder`; `STALLED` is there from the bucket on."""
        self._sender.slow = index, folder

    def load(self, state: dict[str, torch.Tensor]) -> None:
        self.model.load_state_dict(state)

    def disagree(self, nats: float) -> None:
        self.shift = nats


def save_model(folder: Path) -> Path:
    """A complete model directory: weights, a small tokenizer, a template with tools."""
    build_model().save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(["What is 2 + 2? Please reason step by step."], merges=16),
        eos_token=EOS,
        pad_token=PAD,
        chat_template=TOOLS_TEMPLATE,
    )
    tokenizer.save_pretrained(folder)
    return folder


def recipe(model: Path, *, device: str = "cpu", **rollout: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "stage": "rl",
            "model": {"path": str(model), "compute_dtype": "float32"},
            "budget": {"max_prompt_tokens": 128, "max_response_tokens": 896},
            "rollout": {
                "dtype": "float32",
                "prompts_per_step": 2,
                "group_size": 2,
                "max_num_seqs": 4,
                "kv_cache_bytes": 32 << 20,
                "enforce_eager": True,
                "start_timeout_s": 600,  # 20 s alone; more than 240 were seen beside two other test runs
                "generate_timeout_s": 240,
                **rollout,
            },
            "algo": {"mini_batch_prompts": 2},
            "cluster": {"device": device},
        }
    )
