"""The reference's FSDP checkpoints, read without a process group. They are only read; our own layout is `persist.py`.

    DIR/model_world_size_W_rank_R.pt   a torch-saved state dict per rank: name -> DTensor sharded on dim 0, or a plain
                                       tensor that every rank holds alike
    DIR/huggingface/                   config, generation config, tokenizer

A mesh of two dimensions (replicas x shards) is read through its first replica. The files are unpickled with
`weights_only`, which admits tensors, DTensors and what torch says they are made of; one name is added to that list,
a plain record of newer versions. Anything else in a file is an error before it runs.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from actors.persist import write_hf
from aster.errors import DataError
from aster.types import TensorMeta

_NAME = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt$")
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def merge_reference(path: str, out: str, *, dtype: str) -> None:
    """Turn the directory `path` of the reference into the Hugging Face directory `out`.

    One process; the files are mapped, not read whole. Raises `DataError` naming the file for a rank that is missing,
    a rank that disagrees with the others, a tensor that is not sharded on dim 0, and what is no tensor at all.
    """
    source = Path(path) / "huggingface"
    if not (source / "config.json").is_file():
        raise DataError(f"{source / 'config.json'} is missing: the reference keeps config and tokenizer there")
    shards = {file: _load(file) for file in _rank_files(Path(path))}
    shapes = _shapes(shards)
    if _tied(source / "config.json") and {_HEAD, _EMBEDDING} <= shapes.keys():
        del shapes[_HEAD]
        if not torch.equal(_whole(_HEAD, shards), _whole(_EMBEDDING, shards)):
            raise DataError(f"{path}: config.json ties {_HEAD} to {_EMBEDDING}, but the two differ in the checkpoint")
    tensors: Iterator[tuple[str, torch.Tensor]] = (
        (name, _whole(name, shards).to(getattr(torch, dtype))) for name in shapes
    )
    write_hf(out, tensors, metadata=[TensorMeta(n, dtype, s) for n, s in shapes.items()], source=source)


def _rank_files(path: Path) -> list[Path]:
    """The files in order of rank; all of one world size, none missing."""
    found = {(int(m[1]), int(m[2])): p for p in sorted(path.iterdir()) if (m := _NAME.search(p.name))}
    sizes = sorted({world for world, _ in found})
    if len(sizes) != 1:
        raise DataError(f"{path} holds files of world sizes {sizes}: exactly one is needed, move the others away")
    world_size = sizes[0]
    missing = [rank for rank in range(world_size) if (world_size, rank) not in found]
    if missing:
        raise DataError(f"{path} lacks model_world_size_{world_size}_rank_{missing[0]}.pt: copy the files of all ranks")
    return [found[world_size, rank] for rank in range(world_size)]


def _load(file: Path) -> dict[str, torch.Tensor]:
    try:
        with torch.serialization.safe_globals(_records()), _quiet():
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise DataError(f"{file} cannot be read as a state dict of tensors: {error}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise DataError(f"{file} is no state dict: tensors by name are expected")
    return dict(state)


def _records() -> list[Any]:
    """What DTensors of newer versions of torch carry and its own allow-list leaves out, as far as this torch has it."""
    from torch.distributed.tensor import _dtensor_spec

    found = (getattr(_dtensor_spec, name, None) for name in ("ShardOrderEntry",))
    return [record for record in found if record is not None]


@contextmanager
def _quiet() -> Iterator[None]:
    """torch warns once per tensor that a mesh was unpickled without process groups, which is what we want."""
    logger = logging.getLogger("torch.distributed.device_mesh")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _shapes(shards: Mapping[Path, Mapping[str, torch.Tensor]]) -> dict[str, tuple[int, ...]]:
    """Whole shapes by name, in the first file's order."""
    (first, state), *others = shards.items()
    for file, other in others:
        if state.keys() != other.keys():
            odd = sorted(state.keys() ^ other.keys())[0]
            raise DataError(f"{first.name} and {file.name} do not hold the same tensors: {odd} is in one of them only")
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _whole(name: str, shards: Mapping[Path, Mapping[str, torch.Tensor]]) -> torch.Tensor:
    (file, state), *_ = shards.items()
    first = state[name]
    if not isinstance(first, DTensor):
        return first
    *replicas, placement = first.placements
    if not (isinstance(placement, Shard) and placement.dim == 0 and all(isinstance(p, Replicate) for p in replicas)):
        if all(isinstance(p, Replicate) for p in first.placements):
            return _local(first)
        raise DataError(f"{file}: {name} has placements {first.placements}, only shards of dim 0 can be merged")
    parts = [_local(state[name]) for state in shards.values()][: first.device_mesh.shape[-1]]
    whole = torch.cat([part for part in parts if part.numel()]) if first.numel() else parts[0]
    if whole.shape != first.shape:
        raise DataError(
            f"{file.parent}: the shards of {name} make {tuple(whole.shape)}, {file.name} says {tuple(first.shape)}: "
            "the files are not of one save"
        )
    return whole


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """`to_local` asks for the process groups of the mesh, which do not exist here."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _tied(config: Path) -> bool:
    return bool(json.loads(config.read_text("utf-8")).get("tie_word_embeddings", False))
