"""One learner rank: log-probs, gradients, optimizer steps, checkpoints. A plain class; `group.py` makes actors of it.

Every method is a collective: all ranks call it, in the same order, each with its own micro-batch. `Learner(recipe,
model_path=...)` alone is a gang of one, on CPU or CUDA, and what the tests build.

Stage `rl` takes the policy loss of `aster.algo.losses`, stage `sft` the negative log-likelihood; both read a
`MicroBatch`.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from actors import persist
from actors.adamw import adamw, clipped_step, set_learning_rate
from actors.attention import Packing
from actors.context_parallel import ContextParallel, slice_row
from actors.fsdp import ShardedPolicy, join_group, open_store
from actors.lora import without_adapters
from actors.saver import Saver
from actors.token_losses import SUMS, token_losses
from aster.algo.losses import aggregate, token_weights
from aster.config import Recipe
from aster.errors import AsterError, ConfigError
from aster.types import MicroBatch, OptimStats, StepStats, TensorMeta, TokenScores

if TYPE_CHECKING:
    from actors.weight_sync import WeightSender


class Learner:
    """One rank of the gang. Not thread-safe; the order of calls is the order of collectives."""

    backends: tuple[str, ...] = ("fsdp2",)  # of `learner.backend`; `zero.py` has the others

    def __init__(
        self,
        recipe: Recipe,
        *,
        model_path: str,
        total_steps: int,
        rank: int = 0,
        world_size: int = 1,
        master: tuple[str, int] = ("127.0.0.1", 0),
        store: dist.Store | None = None,
    ) -> None:
        """Join the group at `master` and load this rank's slice of `model_path`.

        `total_steps` optimizer steps shape the learning-rate schedule. `store` is the rendezvous that rank 0 already
        opened, so that its port was known before the others came. Raises `ConfigError` for a model directory that
        cannot be used, and torch's own error after `learner.step_timeout_s` when a peer never comes.
        """
        if recipe.learner.backend not in self.backends:
            raise ConfigError(
                f"learner.backend={recipe.learner.backend} is not for {type(self).__name__}: it takes "
                f"{' or '.join(self.backends)}"
            )
        self.recipe = recipe
        self.rank = rank
        self.world_size = world_size
        self.total_steps = total_steps
        self.device = _device(recipe)
        timeout_s = recipe.learner.step_timeout_s
        if store is None:
            store = open_store(*master, rank=rank, world_size=world_size, timeout_s=timeout_s)
        self._owns_group = join_group(store, rank=rank, world_size=world_size, device=self.device, timeout_s=timeout_s)
        try:
            self._build(model_path)
        except BaseException:  # nobody can close what was never made
            self._leave_group()
            raise

    def _build(self, model_path: str) -> None:
        recipe, timeout_s = self.recipe, self.recipe.learner.step_timeout_s
        torch.manual_seed(recipe.run.seed + self.rank)
        size = recipe.learner.context_parallel
        self.context = ContextParallel(size=size, timeout_s=timeout_s) if size > 1 else None
        self.model = self._load(model_path)
        if self.context is not None:
            self.context.check_heads(self.model.hf_config.num_attention_heads)
        self.reference = self._reference() if self._needs_reference() else None
        self.optimizer = self._adamw()
        self.steps = 0  # optimizer steps tried: what the schedule counts
        self.applied = 0  # those that changed the weights: what Adam's bias correction counts
        self.skipped_in_a_row = 0
        self._saver = Saver(timeout_s=timeout_s)
        self._sender: WeightSender | None = None

    # the algorithm ---------------------------------------------------------------------------------------------------

    def log_probs(self, microbatch: MicroBatch, *, reference: bool = False) -> TokenScores:
        """log pi(label) and entropy at every position. No gradient. `reference`: of the KL penalty's frozen model."""
        if reference and (self.recipe.stage != "rl" or self.recipe.algo.kl_coef == 0):
            raise ConfigError(f"algo.kl_coef={self.recipe.algo.kl_coef:g} loads no reference model: set it above 0")
        model = self.reference if reference and self.reference is not None else self.model
        plain = without_adapters(model.policy) if reference else contextlib.nullcontext()
        with torch.no_grad(), plain:
            scores = self._forward(microbatch, model)
        model.reshard()
        return TokenScores(*(np.where(microbatch.loss_mask, score.cpu().numpy(), np.float32(0)) for score in scores))

    def forward_backward(self, microbatch: MicroBatch, *, num_loss_tokens: int, num_groups: int) -> StepStats:
        """Add this row's share of the mini-batch gradient. Returns the row's sums; the mini-batch's are their total.

        Denominators are the mini-batch's over all ranks, so rows, ranks and their order do not change the loss. The
        gradient is scaled by the world size because FSDP takes the mean over ranks. Ranks of one context-parallel
        group have the same row and return the same sums.
        """
        began = time.monotonic()
        mask = microbatch.loss_mask
        weights = self._tensor(
            token_weights(
                microbatch,
                aggregation="token" if self.recipe.stage == "sft" else self.recipe.algo.aggregation,
                num_loss_tokens=num_loss_tokens,
                num_groups=num_groups,
                constant=self.recipe.algo.aggregation_constant or self.recipe.budget.max_response_tokens,
            )[mask].astype(np.float32)
        )
        logprobs, entropy = self._forward(microbatch, self.model)
        if mask.any():
            on = self._tensor(np.flatnonzero(mask))
            logprobs, entropy = logprobs.index_select(0, on), entropy.index_select(0, on)
            losses, extra = token_losses(self.recipe, logprobs, microbatch)
            loss = aggregate(losses, weights)
            counted = torch.stack([loss.detach(), entropy.sum(), *extra])
        else:
            loss = logprobs.sum() * 0.0  # nothing to learn here, but the peers wait for the gradient's collectives
            counted = torch.zeros(2 + SUMS)
        self._backward(loss * self.world_size)
        sums = counted.double().tolist()  # waits for the device, so only now that the backward pass is queued
        return StepStats(
            loss=sums[0],
            tokens=int(mask.sum()),
            padded_tokens=len(mask) + -len(mask) % self.recipe.learner.context_parallel,
            entropy_sum=sums[1],
            clipped_sum=sums[2],
            clipped_lower_sum=sums[3],
            kl_sum=sums[4],
            tis_sum=sums[5],
            tis_capped_sum=sums[6],
            reference_kl_sum=sums[7],
            seconds=time.monotonic() - began,
        )

    def optim_step(self) -> OptimStats:
        """Clip by global norm, AdamW, zero the gradients. A norm that is not finite skips the update and is counted.

        Raises `AsterError` after `optim.max_skipped_in_a_row` such steps: the run has diverged.
        """
        began = time.monotonic()
        lr = set_learning_rate(self.optimizer, self.recipe.optim, step=self.steps, total_steps=self.total_steps)
        norm = self._update()
        skipped = not np.isfinite(norm)
        if skipped:
            self.skipped_in_a_row += 1
        else:
            self.applied += 1
            self.skipped_in_a_row = 0
        self.steps += 1
        optim = self.recipe.optim
        if self.skipped_in_a_row >= optim.max_skipped_in_a_row:
            raise AsterError(
                f"the gradient norm was {norm} for {self.skipped_in_a_row} optimizer steps in a row (last: step "
                f"{self.steps}): lower optim.lr={optim.lr:g}, or look for extreme advantages or log-probs in the data"
            )
        return OptimStats(grad_norm=norm, lr=lr, skipped=skipped, seconds=time.monotonic() - began)

    # checkpoints -----------------------------------------------------------------------------------------------------

    def save(self, path: str) -> None:
        """Weights, AdamW moments, step counts and RNG of every rank. `path` appears only when all of it is on disk.

        Returns when the copy is taken; the next save, load or export waits for the files, and so does `saved`.
        """
        self._saver.start(path, tensors=self._tensors(), counters=self._counters())

    def saved(self, *, wait: bool = True) -> bool:
        """Wait for the save under way, `AsterError` with its path if it failed; or only say whether it is done."""
        if wait:
            self._saver.wait()
        return self._saver.done()

    def load(self, path: str) -> int:
        """Continue from `save`, at any world size; returns `steps`. Raises `DataError` if it cannot be."""
        self._saver.settle()
        self.model.reshard()  # a forward without backward may have left gathered copies of the old weights
        persist.check_adapters(path, self._lora())
        persist.check_none_left(path, self.model.trained())
        counters = persist.load(path, tensors=self._tensors(), rank=self.rank)
        self.steps, self.applied = counters["steps"], counters["applied"]
        self.skipped_in_a_row = counters["skipped_in_a_row"]
        for state in self.optimizer.state.values():
            state["step"].fill_(self.applied)
        self.optimizer.zero_grad(set_to_none=True)
        return self.steps

    def save_hf(self, path: str, *, dtype: str | None = None) -> None:
        """A Hugging Face directory: safetensors in `dtype` (None = the compute dtype), config, tokenizer, template."""
        self._saver.settle()
        dtype = dtype or self.recipe.model.compute_dtype
        tensors = ((name, tensor.cpu()) for name, tensor in self.model.named_full_tensors(dtype))
        if self.rank == 0:
            persist.write_hf(path, tensors, metadata=self.model.metadata(dtype), source=self.model.path)
        else:
            for _ in tensors:  # the gathering is a collective
                pass
        dist.barrier()

    # weights for the engines -----------------------------------------------------------------------------------------

    def weight_metadata(self) -> list[TensorMeta]:
        """Every tensor in wire order, Hugging Face names, tied ones once, in the engines' dtype."""
        return self.model.metadata(self.recipe.rollout.dtype)

    def weight_address(self) -> tuple[str, int]:
        return self._weight_sender().address()

    def weight_open(self, **group: Any) -> None:
        self._weight_sender().open(**group)

    def weight_send(self, *, bucket_bytes: int, hold: bool = False) -> list[str]:
        return self._weight_sender().send(bucket_bytes=bucket_bytes, hold=hold)

    def weight_keep(self) -> None:
        self._weight_sender().keep()

    def weight_resend(self, *, bucket_bytes: int) -> list[str]:
        return self._weight_sender().resend(bucket_bytes=bucket_bytes)

    def weight_close(self) -> None:
        if self._sender is not None:
            self._sender.close()

    # a device that engines share -------------------------------------------------------------------------------------

    def rest(self, *, optimizer_only: bool = False) -> None:
        """Move the optimizer's state, and with it the parameters, to host memory; give the device's memory back.

        A save under way writes a copy, so it is not waited for. `learner.offload_optimizer` keeps both there anyway:
        then there is only memory to give back.
        """
        if not self.recipe.learner.offload_optimizer:
            self._move_optimizer(torch.device("cpu"))
            if not optimizer_only:
                self.model.move(torch.device("cpu"))
                if self.reference is not None:
                    self.reference.move(torch.device("cpu"))
        self.model.reshard()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def rise(self) -> None:
        """What `rest` moved, back onto the device."""
        if not self.recipe.learner.offload_optimizer:
            self.model.move(self.device)
            if self.reference is not None:
                self.reference.move(self.device)
            self._move_optimizer(self.device)

    def _move_optimizer(self, device: torch.device) -> None:
        for state in self.optimizer.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                if name in state:
                    state[name] = state[name].to(device)

    def close(self) -> None:
        """Leave the process group if this learner made it. The object is of no use afterwards."""
        try:
            self._saver.close()
        finally:
            self.weight_close()
            self._leave_group()

    def _leave_group(self) -> None:
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()
            self._owns_group = False

    # pieces ----------------------------------------------------------------------------------------------------------

    def _forward(self, microbatch: MicroBatch, model: ShardedPolicy) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies of the labels, [R]; what stands where the mask is off means nothing."""
        context = self.context
        part = slice_row(microbatch, rank=context.rank if context else 0, size=context.size if context else 1)
        at = np.flatnonzero(part.loss_mask)
        if len(at) == 0:
            at = np.zeros(1, np.int64)  # every parameter must get a gradient, else FSDP's reductions differ in size
        at_N = self._tensor(at)
        scores = model.policy(
            self._tensor(part.input_ids),
            self._tensor(part.position_ids),
            at_N,
            self._tensor(part.labels[at]),
            packing=Packing(
                lengths=np.diff(part.boundaries).tolist(),
                boundaries=self._tensor(part.boundaries),
                kernel=model.kernel,
                context=context,
            ),
            temperature=1.0 if self.recipe.stage == "sft" else self.recipe.sampling.temperature,
        )
        rows = [score.new_zeros(len(part.input_ids)).index_copy(0, at_N, score) for score in scores]
        if context is not None:
            rows = [context.gather(row) for row in rows]
        logprobs, entropy = (row[: len(microbatch.labels)] for row in rows)
        return logprobs, entropy

    def _backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def _update(self) -> float:
        """Clip by global norm, step, forget the gradients. Returns the norm; one that is not finite changes nothing."""
        parameters = list(self.model.trained().values())
        return clipped_step(self.optimizer, parameters, max_grad_norm=self.recipe.optim.max_grad_norm)

    def _load(self, path: str) -> ShardedPolicy:
        return ShardedPolicy(
            self.recipe.model,
            path=path,
            device=self.device,
            world_size=self.world_size,
            chunk_tokens=self.recipe.learner.logprob_chunk_tokens,
            lora=self.recipe.lora,
            seed=self.recipe.run.seed,
            offload=self.recipe.learner.offload_optimizer,
        )

    def _needs_reference(self) -> bool:
        """With LoRA the model without its adapters is the reference."""
        return self.recipe.stage == "rl" and self.recipe.algo.kl_coef > 0 and self.recipe.lora.rank == 0

    def _reference(self) -> ShardedPolicy:
        """A frozen copy of the model that the run began with (a resumed run's too), sharded like the policy."""
        reference = self._load(str(self.model.path))
        for parameter in reference.parameters().values():
            parameter.requires_grad_(False)
        return reference

    def _adamw(self) -> torch.optim.AdamW:
        return adamw(list(self.model.trained().values()), self.recipe.optim)

    def _tensors(self) -> dict[str, torch.Tensor]:
        return persist.training_tensors(self.model.trained(), self.optimizer)

    def _counters(self) -> dict[str, Any]:
        counters: dict[str, Any] = {
            "steps": self.steps,
            "applied": self.applied,
            "skipped_in_a_row": self.skipped_in_a_row,
            "world_size": self.world_size,
        }
        return counters | ({"lora": self._lora()} if self.recipe.lora.rank else {})

    def _lora(self) -> dict[str, Any]:
        return persist.adapter_facts(self.recipe.lora, base=self.model.path, base_dtype=self.recipe.model.compute_dtype)

    def _weight_sender(self) -> WeightSender:
        if self._sender is None:
            from actors.weight_sync import WeightSender  # with the engines' side it pulls in Ray

            self._sender = WeightSender(
                tensors=lambda: self.model.named_full_tensors(
                    self.recipe.rollout.dtype, everywhere=self.recipe.cluster.placement == "colocated"
                ),
                metadata=self.weight_metadata(),
                rank=self.rank,
                device=self.device,
            )
        return self._sender

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.tensor(array, device=self.device)  # a copy: arrays out of the object store are read-only


def _device(recipe: Recipe) -> torch.device:
    kind = recipe.cluster.device
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError("cluster.device=cuda but torch sees no CUDA device here: use auto or cpu")
    if kind == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", 0)  # Ray shows each actor its own device only
    torch.cuda.set_device(device)
    return device
