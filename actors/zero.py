"""The learner on DeepSpeed ZeRO-2 or ZeRO-3: for SFT, an alternative to FSDP2 with the same calls, losses and files.

`ZeroLearner` is a `Learner` whose model is held by a DeepSpeed engine; rows, losses, schedule and counters are the
parent's. Checkpoints are the parent's too, by name and in whole tensors, so a run may go on with the other backend, at
another world size. DeepSpeed is imported when a learner is made and nowhere else.

Traps that are handled here:

* the shared-memory operation that DeepSpeed compiles on a CPU leaves a lock when its build is killed, and every later
  start waits for it without a word: it is switched off;
* `module.bfloat16()` also rounds the rotary tables, which FSDP2 keeps in fp32: they are put back;
* masters are made from parameters that were already rounded to the compute dtype: they are filled from the files;
* the driver does not say which row of a mini-batch is the last one: the engine runs with unmanaged accumulation, where
  `step` is the boundary;
* under ZeRO-3 each call of a module is a collective, but ranks cut rows of unequal length into unequal numbers of
  chunks for the head: it is gathered with the root instead;
* ZeRO-3 keeps small parameters whole beside their shards, and a load would have to reach both: none is kept whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn

from actors import persist
from actors.adamw import MOMENTS
from actors.attention import choose
from actors.fsdp import DTYPES, Policy, _skeleton, _tied_aliases
from actors.learner import Learner
from actors.liger import apply_liger
from actors.model_files import tensor_files
from aster.algo import naming
from aster.config import Recipe
from aster.errors import AsterError, ConfigError
from aster.types import TensorMeta

_STAGES = {"deepspeed_zero2": 2, "deepspeed_zero3": 3}


class ZeroLearner(Learner):
    """One rank. One per process and life: DeepSpeed keeps its process groups in globals."""

    backends = tuple(_STAGES)
    model: ZeroPolicy  # type: ignore[assignment]  # answers to what the parent asks of a ShardedPolicy

    def _load(self, path: str) -> ZeroPolicy:  # type: ignore[override]  # for the same reason
        return ZeroPolicy(self.recipe, path=path, device=self.device, rank=self.rank, world_size=self.world_size)

    def _adamw(self) -> torch.optim.AdamW:
        return self.model.adamw

    def _backward(self, loss: torch.Tensor) -> None:
        self.model.backward(loss)

    def _update(self) -> float:
        return self.model.step()

    def save(self, path: str) -> None:
        """As the parent's; each tensor is gathered and kept by one of the ranks, in turn, until it is written."""
        self._saver.start(path, tensors=self.model.whole_tensors(), counters=self._counters(), copied=True)

    def load(self, path: str) -> int:
        self._saver.settle()
        counters = persist.read_counters(path)
        persist.check_none_left(path, self.model.shapes)
        for name, shape in self.model.shapes.items():  # one parameter at a time: whole tensors are large
            keys = (f"model.{name}", *(f"optim.{name}.{moment}" for moment in MOMENTS))
            tensors = {key: torch.empty(shape) for key in keys}
            persist.load(path, tensors=tensors, rank=self.rank)
            self.model.fill(name, *tensors.values())
        self.steps, self.applied = counters["steps"], counters["applied"]
        self.skipped_in_a_row = counters["skipped_in_a_row"]
        self.model.set_step(self.applied)
        return self.steps

    def close(self) -> None:
        try:
            super().close()
        finally:
            self.model.engine.destroy()


class ZeroPolicy:
    """The model inside a DeepSpeed engine, and its AdamW, by Hugging Face names."""

    def __init__(self, recipe: Recipe, *, path: str, device: torch.device, rank: int, world_size: int) -> None:
        self.path = Path(path)
        self.rank = rank
        self.world_size = world_size
        self._stage = _STAGES[recipe.learner.backend]
        self._backwards = 0  # since the last step
        dtype = DTYPES[recipe.model.compute_dtype]
        self.kernel = choose(recipe.model.attention, device=device, dtype=dtype)
        self._deepspeed = _import_deepspeed(device, rank=rank, world_size=world_size)
        hf = _skeleton(self.path)
        if recipe.model.gradient_checkpointing:
            hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if recipe.model.liger:
            apply_liger(hf, device=device)
        self.hf_config = hf.config
        tied = _tied_aliases(hf)
        module = Policy(hf, chunk_tokens=recipe.learner.logprob_chunk_tokens)
        config = _engine_config(recipe, stage=self._stage, device=device)
        self.shapes = {naming.to_hf(name): tuple(p.shape) for name, p in module.named_parameters()}
        buffers = {name: buffer.to(device) for name, buffer in module.named_buffers()}
        _materialise(
            module, device=device, dtype=dtype, partition=self._partitioner(config) if self._stage == 3 else None
        )
        self._parameters = {naming.to_hf(name): p for name, p in module.named_parameters()}
        optim = recipe.optim
        self.adamw = torch.optim.AdamW(
            list(self._parameters.values()),
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,
        )
        self.engine, *_ = self._deepspeed.initialize(
            model=module, optimizer=self.adamw, config=config, dist_init_required=False
        )
        for name, buffer in buffers.items():
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, buffer.to(device))
        if self._stage == 3:
            self._hold_head(module)
        self._make_state()
        self._read_files(tied)
        self.engine.train()

    @property
    def policy(self) -> Any:
        """What a forward pass is called on."""
        return self.engine

    def metadata(self, dtype: str) -> list[TensorMeta]:
        return [TensorMeta(name, dtype, shape) for name, shape in self.shapes.items()]

    def reshard(self) -> None:
        """Nothing to forget: ZeRO-3 gives whole weights back after each module, ZeRO-2 always has them."""

    def named_full_tensors(self, dtype: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Every fp32 master in wire order, gathered, then cast; a collective. Rank 0 gets it, others an empty one."""
        for name in self.shapes:
            full = self._full(name).to(DTYPES[dtype])
            yield name, full if self.rank == 0 else full.new_empty(0)

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss)
        self._backwards += 1

    def step(self) -> float:
        """Clip by global norm and step; returns the norm, of which DeepSpeed calls everything not finite inf.

        A norm that is not finite leaves weights and moments as they are.
        """
        if not self._backwards:
            raise AsterError("optim_step() without forward_backward(): there is no gradient")
        self._backwards = 0
        self.engine.step()
        zero = self.engine.optimizer
        return float("inf") if zero.overflow else float(self.engine.get_global_grad_norm())

    def set_step(self, applied: int) -> None:
        """What Adam's bias correction counts."""
        for flat in self._flat_masters():
            self.adamw.state[flat]["step"].fill_(applied)

    def whole_tensors(self) -> dict[str, torch.Tensor]:
        """This rank's share of a checkpoint, on the CPU: every world_size-th parameter with its moments, whole."""
        out: dict[str, torch.Tensor] = {}
        for index, name in enumerate(self.shapes):
            for key, state in ((f"model.{name}", None), *((f"optim.{name}.{moment}", moment) for moment in MOMENTS)):
                full = self._full(name, state)
                if index % self.world_size == self.rank:
                    out[key] = full.to("cpu", copy=True)
        return out

    def fill(self, name: str, value: torch.Tensor, *moments: torch.Tensor) -> None:
        """Overwrite the fp32 master, the working copy and, if given, both moments of one parameter. fp32, whole."""
        api = self._deepspeed.utils
        parameter: Any = self._parameters[name]  # DeepSpeed hangs its own attributes on it
        if self._stage == 2:
            api.safe_set_full_fp32_param(parameter, value)
            parameter.data.copy_(value)
            for key, moment in zip(MOMENTS, moments, strict=False):
                api.safe_set_full_optimizer_state(parameter, moment, key)
            return
        parts = [self._own_part(parameter, tensor) for tensor in (value, *moments)]
        api.safe_set_local_fp32_param(parameter, parts[0])
        parameter.ds_tensor.data.copy_(parts[0])
        for key, part in zip(MOMENTS, parts[1:], strict=False):
            api.safe_set_local_optimizer_state(parameter, part, key)

    def _full(self, name: str, state: str | None = None) -> torch.Tensor:
        api, parameter = self._deepspeed.utils, self._parameters[name]
        full: torch.Tensor = (
            api.safe_get_full_fp32_param(parameter)
            if state is None
            else api.safe_get_full_optimizer_state(parameter, state)
        )
        return full.reshape(self.shapes[name])

    def _own_part(self, parameter: Any, whole: torch.Tensor) -> torch.Tensor:
        """ZeRO-3 cuts the flattened tensor into equal parts; the last one is filled up with zeros."""
        size = parameter.ds_tensor.numel()
        part = whole.new_zeros(size)
        own = whole.flatten()[size * self.rank : size * (self.rank + 1)]
        part[: len(own)] = own
        return part

    def _flat_masters(self) -> list[torch.Tensor]:
        zero = self.engine.optimizer
        masters: list[torch.Tensor] = (
            zero.single_partition_of_fp32_groups if self._stage == 2 else zero.fp32_partitioned_groups_flat
        )
        return masters

    def _make_state(self) -> None:
        """Adam's state at once: memory is honest from the start, and saving or loading needs no step before it."""
        for flat in self._flat_masters():
            self.adamw.state[flat] = {
                "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                "exp_avg": torch.zeros_like(flat, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(flat, requires_grad=False),
            }
        if self._stage == 2:
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()  # else done at the first step

    def _read_files(self, tied: Mapping[str, str]) -> None:
        files = tensor_files(self.path)
        missing, _ = naming.missing_and_unexpected(self.shapes, files, tied=tied)
        if missing:
            raise ConfigError(
                f"model.path={str(self.path)!r}: {len(missing)} tensors are in none of its safetensors files "
                f"({', '.join(missing[:3])}...): is this a complete causal LM in the Hugging Face layout?"
            )
        for name, shape in self.shapes.items():
            with safe_open(files[name], framework="pt", device="cpu") as tensors:
                tensor = tensors.get_tensor(name)
            if tuple(tensor.shape) != shape:
                raise ConfigError(f"{files[name]}: {name} has shape {tuple(tensor.shape)}, the config asks for {shape}")
            self.fill(name, tensor.float())

    def _hold_head(self, module: Policy) -> None:
        """Gather the head with the root, once per pass: the log-probs read its weight and never call it."""
        head = module.hf.get_output_embeddings()
        assert head.bias is None, "no causal LM of transformers that we know has one"
        self._deepspeed.zero.register_external_parameter(module, head.weight)

    def _partitioner(self, config: dict[str, Any]) -> Any:
        return lambda module: self._deepspeed.zero.Init(module=module, config_dict_or_path=config)


def _import_deepspeed(device: torch.device, *, rank: int, world_size: int) -> Any:
    """DeepSpeed reads its place from the environment, even where the process group is already there."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0")  # an actor sees its own device only
    os.environ["DS_ACCELERATOR"] = device.type
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(f"learner.backend=deepspeed_* needs the package deepspeed ({error}): or use fsdp2") from error
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _engine_config(recipe: Recipe, *, stage: int, device: torch.device) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage, "stage3_param_persistence_threshold": 0}
    if recipe.learner.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": recipe.optim.max_grad_norm,
        "bf16": {"enabled": recipe.model.compute_dtype == "bfloat16"},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # theirs is compiled at run time; torch's fused AdamW has a CPU kernel
        "steps_per_print": 1 << 60,
    }


def _materialise(module: nn.Module, *, device: torch.device, dtype: torch.dtype, partition: Any) -> None:
    """Replace meta parameters by real ones, module by module, tied ones once; `partition` shards each module's own.

    So at most one module is whole on a rank of ZeRO-3. The values come later.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for child in module.modules():
        own = dict(child.named_parameters(recurse=False))
        for name, parameter in own.items():
            if parameter not in made:
                made[parameter] = nn.Parameter(torch.zeros(parameter.shape, dtype=dtype, device=device))
            child._parameters[name] = made[parameter]
        if own and partition is not None:
            partition(child)
    dist.barrier()
