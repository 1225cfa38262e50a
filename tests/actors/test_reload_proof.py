"""vLLM's own reload of a small module whose loader leaves something out, in bf16: which parameters are named."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("vllm", reason="vllm is not installed: make setup")

from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload import layerwise, record_metadata_for_reloading
from vllm.model_executor.model_loader.reload.meta import materialize_layer

from actors.reload_proof import ProvenReload
from actors.transfer import TransferEngine, _refresh_packed_head
from aster.errors import WeightSyncError

_CPU = torch.device("cpu")


class Packing(QuantizeMethodBase):
    """As vLLM's on CPU: the layer computes with a copy that is out of reach, and its weight becomes empty."""

    def __init__(self, *, keep: bool = False) -> None:
        self.keep = keep

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None: ...

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        packed = layer.weight.detach().clone()
        layer.cpu_linear = lambda x: x @ packed.T
        if not self.keep:
            layer.weight = _parameter(0)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return layer.cpu_linear(x)


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape, dtype=torch.bfloat16), requires_grad=False)


class Fused(nn.Module):
    """Rows 0-1 are q, row 2 is k."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = _parameter(3, 4), _parameter(3)
        self.quant_method = Packing()
        self.weight.weight_loader = self.bias.weight_loader = self.load

    @staticmethod
    def load(param: Tensor, loaded_weight: Tensor, shard: str) -> None:
        (param.data[:2] if shard == "q" else param.data[2:]).copy_(loaded_weight)


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = _parameter(4)
        self.register_buffer("table", torch.ones(2), persistent=False)  # as a rotary one: no checkpoint has it


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = _parameter(5, 4)
        self.quant_method = Packing(keep=True)


class Model(nn.Module):
    """Its loader says that it loaded all, whatever it did: `skips` it silently passes over."""

    skips: str = ""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qk, self.norm, self.lm_head = Embedding(), Fused(), Norm(), Embedding()
        self.lm_head.weight = self.embed.weight
        record_metadata_for_reloading(self)
        for layer in (self.embed, self.qk, self.lm_head):
            layer.quant_method.process_weights_after_loading(layer)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        for name, tensor in weights:
            if name == self.skips:
                continue
            layer, _, rest = name.partition(".")
            part, _, attribute = rest.rpartition(".")
            param = getattr(getattr(self, layer), attribute)
            if part:
                param.weight_loader(param, tensor, part)
            else:
                param.weight_loader(param, tensor)
        return {name for name, _ in self.named_parameters()}


def weights() -> dict[str, Tensor]:
    shapes = {
        "embed.weight": (5, 4),
        "qk.q.weight": (2, 4),
        "qk.k.weight": (1, 4),
        "qk.q.bias": (2,),
        "qk.k.bias": (1,),
        "norm.weight": (4,),
    }
    return {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}


def reloaded(model: Model, sent: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    reload = ProvenReload(model)
    model.load_weights(sent.items())
    return reload.untouched(), reload.finish(None)


def test_a_whole_reload_proves_and_changes_every_weight() -> None:
    model, sent = Model(), weights()
    assert reloaded(model, sent) == ([], [])
    assert torch.equal(
        model.qk.cpu_linear(torch.eye(4).bfloat16()).T, torch.cat([sent["qk.q.weight"], sent["qk.k.weight"]])
    )
    assert torch.equal(model.qk.bias, torch.cat([sent["qk.q.bias"], sent["qk.k.bias"]]))
    assert torch.equal(model.norm.weight, sent["norm.weight"])
    assert model.lm_head.weight is model.embed.weight
    assert torch.equal(model.norm.table, torch.ones(2))
    assert layerwise.materialize_layer is materialize_layer, "vLLM's own is not back"


@pytest.mark.parametrize(
    ("skips", "untouched", "unwritten"),
    [
        ("norm.weight", ["norm.weight"], []),
        ("embed.weight", ["embed.weight"], []),
        ("qk.k.weight", [], ["qk.weight"]),
        ("qk.q.weight", [], ["qk.weight"]),
        ("qk.k.bias", [], ["qk.bias"]),
    ],
)
def test_what_a_loader_claims_but_does_not_write_is_named_and_the_next_reload_is_whole(
    skips: str, untouched: list[str], unwritten: list[str]
) -> None:
    model = Model()
    assert reloaded(model, weights()) == ([], [])
    model.skips = skips
    assert reloaded(model, weights()) == (untouched, unwritten)
    model.skips = ""
    assert reloaded(model, weights()) == ([], [])


def test_a_shard_that_is_written_twice_does_not_stand_for_the_one_that_is_not() -> None:
    """vLLM counts elements: with as many as the layer holds it takes the layer for complete."""
    model, sent = Model(), weights()
    sent["qk.k.weight"], model.skips = sent["qk.q.weight"], "qk.k.weight"
    reload = ProvenReload(model)
    model.load_weights(sent.items())
    model.load_weights([("qk.q.weight", sent["qk.q.weight"])])
    assert (reload.untouched(), reload.finish(None)) == ([], ["qk.weight"])


def engine_of(model: Model) -> TransferEngine:
    engine = object.__new__(TransferEngine)
    engine.model, engine.model_config, engine.device, engine._reload = model, None, _CPU, None
    return engine


def test_an_update_with_a_part_unwritten_or_not_a_number_does_not_finish() -> None:
    model, sent = Model(), weights()
    engine = engine_of(model)
    for change in ("skipped", "sent as NaN"):
        engine.start_weight_update()
        model.skips = "qk.k.weight" if change == "skipped" else ""
        sent["qk.q.weight"][0, 1] = torch.nan if change == "sent as NaN" else 1.0
        model.load_weights(sent.items())
        with pytest.raises(WeightSyncError, match=r"qk\.weight holds NaN: the learner sent it, or the loader left it"):
            engine.finish_weight_update()
    engine.start_weight_update()
    model.load_weights(weights().items())
    engine.finish_weight_update()
    assert torch.equal(model.lm_head.cpu_linear(torch.eye(4).bfloat16()).T, model.embed.weight)


def test_an_update_that_was_broken_off_does_not_pass_for_finished() -> None:
    model = Model()
    engine = engine_of(model)
    engine.start_weight_update()
    model.load_weights([(n, t) for n, t in weights().items() if n != "qk.k.weight"])
    with pytest.raises(WeightSyncError, match=r"qk\.weight"):
        engine.finish_weight_update()


def test_a_packed_head_that_is_not_its_weight_is_refused() -> None:
    model = Model()
    with torch.no_grad():
        model.embed.weight.copy_(torch.randn(5, 4))
    model.lm_head.quant_method = SimpleNamespace(  # a vLLM that packs elsewhere
        apply=model.lm_head.quant_method.apply, process_weights_after_loading=lambda layer: None
    )
    with pytest.raises(WeightSyncError, match="its packed copy is stale"):
        _refresh_packed_head(model, _CPU)
    model.lm_head.quant_method = Packing(keep=True)
    _refresh_packed_head(model, _CPU)
