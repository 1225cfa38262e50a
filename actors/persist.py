"""What a learner leaves on disk: checkpoints to resume from and Hugging Face directories. Complete, or not there.

`saver.py` writes the checkpoints; here is what is in them, how they are read, and the export.

    PATH/              torch.distributed.checkpoint shards: model.NAME, optim.NAME.exp_avg, optim.NAME.exp_avg_sq
    PATH/learner.json  step counts
    PATH/rng/RANK.pt   random state of each rank that saved

Names are Hugging Face names, so a checkpoint is readable at any world size and without the model's code:
`merge_checkpoint` makes a model directory of it in one process.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from actors import lora
from actors.adamw import MOMENTS
from aster.checkpoints import copy_model_files, sync, sync_tree
from aster.config import LoraConfig
from aster.errors import DataError
from aster.types import TensorMeta

COUNTERS = "learner.json"
_MODEL = "model."
_FILE_BYTES = 4 << 30  # of one safetensors file


def training_tensors(trained: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What a checkpoint holds, by stable name; the live shards themselves, so that loading writes into them."""
    out: dict[str, torch.Tensor] = {}
    for name, parameter in trained.items():
        state = optimizer.state[parameter]
        out[f"{_MODEL}{name}"] = parameter.detach()
        out |= {f"optim.{name}.{moment}": state[moment] for moment in MOMENTS}
    return out


def adapter_facts(config: LoraConfig, *, base: Path, base_dtype: str) -> dict[str, Any]:
    """What it takes to make a model of the adapters in a checkpoint."""
    return {"rank": config.rank, "scale": config.scale, "base": str(base.resolve()), "base_dtype": base_dtype}


def check_adapters(path: str, facts: Mapping[str, Any]) -> None:
    """Raises `DataError` unless checkpoint `path` has adapters of this run's kind, or none where its rank is 0.

    A scale fits any adapter, so nothing else would notice another one. The base may have moved.
    """
    counters: dict[str, Any] = read_counters(path)
    saved = counters.get("lora", {})
    for key, value in facts.items() if saved or facts["rank"] else ():
        if key != "base" and saved.get(key) != value:
            raise DataError(
                f"checkpoint {path} was saved with lora {key}={saved.get(key)}, this run has {value}: resume with "
                "the lora section that the run began with, or start a new run directory"
            )


def check_none_left(path: str, names: Iterable[str]) -> None:
    """Raises `DataError` when checkpoint `path` holds weights of other `names` too: they would be lost without a word,
    which the model would show only in what it says."""
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    left = sorted({name for name in stored if name.startswith(_MODEL)} - {_MODEL + name for name in names})
    if left:
        raise DataError(
            f"checkpoint {path} has {len(left)} tensors that this model has not ({', '.join(left[:3])}): resume with "
            "the model.path and the lora section that it was saved with, or start a new run directory"
        )


def load(path: str, *, tensors: dict[str, torch.Tensor], rank: int) -> dict[str, int]:
    """A collective: fill `tensors` in place, restore this rank's random state if it was saved, return the counters."""
    counters = read_counters(path)
    stored = set(dcp.FileSystemReader(path).read_metadata().state_dict_metadata)
    absent = sorted(set(tensors) - stored)
    if absent:
        raise DataError(
            f"checkpoint {path} lacks {len(absent)} tensors of this model ({', '.join(absent[:3])}): "
            "it was saved from another architecture; start from that model.path or a new run directory"
        )
    try:
        dcp.load(tensors, checkpoint_id=path)
    except dcp.CheckpointException as error:
        raise DataError(f"checkpoint {path} cannot be read into this model: {error}") from error
    state = Path(path) / "rng" / f"{rank}.pt"
    if state.is_file():
        _set_rng_state(torch.load(state, weights_only=True))
    return counters


def read_counters(path: str) -> dict[str, int]:
    file = Path(path) / COUNTERS
    if not file.is_file():
        raise DataError(f"{path} is not a learner checkpoint: {file} is missing")
    counters: dict[str, int] = json.loads(file.read_text("utf-8"))
    return counters


def merge_checkpoint(path: str, out: str, *, source: str, dtype: str) -> None:
    """Turn the checkpoint `path` into the Hugging Face directory `out`; `source` gives config, tokenizer, template.

    One process, no process group, one tensor in memory at a time (and one output file).
    """
    counters: dict[str, Any] = read_counters(path)  # refuses what is no checkpoint
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    shapes = {
        name.removeprefix(_MODEL): tuple(entry.size)
        for name, entry in stored.items()
        if name.startswith(_MODEL) and isinstance(entry, TensorStorageMetadata)
    }

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in shapes.items():
            into = {_MODEL + name: torch.empty(shape, dtype=torch.float32)}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # torch announces that one process reads alone
                dcp.load(into, checkpoint_id=path, no_dist=True)
            yield name, into[_MODEL + name]

    if "lora" in counters:
        made = counters["lora"]
        base, held_in = Path(made["base"]), getattr(torch, made["base_dtype"])
        adapters, shapes = dict(tensors()), lora.base_shapes(base)
        stream = lora.merged_directory(
            base, adapters, scale=made["scale"], held_in=held_in, dtype=getattr(torch, dtype)
        )
    else:
        stream = ((name, tensor.to(getattr(torch, dtype))) for name, tensor in tensors())
    write_hf(out, stream, metadata=[TensorMeta(n, dtype, s) for n, s in shapes.items()], source=Path(source))


def write_hf(
    path: str, tensors: Iterable[tuple[str, torch.Tensor]], *, metadata: Sequence[TensorMeta], source: Path
) -> None:
    """A model directory of CPU tensors in the order and dtype of `metadata`, with the other files of `source`."""
    final = Path(path)
    partial = final.with_name(final.name + ".tmp")  # beside it, also where the path ends in a slash
    shutil.rmtree(partial, ignore_errors=True)
    copy_model_files(source, partial)
    _write_config(partial / "config.json", dtype=metadata[0].dtype)
    files = _plan_files(metadata)
    total = sum(_bytes(m) for m in metadata)
    stream = iter(tensors)
    for file, entries in files.items():
        content = {}
        for meta in entries:
            name, tensor = next(stream)
            assert (name, tuple(tensor.shape)) == (meta.name, meta.shape), (name, tensor.shape, meta)
            content[name] = tensor.contiguous()
        save_file(content, partial / file, metadata={"format": "pt"})
    assert next(stream, None) is None, "more tensors than the metadata announced"
    if len(files) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {m.name: file for file, entries in files.items() for m in entries},
        }
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), "utf-8")
    replace_directory(partial, final)


def replace_directory(partial: Path, final: Path) -> None:
    """Give `partial` its final name once all in it is on disk; a directory that had it before makes room only then."""
    sync_tree(partial)
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(partial, final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _plan_files(metadata: Sequence[TensorMeta]) -> dict[str, list[TensorMeta]]:
    """File name -> its tensors, at most `_FILE_BYTES` each unless one tensor is larger."""
    groups: list[list[TensorMeta]] = []
    used = _FILE_BYTES + 1
    for meta in metadata:
        if used + _bytes(meta) > _FILE_BYTES:
            groups.append([])
            used = 0
        groups[-1].append(meta)
        used += _bytes(meta)
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups)}


def _bytes(meta: TensorMeta) -> int:
    dtype: torch.dtype = getattr(torch, meta.dtype)
    return prod(meta.shape) * dtype.itemsize


def _write_config(file: Path, *, dtype: str) -> None:
    """The source's config with the dtype that the tensors have, and without a quantization that they no longer have."""
    config: dict[str, Any] = json.loads(file.read_text("utf-8"))
    config.pop("torch_dtype", None)
    config.pop("quantization_config", None)
    config["dtype"] = dtype
    file.write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: Mapping[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
