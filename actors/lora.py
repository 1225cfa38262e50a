"""LoRA (arXiv 2106.09685): W + alpha/rank * B A on the linear layers of the decoder, W frozen. Adapters, and merging.

`attach` changes the model before it is sharded; from then on the adapters are parameters like others, and the only
ones that the optimizer and a checkpoint know. The frozen weights need no fp32 master, so they are kept in the compute
dtype, sharded all the same. What leaves the learner as a model (engines, exports) is merged, tensor by tensor, in
fp64: the same bits from any number of ranks and from `aster merge`.

Shape legend: a [rank, in] · b [out, rank] · weight [out, in].
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear

from actors.model_files import tensor_files
from aster.config import LoraConfig
from aster.errors import ConfigError, DataError

A, B = ".lora_a", ".lora_b"


class LoraLinear(nn.Module):
    """A linear layer and its adapter. `weight` and `bias` keep their names, so checkpoints of the base model fit."""

    def __init__(self, base: nn.Linear, *, rank: int, scale: float) -> None:
        super().__init__()
        self.weight = base.weight
        self.bias = base.bias
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features, dtype=torch.float32, device="meta"))
        self.lora_b = nn.Parameter(torch.empty(base.out_features, rank, dtype=torch.float32, device="meta"))
        self.scale = scale
        self.active = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = linear(x, self.weight, self.bias)
        return out + linear(linear(x, self.lora_a), self.lora_b) * self.scale if self.active else out


def attach(model: nn.Module, layers: Iterable[nn.Module], lora: LoraConfig, *, dtype: torch.dtype) -> None:
    """Freeze `model`, keep its weights in `dtype`, and give the targets inside `layers` an adapter; all on meta."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(dtype)  # in place: tied weights stay tied, and buffers what they are
    linears: set[str] = set()
    for layer in layers:
        for name, module in list(layer.named_modules()):
            path, _, leaf = name.rpartition(".")
            if not isinstance(module, nn.Linear):
                continue
            linears.add(leaf)
            if leaf in lora.targets:
                setattr(layer.get_submodule(path), leaf, LoraLinear(module, rank=lora.rank, scale=lora.scale))
    unknown = sorted(set(lora.targets) - linears)
    if unknown:
        raise ConfigError(
            f"lora.targets names {', '.join(unknown)}, but the decoder's linear layers are {', '.join(sorted(linears))}"
        )


@torch.no_grad()
def initialise(adapters: Mapping[str, torch.Tensor], *, seed: int) -> None:
    """a uniform in +-1/sqrt(in) and b zero, so that training starts at the base model; the same at any world size."""
    for name, adapter in adapters.items():
        if name.endswith(B):
            adapter.zero_()
            continue
        generator = torch.Generator().manual_seed(seed << 32 | zlib.crc32(name.encode()))
        full = torch.rand(adapter.shape, generator=generator) * 2 - 1
        copy_rows(adapter, full / adapter.shape[1] ** 0.5)


def copy_rows(parameter: torch.Tensor, full: Any) -> None:
    """This rank's rows of `full` (a tensor or a safetensors slice) into its shard."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(full[:])
        return
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    if shape[0]:
        parameter.to_local().copy_(full[offset[0] : offset[0] + shape[0]])


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the one that the run began with: the reference of a KL penalty, for free."""
    layers = [m for m in model.modules() if isinstance(m, LoraLinear)]
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        for layer in layers:
            layer.active = True


def merged(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, scale: float) -> torch.Tensor:
    """weight + scale * b a in fp64. Of sharded tensors the sharded result; a collective then."""
    if isinstance(weight, DTensor):
        assert isinstance(a, DTensor)
        assert isinstance(b, DTensor)
        assert weight.placements == b.placements, "the rows of b belong to the rows of the weight"
        local = merged(weight.to_local(), a.full_tensor(), b.to_local(), scale=scale)
        return DTensor.from_local(
            local, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
        )
    return weight.double() + scale * (b.double() @ a.double())


def base_shapes(base: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the model directory `base`, a tied head left out. `DataError` if unreadable."""
    try:
        files = tensor_files(base)
    except ConfigError as error:
        raise DataError(f"the checkpoint holds LoRA adapters, and their base model cannot be read: {error}") from error
    if json.loads((base / "config.json").read_text("utf-8")).get("tie_word_embeddings"):
        files.pop("lm_head.weight", None)
    shapes = {}
    for name, file in files.items():
        with safe_open(file, framework="pt") as tensors:
            shapes[name] = tuple(tensors.get_slice(name).get_shape())
    return shapes


def merged_directory(
    base: Path, adapters: Mapping[str, torch.Tensor], *, scale: float, held_in: torch.dtype, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of `base_shapes`, in that order, with its adapter merged in, one at a time, in `dtype`.

    `held_in`: the dtype in which the learner kept the frozen weights. `DataError` if an adapter finds no weight.
    """
    names, files = base_shapes(base), tensor_files(base)
    orphans = sorted(n for n in adapters if n.endswith(A) and n.removesuffix(A) + ".weight" not in names)
    if orphans:
        raise DataError(f"{base} has no weight for {len(orphans)} adapters ({', '.join(orphans[:3])}): another model?")
    for name in names:
        with safe_open(files[name], framework="pt", device="cpu") as tensors:
            weight = tensors.get_tensor(name).to(held_in)
        stem = name.removesuffix(".weight")
        if stem + A in adapters:
            weight = merged(weight, adapters[stem + A], adapters[stem + B], scale=scale)
        yield name, weight.to(dtype)
