"""The small tokenizer of the CPU recipes: byte-level BPE, single digits, Qwen3's control tokens, a few phrases.

Lossless for anything a tool may print (no unknown token), about 400 ids, so that the model behind it can be under a
million parameters. Only the `tokenizers` library is used here; the Hugging Face wrapper is `aster prepare`'s business.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from aster.data.prompts import INSTRUCTION
from aster.data.templates import STATIC_TOOL_LINE

EOS, PAD = "<|im_end|>", "<|endoftext|>"
SPECIAL = (PAD, "<|im_start|>", EOS)
"""Dropped by skip_special_tokens, as in Qwen3."""
MARKS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
"""One id each but not special, as in Qwen3: they survive skip_special_tokens."""
CALL_OPEN, CALL_CLOSE = '{"name": "code_interpreter", "arguments": {"code": "', '"}}'
PHRASES = (CALL_OPEN, CALL_CLOSE, "\\boxed{", INSTRUCTION, STATIC_TOOL_LINE)
"""Text that every trajectory repeats; one id each saves about 50 tokens a call against single characters."""

_SPLIT = r"\n\n|\n| ?\p{L}+\n?|\p{N}|[^\n\p{L}\p{N}]"


def train_tokenizer(texts: Iterable[str], *, merges: int = 160) -> Tokenizer:
    """BPE over `texts` (rendered conversations), at most `merges` merges on top of the 256 bytes.

    Words are kept whole and digits single. The merges cannot cross a control token or a digit, so encoding a
    conversation piece by piece between control tokens gives the ids of encoding it at once.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + merges,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_without_marks(texts), trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in (*MARKS, *PHRASES)])
    return tokenizer


def _without_marks(texts: Iterable[str]) -> Iterable[str]:
    """The pieces between added tokens: merges that only exist inside those would never be used."""
    for text in texts:
        pieces = [text]
        for mark in sorted((*SPECIAL, *MARKS, *PHRASES), key=len, reverse=True):  # one phrase contains another
            pieces = [part for piece in pieces for part in piece.split(mark)]
        yield from (piece for piece in pieces if piece)
