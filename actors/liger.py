"""Liger's fused Triton kernels (RMSNorm, rotary embedding, SwiGLU) in place of a Hugging Face model's own. Optional.

Its fused cross-entropy stays out: it has no log-probs and no entropy to give, and the log-prob head holds no full
logits either.
"""

from __future__ import annotations

import inspect
from importlib.util import find_spec
from typing import Any

import torch

from aster.errors import ConfigError

_OURS = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def apply_liger(hf: Any, *, device: torch.device) -> None:
    """Patch `hf` (on meta or not) and the module of its class. Raises `ConfigError` where the kernels cannot run."""
    if device.type != "cuda":
        raise ConfigError("model.liger=true needs CUDA, since its kernels are Triton's: set model.liger=false")
    if find_spec("liger_kernel") is None:
        raise ConfigError(
            "model.liger=true needs the liger-kernel package: make setup EXTRA=gpu installs it, or set it to false"
        )
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as PATCHES

    patch = PATCHES.get(hf.config.model_type)
    if patch is None:
        raise ConfigError(
            f"model.liger=true: liger-kernel knows no model of type {hf.config.model_type!r} (it knows "
            f"{', '.join(sorted(PATCHES))}): set model.liger=false"
        )
    known = inspect.signature(patch).parameters
    patch(model=hf, **{name: value for name, value in _OURS.items() if name in known})
