"""The tokens of a trajectory as the viewer colours them: what each one spells, how likely it was, who sampled it.

Ids become text through the `tokenizer.json` of the model that the run names. Everything is written relative to one
text, so that a page holds it once: a token is a number of UTF-16 units of it, which is how JavaScript counts.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aster.data.trajectories import GAP_COLUMN

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NATS_PER_UNIT = 0.05  # -log p in the page
_MOST_UNITS = 400  # 20 nats: what a wrong log-prob of a broken engine may not exceed in the page
TOKENIZER_FILE = "tokenizer.json"


class TokenTexts:
    """What every id spells, in bytes: a character may be spread over several tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {i: t.content for i, t in tokenizer.get_added_tokens_decoder().items()}
        self._special = {i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
        self._is_byte_level = "ByteLevel" in repr(tokenizer.decoder)
        self._known: dict[int, bytes] = {}

    @classmethod
    def load(cls, folder: Path) -> TokenTexts:
        """ImportError without the package tokenizers; its own exceptions where the file is none."""
        from tokenizers import Tokenizer as _Tokenizer

        return cls(_Tokenizer.from_file(str(folder / TOKENIZER_FILE)))

    def bytes_of(self, token: int) -> bytes:
        if token not in self._known:
            self._known[token] = self._spell(token)
        return self._known[token]

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The text of each token; a character that several tokens make belongs to the last of them.

        The pieces of `ids` joined are their text. Bytes that are no character become U+FFFD.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        out = [decoder.decode(self.bytes_of(int(i))) for i in ids]
        if out:
            out[-1] += decoder.decode(b"", final=True)
        return out

    def text(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """`ChatRenderer.decode`, for a report that must not need the whole model directory."""
        return "".join(self.pieces(i for i in ids if not (skip_special and int(i) in self._special)))

    def _spell(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        written = self._tokenizer.id_to_token(token)
        if written is None:
            return f"<{token}?>".encode()
        if self._is_byte_level:
            table = _bytes_of_characters()
            return b"".join(bytes([table[c]]) if c in table else c.encode() for c in written)
        return str(self._tokenizer.decode([token])).encode()


@cache
def _bytes_of_characters() -> dict[str, int]:
    """The stand-ins that byte-level BPE files write for bytes: printable Latin-1 for itself, the others from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(rest)}


def find_tokenizer(run: Path, model: str) -> Path | None:
    """The folder with the run's tokenizer: `model` as it stands, else the same path below a parent of the run, since a
    run directory may have been moved or is read from another working directory."""
    if not model:
        return None
    wanted = Path(model)
    parts = wanted.parts[1:] if wanted.is_absolute() else wanted.parts
    below = [parent.joinpath(*parts[n:]) for parent in run.resolve().parents for n in range(len(parts))]
    return next((folder for folder in [wanted, *below] if (folder / TOKENIZER_FILE).is_file()), None)


@dataclass(frozen=True)
class TokenArrays:
    """The aligned arrays of one trajectory's response, as `trajectories/STEP.parquet` holds them; T tokens."""

    ids: np.ndarray  # [T] int32
    mask: np.ndarray  # [T] bool, True = sampled by the model
    behaviour_logprobs: np.ndarray  # [T] float32
    versions: np.ndarray  # [T] int32
    gap: np.ndarray | None = None  # [T] int8, `importance.stored_gap`; None where the learner was not asked


def token_view(arrays: TokenArrays, texts: TokenTexts, *, max_chars: int) -> dict[str, Any]:
    """What the page stores of them: `text`, and per token (the first of them, up to `max_chars` characters)

    - `n`: UTF-16 units of the text
    - `m`: run lengths of the mask, beginning with the model's
    - `lp`: -log p of the model's tokens in units of NATS_PER_UNIT
    - `v`: [version, how many] runs over the model's tokens
    - `r`: learner - engine, log-probs of the model's tokens in units of `importance.GAP_UNIT`, where it was stored
    - `cut`: how many tokens are not in the page
    """
    pieces = texts.pieces(arrays.ids.tolist())
    ends = np.cumsum([len(p) for p in pieces]) if pieces else np.zeros(0)
    kept = int(np.searchsorted(ends, max_chars, side="right"))
    mask = np.asarray(arrays.mask[:kept], dtype=bool)
    out: dict[str, Any] = {
        "text": "".join(pieces[:kept]),
        "n": [_utf16(p) for p in pieces[:kept]],
        "m": list(_runs_of_mask(mask)),
        "lp": _units(-arrays.behaviour_logprobs[:kept][mask]),
        "v": [[int(v), len(list(run))] for v, run in groupby(arrays.versions[:kept][mask].tolist())],
    }
    if arrays.gap is not None and len(arrays.gap) == len(arrays.ids):
        out["r"] = arrays.gap[:kept][mask].tolist()
    if kept < len(pieces):
        out["cut"] = len(pieces) - kept
    return out


def _runs_of_mask(mask: np.ndarray) -> Iterator[int]:
    """
    >>> list(_runs_of_mask(np.array([True, True, False]))), list(_runs_of_mask(np.array([False, True])))
    ([2, 1], [0, 1, 1])
    """
    for number, (value, run) in enumerate(groupby(mask.tolist())):
        if number == 0 and not value:
            yield 0
        yield len(list(run))


def _units(nats: np.ndarray) -> list[int]:
    worst = _MOST_UNITS * NATS_PER_UNIT
    finite = np.nan_to_num(nats.astype(np.float64), nan=worst, posinf=worst)
    return np.clip(np.rint(finite / NATS_PER_UNIT), 0, _MOST_UNITS).astype(int).tolist()


def _utf16(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-16-le", "surrogatepass")) // 2


def texts_for(runs: Mapping[Path, str], *, override: Path | None = None) -> dict[Path, TokenTexts | str]:
    """The tokenizer of each run (`{run: model.path}`), or why there is none. Each folder is read once."""
    loaded: dict[Path, TokenTexts | str] = {}
    out: dict[Path, TokenTexts | str] = {}
    for run, model in runs.items():
        folder = override or find_tokenizer(run, model)
        if folder is None:
            out[run] = f"no {TOKENIZER_FILE} in {model or 'the model directory'}: name one with --tokenizer"
            continue
        if folder not in loaded:
            loaded[folder] = _load(folder)
        out[run] = loaded[folder]
    return out


def _load(folder: Path) -> TokenTexts | str:
    try:
        return TokenTexts.load(folder)
    except ImportError:
        return "the package tokenizers is not installed"
    except Exception as error:  # policy: tokenizers raises a bare Exception for a broken file; the page does without
        return f"{folder / TOKENIZER_FILE} cannot be read: {error}"


def arrays_of(columns: Mapping[str, Sequence[Any]], index: int) -> TokenArrays:
    """Row `index` of the columns of a batch of `trajectories/STEP.parquet`, each a list of arrays."""
    gap = columns.get(GAP_COLUMN)
    return TokenArrays(
        ids=columns["ids"][index],
        mask=columns["mask"][index],
        behaviour_logprobs=columns["behaviour_logprobs"][index],
        versions=columns["versions"][index],
        gap=None if gap is None else gap[index],
    )
