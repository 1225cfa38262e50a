"""The reference's FSDP checkpoints, read without a process group. They are only read; our own layout is `persist.py`.

    DIR/model_world_size_W_rank_R.pt   a torch-saved state dict per rank: name -> DTensor sharded on dim 0, or a plain
                                       tensor: its shard, or the whole that every rank holds alike (the shape that
                                       config.json asks for tells which)
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
    ranks that disagree (about the names, about a tensor that each holds whole, about the shape that their shards make),
    a tensor that is not sharded on dim 0, and what is no tensor at all.
    """
    source = Path(path) / "huggingface"
    if not (source / "config.json").is_file():
        raise DataError(f"{source / 'config.json'} is missing: the reference keeps config and tokenizer there")
    shards = {file: _load(file) for file in _rank_files(Path(path))}
    shapes = _shapes(shards, source)
    if _tied(source / "config.json") and {_HEAD, _EMBEDDING} <= shapes.keys():
        head = shapes.pop(_HEAD)
        if not torch.equal(_whole(_HEAD, head, shards), _whole(_EMBEDDING, shapes[_EMBEDDING], shards)):
            raise DataError(f"{path}: config.json ties {_HEAD} to {_EMBEDDING}, but the two differ in the checkpoint")
    tensors: Iterator[tuple[str, torch.Tensor]] = (
        (name, _whole(name, shape, shards).to(getattr(torch, dtype))) for name, shape in shapes.items()
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


def _shapes(shards: Mapping[Path, Mapping[str, torch.Tensor]], source: Path) -> dict[str, tuple[int, ...]]:
    """Whole shapes by name, in the first file's order."""
    (first, state), *others = shards.items()
    for file, other in others:
        if state.keys() != other.keys():
            odd = sorted(state.keys() ^ other.keys())[0]
            raise DataError(f"{first.name} and {file.name} do not hold the same tensors: {odd} is in one of them only")
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    plain = [name for name, tensor in state.items() if not isinstance(tensor, DTensor)]
    if others and plain:
        wanted = _wanted(source)
        shapes |= {name: wanted[name] for name in plain if name in wanted}
    return shapes


def _wanted(source: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the model that config.json describes. Nothing else says whether a plain tensor is a shard: those of
    a norm that was hardly trained may be equal, too."""
    from transformers import AutoConfig, AutoModelForCausalLM  # seconds, which most checkpoints need not wait for

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    except (ValueError, KeyError, OSError) as error:
        raise DataError(
            f"the checkpoint holds plain tensors, and {source / 'config.json'} does not tell how long they are: {error}"
        ) from error
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _whole(name: str, shape: tuple[int, ...], shards: Mapping[Path, Mapping[str, torch.Tensor]]) -> torch.Tensor:
    """The tensor of that `shape`, copied only where it is made of several."""
    (file, state), *_ = shards.items()
    first = state[name]
    parts = [_local(other[name]) for other in shards.values()]
    if not isinstance(first, DTensor):
        if all(part.shape == shape for part in parts):
            return _agreed(name, parts, file)
    elif all(isinstance(p, Replicate) for p in first.placements):
        return _agreed(name, parts, file)
    else:
        *replicas, placement = first.placements
        if (
            not isinstance(placement, Shard)
            or placement.dim != 0
            or not all(isinstance(p, Replicate) for p in replicas)
        ):
            raise DataError(f"{file}: {name} has placements {first.placements}, only shards of dim 0 can be merged")
        parts = parts[: first.device_mesh.shape[-1]]
    parts = [part for part in parts if part.numel()] or parts[:1]
    fit = parts[0].ndim and all(part.shape[1:] == parts[0].shape[1:] for part in parts)
    if not fit or (sum(len(part) for part in parts), *parts[0].shape[1:]) != shape:
        raise DataError(
            f"{file.parent}: the shards of {name} make {' + '.join(str(tuple(part.shape)) for part in parts)}, "
            f"{file.name if isinstance(first, DTensor) else 'config.json'} says {shape}: the files are not of one save"
        )
    return torch.cat(parts)


def _agreed(name: str, parts: list[torch.Tensor], file: Path) -> torch.Tensor:
    odd = next((rank for rank in range(1, len(parts)) if not torch.equal(parts[rank], parts[0])), None)
    if odd is not None:
        raise DataError(f"{file.parent}: ranks 0 and {odd} do not hold the same {name}: the files are not of one save")
    return parts[0]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """`to_local` asks for the process groups of the mesh, which do not exist here."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _tied(config: Path) -> bool:
    return bool(json.loads(config.read_text("utf-8")).get("tie_word_embeddings", False))
