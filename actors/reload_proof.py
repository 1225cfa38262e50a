"""vLLM's layer-wise reload, with proof that it wrote what it was given. Imported in vLLM's workers only.

vLLM collects what arrives for a layer; once that is as much as the layer holds, it gives the layer memory, writes it,
and makes the kernel's own format of it (on CPU a packed copy that nobody can read back). It raises neither where
nothing arrives (the old tensors are put back) nor where a loader writes only a part (the rest is what the memory held).
The canary does not tell either from rounding in bf16: a step of training moves it less. So here, in any precision,

    nothing arrived for a layer     is seen from vLLM's count of what arrived
    a part was not written          is NaN, which the memory is filled with beforehand; looked at before it is packed

Not proven: buffers, quantized weights, and padded ones (of experts, on some GPUs), since nothing writes the padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload, layerwise
from vllm.model_executor.model_loader.reload.meta import materialize_layer

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of others torch does not tell the largest element


class ProvenReload:
    """One reload, from construction to `finish`. Until then the model is part old, part new, part NaN."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._owners = {name: model.get_submodule(name.rpartition(".")[0]) for name, _ in model.named_parameters()}
        self._prefixes = {layer: f"{prefix}." if prefix else "" for prefix, layer in model.named_modules()}
        self._written: list[tuple[str, Tensor]] = []  # of the layer that got its memory last
        self._largest: list[tuple[str, Tensor]] = []  # element of each parameter; NaN if any is
        initialize_layerwise_reload(model)
        # Some keep their memory and are written at once (biases), maybe after their layer was processed.
        self._kept = [(name, p) for name, p in model.named_parameters() if not p.is_meta and _provable(p)]
        for _, parameter in self._kept:
            parameter.data.fill_(torch.nan)
        layerwise.materialize_layer = self._materialize  # until `finish`

    def _materialize(self, layer: nn.Module, info: Any) -> None:
        self._look()
        names = [name for name, p in layer.named_parameters(recurse=False) if p.is_meta]
        materialize_layer(layer, info)
        for name in names:
            if _provable(tensor := getattr(layer, name)):
                self._written.append((self._prefixes[layer] + name, tensor.data.fill_(torch.nan)))

    def _look(self) -> None:
        """One pass over what was written last; frees what the layer no longer needs before the next one gets memory."""
        self._largest += [(name, tensor.data.amax()) for name, tensor in self._written]
        self._written = []

    def untouched(self) -> list[str]:
        """The parameters of layers for which nothing arrived; a tied one counts once. To be asked before `finish`."""
        infos = [(name, layerwise.get_layerwise_info(layer)) for name, layer in self._owners.items()]
        return [name for name, info in infos if info.can_load() and info.load_numel == 0 < (info.load_numel_total or 0)]

    def finish(self, model_config: Any) -> list[str]:
        """Leave no layer waiting for weights. Returns the parameters that hold NaN now."""
        try:
            finalize_layerwise_reload(self._model, model_config)
        finally:
            layerwise.materialize_layer = materialize_layer
        self._written += self._kept
        self._kept = []
        self._look()
        return sorted(name for name, largest in self._largest if largest.isnan())


def _provable(tensor: Tensor) -> bool:
    padded: bool = getattr(tensor, "weight_loader_numel", tensor.numel()) != tensor.numel()
    return tensor.dtype in _DTYPES and tensor.numel() > 0 and not padded
