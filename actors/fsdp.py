"""One rank's share of the model: FSDP2 over a Hugging Face decoder, fp32 masters, optionally in host memory.

Knows nothing of losses, optimizers or Ray. Four traps are handled here and nowhere else:

* parameters are built on the meta device and each rank reads only its slice of the safetensors files, but buffers are
  built for real: the rotary tables are in no checkpoint, and `to_empty` would leave garbage in them;
* gloo has no reduce with a divide factor, so FSDP's mean over ranks stays and the learner scales its loss instead;
* packing needs `use_cache=False` and no attention mask, else transformers silently attends across samples;
* a forward without gradient leaves the root's full weights in memory, and an update or a load in between would not
  reach them: `log_probs` therefore reshards.

Shape legend: R tokens of a packed row · N of them under the loss mask · V vocabulary · H hidden.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from actors.attention import PACKED, Packing, choose
from actors.liger import apply_liger
from actors.log_probs import label_log_probs
from actors.lora import A, B, attach, copy_rows, initialise, merged
from actors.model_files import tensor_files
from aster.algo import naming
from aster.config import LoraConfig, ModelConfig
from aster.errors import ConfigError
from aster.types import TensorMeta

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_PLAIN: dict[str, tuple[float | None, ...]] = {  # config field -> the values with which it changes nothing
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logits_scaling": (None, 1.0),
    "logit_scale": (None, 1.0),
    "lm_head_multiplier": (None, 1.0),
}


# process group ------------------------------------------------------------------------------------------------------


def open_store(host: str, port: int, *, rank: int, world_size: int, timeout_s: float) -> dist.TCPStore:
    """The rendezvous of a gang. Rank 0 listens (port 0 = a free one, see `.port`), the others connect."""
    return dist.TCPStore(
        host,
        port,
        world_size,
        is_master=rank == 0,
        timeout=datetime.timedelta(seconds=timeout_s),
        wait_for_workers=False,  # rank 0 must be able to publish its port before anyone can come
    )


def join_group(store: dist.Store, *, rank: int, world_size: int, device: torch.device, timeout_s: float) -> bool:
    """Make the default process group; False if this process already has one of the same size and rank.

    NCCL on CUDA with gloo beside it for CPU tensors (checkpoints), gloo on CPU. Collectives give up after `timeout_s`.
    """
    if dist.is_initialized():
        if (dist.get_rank(), dist.get_world_size()) != (rank, world_size):
            raise RuntimeError(
                f"this process is already rank {dist.get_rank()} of {dist.get_world_size()}, "
                f"it cannot become rank {rank} of {world_size}"
            )
        return False
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "cpu:gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=timeout_s),
        device_id=device if device.type == "cuda" else None,
    )
    return True


# the model ----------------------------------------------------------------------------------------------------------


class Policy(nn.Module):
    """The root that FSDP shards: a causal LM whose forward gives log-probs of chosen labels, never all logits."""

    def __init__(self, hf: PreTrainedModel, *, chunk_tokens: int) -> None:
        super().__init__()
        self.hf = hf
        self.chunk_tokens = chunk_tokens

    def forward(
        self,
        input_ids_R: torch.Tensor,
        position_ids_R: torch.Tensor,
        at_N: torch.Tensor,
        labels_N: torch.Tensor,
        *,
        packing: Packing,
        temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(log pi(label) [N] fp32, entropy [N] fp32 without gradient) at the positions `at_N`.

        The distribution is softmax(logits / temperature): that of the sampler, as long as it cuts no tail. With
        context parallelism R is this rank's part of the row, and the call is a collective of its group.
        """
        hidden_RH = self.hf.base_model(
            input_ids=input_ids_R[None], position_ids=position_ids_R[None], use_cache=False, packing=packing
        ).last_hidden_state[0]
        return label_log_probs(
            hidden_RH.index_select(0, at_N),
            labels_N,
            self.hf.get_output_embeddings(),
            temperature=temperature,
            chunk_tokens=self.chunk_tokens,
        )


class ShardedPolicy:
    """The sharded model and what the rest of the learner may ask of it."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        path: str,
        device: torch.device,
        world_size: int,
        chunk_tokens: int,
        lora: LoraConfig,
        seed: int,
        offload: bool,
    ) -> None:
        """`seed` is that of the adapters. `offload`: masters, gradients and so the optimizer stay in host memory."""
        self.path = Path(path)
        self.device = device
        self.rank = dist.get_rank()
        self.kernel = choose(config.attention, device=device, dtype=DTYPES[config.compute_dtype])
        hf = _skeleton(self.path)
        if config.liger:
            apply_liger(hf, device=device)
        if config.gradient_checkpointing:
            hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.hf_config = hf.config
        self.tied = _tied_aliases(hf)
        self.lora = lora
        if lora.rank:
            attach(hf, _decoder_layers(hf), lora, dtype=DTYPES[config.compute_dtype])
        self.policy = Policy(hf, chunk_tokens=chunk_tokens)
        buffers = {name: buffer.clone() for name, buffer in self.policy.named_buffers()}
        mesh = init_device_mesh(device.type, (world_size,))
        precision = MixedPrecisionPolicy(param_dtype=DTYPES[config.compute_dtype], reduce_dtype=torch.float32)
        place = CPUOffloadPolicy(pin_memory=device.type != "cpu") if offload else OffloadPolicy()
        for layer in _decoder_layers(hf):
            fully_shard(layer, mesh=mesh, mp_policy=precision, offload_policy=place)
        fully_shard(self.policy, mesh=mesh, mp_policy=precision, offload_policy=place)
        self.policy.to_empty(device="cpu" if offload else device)
        for name, buffer in buffers.items():
            module, _, leaf = name.rpartition(".")
            setattr(self.policy.get_submodule(module), leaf, buffer.to(device))
        # kept, because between a forward and its backward the modules hold the gathered copies instead
        self._masters = {naming.to_hf(name): p for name, p in self.policy.named_parameters()}
        initialise(self._adapters(), seed=seed)
        self._load_checkpoint()
        self.policy.train()  # gradient checkpointing is off in eval mode; there is no dropout to tell the two apart

    def parameters(self) -> dict[str, nn.Parameter]:
        """The model's own sharded parameters by Hugging Face name, tied ones once, in wire order.

        fp32 masters; with LoRA frozen and in the compute dtype.
        """
        return {name: p for name, p in self._masters.items() if not name.endswith((A, B))}

    def trained(self) -> dict[str, nn.Parameter]:
        """What the optimizer steps and a checkpoint holds, sharded, fp32: the parameters, or with LoRA the adapters."""
        return self._adapters() if self.lora.rank else self.parameters()

    def _adapters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self._masters.items() if name.endswith((A, B))}

    def reshard(self) -> None:
        """Forget full weights of a forward that had no backward, so that the next one reads the masters."""
        for module in self.policy.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def metadata(self, dtype: str) -> list[TensorMeta]:
        return [TensorMeta(name, dtype, tuple(p.shape)) for name, p in self.parameters().items()]

    def move(self, device: torch.device) -> None:
        """Parameters and buffers to `device`, sharded as they are. On another one than the learner's they only rest."""
        self.policy.to(device)
        self._masters = {naming.to_hf(name): p for name, p in self.policy.named_parameters()}

    def named_full_tensors(self, dtype: str, *, everywhere: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor in wire order, cast then gathered; a collective, so every rank must iterate to the end.

        Adapters are merged in. Rank 0, or every rank (`everywhere`), gets the tensor on the learner's device, the
        others an empty one.
        """
        for name, parameter in self.parameters().items():
            tensor = _on(self.device, parameter.detach())
            stem = name.removesuffix(".weight")
            if stem + A in self._masters:
                a, b = (_on(self.device, self._masters[stem + end].detach()) for end in (A, B))
                tensor = merged(tensor, a, b, scale=self.lora.scale)
            full = _full(tensor.to(DTYPES[dtype]))
            yield name, full if everywhere or self.rank == 0 else full.new_empty(0)

    def _load_checkpoint(self) -> None:
        parameters = self.parameters()
        files = tensor_files(self.path)
        missing, unexpected = naming.missing_and_unexpected(parameters, files, tied=self.tied)
        if missing:
            raise ConfigError(
                f"model.path={str(self.path)!r}: {len(missing)} tensors are in none of its safetensors files "
                f"({', '.join(missing[:3])}...), while {len(unexpected)} there are not asked for "
                f"({', '.join(unexpected[:3]) or 'none'}): is this a complete causal LM in the Hugging Face layout?"
            )
        by_file: dict[Path, list[str]] = {}
        for name in parameters:
            by_file.setdefault(files[name], []).append(name)
        for file, names in by_file.items():
            with safe_open(file, framework="pt", device="cpu") as tensors:
                for name in names:
                    _copy_shard(parameters[name], tensors.get_slice(name), name=name, file=file)


# pieces -------------------------------------------------------------------------------------------------------------


def _skeleton(path: Path) -> PreTrainedModel:
    """The model with parameters on meta and real buffers, no dropout."""
    config = AutoConfig.from_pretrained(path)
    _check_architecture(config, path)
    for key in ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if getattr(config, key, 0):
            setattr(config, key, 0.0)  # pi_old and pi must be the same function
    with _parameters_on_meta():
        return AutoModelForCausalLM.from_config(config, attn_implementation=PACKED, dtype=torch.float32)


def _check_architecture(config: PreTrainedConfig, path: Path) -> None:
    """Raises `ConfigError` for what the model's own forward does to attention or logits and ours would leave out.

    Ours takes the head's product as logits and calls attention with segments, causal, with or without a window.
    """
    text = config.get_text_config()
    for key, plain in _PLAIN.items():
        value = getattr(text, key, None)
        if value not in plain:
            raise _unlike(path, key, value)
    for kind in getattr(text, "layer_types", None) or ():
        if kind not in ("full_attention", "sliding_attention"):
            raise _unlike(path, "layer_types", kind)


def _unlike(path: Path, key: str, value: object) -> ConfigError:
    return ConfigError(
        f"model.path={str(path)!r}: its config.json has {key}={value}, which the learner does not compute: dense "
        "decoders like Qwen's and Llama's are supported"
    )


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, a parameter that a module registers goes to the meta device at once; buffers stay real."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]  # and the old one back below
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]  # what it was


def _decoder_layers(hf: PreTrainedModel) -> list[nn.Module]:
    """The blocks that are sharded one by one: modules whose class the model calls unsplittable."""
    names = set(hf._no_split_modules or ())
    layers = [m for m in hf.modules() if type(m).__name__ in names]
    if not layers:
        raise ConfigError(f"{type(hf).__name__} does not say which of its modules are decoder layers")
    return layers


def _tied_aliases(hf: PreTrainedModel) -> dict[str, str]:
    """Names that share a parameter with an earlier name: {"lm_head.weight": "model.embed_tokens.weight"}."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, parameter in hf.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(parameter), name)
        if owner != name:
            aliases[name] = owner
    return aliases


@torch.no_grad()
def _copy_shard(parameter: nn.Parameter, tensor: Any, *, name: str, file: Path) -> None:
    """Read this rank's rows of a safetensors slice into its shard."""
    shape = tuple(tensor.get_shape())
    if shape != tuple(parameter.shape):
        raise ConfigError(f"{file}: {name} has shape {shape}, the config asks for {tuple(parameter.shape)}")
    copy_rows(parameter, tensor)


def _on(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """Offloaded shards are gathered on the device: NCCL is faster than gloo, and the engines' group may be NCCL too."""
    if tensor.device.type == device.type or not isinstance(tensor, DTensor):
        return tensor.to(device)
    return DTensor.from_local(
        tensor.to_local().to(device),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def _full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
