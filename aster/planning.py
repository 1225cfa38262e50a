"""What a GRPO step costs on GPUs, by arithmetic alone: memory per role, time, sandbox load, disk. All predictions.

Every figure is a formula of the model's shape, the hardware's data sheet and a workload; nothing is measured here. The
learner's memory is held against a real learner on CPU by `make bench-plan`: within 15 %, part by part.
Bytes and seconds; GB is 1e9 bytes. Legend: B trajectories of a step · L mean tokens of one · N GPUs of a role.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aster.errors import ConfigError, DataError

GB = 1e9
MFU = 0.40  # share of the peak FLOP/s that training reaches
BANDWIDTH_SHARE = 0.60  # of the HBM bandwidth that decoding reaches
MODEL_SHARE = 0.85  # of a trajectory's tokens are sampled, the others observed
ENGINE_OVERHEAD = 4.0 * GB  # CUDA context, activations and graphs of an engine
LEARNER_SHARE = 0.95  # of a device that the learner may fill
TRAIN_BYTES = 16  # per trained parameter: fp32 master, gradient and two Adam moments
CHECKPOINT_BYTES = 12  # per trained parameter: fp32 weights and two moments
LINK = 40.0 * GB  # per second and NIC, effective, pipelined through all receivers
SESSION_BYTES = 62e6  # resident memory of an interpreter with numpy and sympy that shares nothing
PEAK_OVER_MEAN = 3.0  # sandbox calls come in bursts
TOKEN_BYTES = 9  # on the driver: int32 id, fp32 log-prob, mask
JSONL_BYTES = 35e3  # per trajectory


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a dense decoder in Hugging Face's names."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool

    @property
    def parameters(self) -> int:
        """Embedding (twice when the head is its own), attention with q/k norms, gated feed-forward, norms."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads) + 2 * self.head_dim
        layer = attention + 3 * self.hidden * self.ffn + 2 * self.hidden
        return self.layers * layer + self.hidden + self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def weight_bytes(self) -> float:
        """bf16."""
        return 2.0 * self.parameters

    @property
    def kv_bytes(self) -> int:
        """Per token, bf16."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim

    def forward_flops(self, length: float) -> float:
        """Per token of a causal sequence of `length`: 2 per parameter, and attention at its mean reach."""
        return 2.0 * self.parameters + 2.0 * self.layers * self.heads * self.head_dim * length

    def adapter_parameters(self, rank: int, targets: Sequence[str]) -> int:
        """Of LoRA: rank * (in + out) for each target of each layer."""
        h, q, k = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        in_and_out = {
            "q_proj": h + q, "k_proj": h + k, "v_proj": h + k, "o_proj": q + h,
            "gate_proj": h + self.ffn, "up_proj": h + self.ffn, "down_proj": self.ffn + h,
        }  # fmt: skip
        unknown = sorted(set(targets) - in_and_out.keys())
        if unknown:
            raise ConfigError(f"lora.targets names {', '.join(unknown)}; the plan knows {', '.join(in_and_out)}")
        return rank * self.layers * sum(in_and_out[target] for target in targets)

    @classmethod
    def from_config(cls, path: Path) -> ModelShape:
        """Of a model directory's config.json. Raises `DataError` naming what it lacks."""
        try:
            config: dict[str, Any] = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is not a readable config.json: {error}") from None
        try:
            heads = int(config["num_attention_heads"])
            return cls(
                hidden=int(config["hidden_size"]),
                layers=int(config["num_hidden_layers"]),
                heads=heads,
                kv_heads=int(config.get("num_key_value_heads") or heads),
                head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
                ffn=int(config["intermediate_size"]),
                vocab=int(config["vocab_size"]),
                tied=bool(config.get("tie_word_embeddings", False)),
            )
        except KeyError as error:
            raise DataError(
                f"{path} has no {error}: the plan knows dense decoders in Qwen's and Llama's layout"
            ) from None


QWEN3_4B = ModelShape(hidden=2560, layers=36, heads=32, kv_heads=8, head_dim=128, ffn=9728, vocab=151_936, tied=True)
"""Qwen3-4B-Thinking-2507, the paper's model."""


@dataclass(frozen=True)
class Gpu:
    """From the data sheet: bytes, bytes/s, dense bf16 FLOP/s."""

    name: str
    memory: float
    bandwidth: float
    flops: float


GPUS = {
    "h100-80": Gpu("h100-80", 80 * GB, 3.35e12, 989e12),
    "h200": Gpu("h200", 141 * GB, 4.8e12, 989e12),
}


@dataclass(frozen=True)
class Workload:
    """One step. `engines` and `learners` are numbers of GPUs; colocated, they are the same ones."""

    trajectories: int
    mean_tokens: float
    max_tokens: int  # prompt and response budget
    calls: float  # per trajectory
    engines: int
    learners: int
    tensor_parallel: int
    micro_batch_tokens: int
    logprob_chunk_tokens: int
    memory_utilization: float
    max_num_seqs: int = 1024  # that an engine runs at once
    compute_bytes: int = 2  # of the learner's forward and backward: bf16, or 4 for fp32
    checkpointing: bool = True  # layers are recomputed in the backward pass
    fused: bool = False  # with liger's kernels for norms, rotary embedding and SwiGLU
    offload_optimizer: bool = False
    proximal_pass: bool = True
    reference_pass: bool = False  # for a KL penalty; of a second model, except with LoRA
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ()
    keep_checkpoints: int = 2


@dataclass(frozen=True)
class Plan:
    """Memory per GPU in bytes by what it is for; seconds of a step; load on the sandbox; bytes on disk."""

    learner_memory: dict[str, float]
    engine_memory: dict[str, float]
    sequences: float  # that one engine and its KV cache admit at mean length, at most those it is given
    full_sequences: float  # that they would admit at full length
    tokens: float
    decode_s: float
    tail_s: float  # a lone trajectory that uses its whole budget
    proximal_s: float
    reference_s: float
    update_s: float
    sync_s: float
    sessions: int
    calls_per_s: float
    peak_calls_per_s: float
    session_memory: float
    disk_checkpoints: float
    disk_per_step: float

    @property
    def generate_s(self) -> float:
        return max(self.decode_s, self.tail_s)

    @property
    def step_s(self) -> float:
        return self.generate_s + self.proximal_s + self.reference_s + self.update_s + self.sync_s


def make_plan(model: ModelShape, gpu: Gpu, work: Workload) -> Plan:
    """Raises `ConfigError` for engines that cannot be, and with the sum of what does not fit."""
    _require_engines(model, work)
    learner = learner_memory(model, work)
    _require("learner rank", learner, LEARNER_SHARE * gpu.memory, gpu, cure=(
        "lower learner.micro_batch_tokens, raise learner.world_size, or learner.offload_optimizer=true"
    ))  # fmt: skip
    room = work.memory_utilization * gpu.memory
    weights = model.weight_bytes / work.tensor_parallel
    kv = model.kv_bytes / min(work.tensor_parallel, model.kv_heads)  # GPUs beyond the KV heads hold copies of them
    one = {"weights": weights, "overhead": ENGINE_OVERHEAD, "KV of one full sequence": kv * work.max_tokens}
    _require("engine GPU", one, room, gpu, cure=(
        "raise rollout.tensor_parallel or rollout.gpu_memory_utilization, or lower budget.max_response_tokens"
    ))  # fmt: skip
    pool = room - weights - ENGINE_OVERHEAD
    engines = work.engines / work.tensor_parallel
    given = max(work.trajectories / engines, 1.0)
    context = work.mean_tokens / 2  # a running sequence is half done on average
    sequences = min(given, pool / (kv * context), work.max_num_seqs)
    rate = BANDWIDTH_SHARE * gpu.bandwidth
    step_s = (weights + sequences * kv * context) / rate
    decode_s = given / sequences * MODEL_SHARE * work.mean_tokens * step_s
    tail_s = work.max_tokens * (weights + kv * work.max_tokens / 2) / rate
    tokens = work.trajectories * work.mean_tokens
    forward_s = tokens * model.forward_flops(work.mean_tokens) / (MFU * gpu.flops * work.learners)
    frozen_s = tokens * 2.0 * model.parameters / (MFU * gpu.flops * work.learners) if work.lora_rank else 0.0
    calls_per_s = work.trajectories * work.calls / max(decode_s, tail_s)
    return Plan(
        learner_memory=learner,
        engine_memory={"weights": weights, "overhead": ENGINE_OVERHEAD, "KV cache": pool},
        sequences=sequences,
        full_sequences=min(pool / (kv * work.max_tokens), work.max_num_seqs),
        tokens=tokens,
        decode_s=decode_s,
        tail_s=tail_s,
        proximal_s=forward_s if work.proximal_pass else 0.0,
        reference_s=forward_s if work.reference_pass else 0.0,
        # forward, twice that backward without the gradients of frozen weights, recomputation of checkpointed layers
        update_s=(4 if work.checkpointing else 3) * forward_s - frozen_s,
        sync_s=model.weight_bytes / LINK,
        sessions=work.trajectories,
        calls_per_s=calls_per_s,
        peak_calls_per_s=PEAK_OVER_MEAN * calls_per_s,
        session_memory=work.trajectories * SESSION_BYTES,
        # one more while it is saved
        disk_checkpoints=(work.keep_checkpoints + 1) * CHECKPOINT_BYTES * _trained_parameters(model, work),
        disk_per_step=tokens * TOKEN_BYTES + work.trajectories * JSONL_BYTES,
    )


def learner_memory(model: ModelShape, work: Workload) -> dict[str, float]:
    """Of one rank at its fullest: a micro-batch's backward pass. The sum is the peak.

    What is there all the time, and the largest of three moments that do not meet: the backward pass of a layer, the
    log-probs of a chunk, the reduction of the embedding's gradient.
    """
    c, row = work.compute_bytes, work.micro_batch_tokens
    embedding = model.vocab * model.hidden
    layer = (model.parameters - embedding * (1 if model.tied else 2)) / model.layers
    share = 0.0 if work.offload_optimizer else 1 / work.learners
    sharded = {"sharded masters, gradients, Adam": share * TRAIN_BYTES * _trained_parameters(model, work)}
    if work.lora_rank:
        sharded["sharded frozen weights"] = share * c * model.parameters
    elif work.reference_pass:
        sharded["sharded reference model in fp32"] = share * 4 * model.parameters
    kept = row * layer_bytes(model, c, fused=work.fused)
    passing = 0.0 if work.fused else 2.0 * c * row * model.ffn  # gradients inside a layer
    if work.checkpointing:
        activations = {"checkpointed hidden states": float(c * row * model.hidden * model.layers)}
        backward = {"one layer recomputed": kept + passing}
    else:
        activations = {"activations of all layers": kept * model.layers}
        backward = {"gradients inside a layer": passing}
    logits = {"logits in chunks": 3 * 4.0 * min(work.logprob_chunk_tokens, row) * model.vocab}
    after = sum(activations.values())  # gone when the embedding's gradient is reduced
    trained_embedding = 0 if work.lora_rank else embedding
    reduced = {"gradient of the embedding in fp32": max(4.0 * trained_embedding - after, 0.0)}
    return {
        **sharded,
        "gathered weights": c * (2 * layer + embedding),
        "gradient of the embedding, whole": float(c * trained_embedding),
        **activations,
        **max(backward, logits, reduced, key=lambda part: sum(part.values())),
    }


def _trained_parameters(model: ModelShape, work: Workload) -> int:
    return model.adapter_parameters(work.lora_rank, work.lora_targets) if work.lora_rank else model.parameters


def layer_bytes(model: ModelShape, compute_bytes: int, *, fused: bool = False) -> float:
    """Per token, what the operations of one layer keep for their backward pass.

    Counted from the saved tensors of Hugging Face's Qwen3 (torch 2.13): norms and rotary embeddings work in fp32, so
    under bf16 they keep a second, wider copy. `fused`: the least that has to be kept.
    """
    h, f = model.hidden, model.ffn
    q, k = model.heads * model.head_dim, model.kv_heads * model.head_dim
    if fused:
        return float(compute_bytes * (2 * h + 2 * q + 2 * k + 3 * f))
    if compute_bytes == 2:
        return float(8 * f + 16 * h + 12 * q + 10 * k)
    return float(16 * f + 24 * h + 20 * q + 16 * k)


def _require_engines(model: ModelShape, work: Workload) -> None:
    """As vLLM shares out heads: each GPU the same number of attention heads, KV heads shared out or copied alike."""
    tp, heads, kv = work.tensor_parallel, model.heads, model.kv_heads
    usable = [n for n in range(1, heads + 1) if heads % n == 0 and (kv % n == 0 or n % kv == 0)]
    if tp not in usable:
        raise ConfigError(
            f"rollout.tensor_parallel={tp} cannot share out the model's {heads} attention and {kv} key-value heads: "
            f"use one of {', '.join(map(str, usable))}"
        )
    if work.engines % tp:
        raise ConfigError(
            f"{work.engines} GPUs cannot be split into engines of rollout.tensor_parallel={tp} GPUs: give --gpus a "
            f"multiple of {tp}, or a tensor_parallel that divides {work.engines}"
        )


def _require(role: str, parts: dict[str, float], room: float, gpu: Gpu, *, cure: str) -> None:
    total = sum(parts.values())
    if total > room:
        arithmetic = " + ".join(f"{value / GB:.1f} ({name})" for name, value in parts.items())
        raise ConfigError(
            f"a {role} does not fit {gpu.name}: {arithmetic} = {total / GB:.1f} GB, and there is room for "
            f"{room / GB:.1f} GB of {gpu.memory / GB:.0f}; {cure}"
        )
