"""The tensors that the wire tests send: small, of several shapes, with names as a model has them."""

from __future__ import annotations

import torch

from aster.types import TensorMeta

SHAPES = {"embed": (50, 8), "layer.0": (8, 8), "layer.1": (8, 24), "norm": (7,), "head.bias": (3,)}


def metas(dtype: str = "float32") -> list[TensorMeta]:
    return [TensorMeta(name, dtype, shape) for name, shape in SHAPES.items()]


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
