"""The run's configuration: typed, strict, frozen; read by attribute, never by string.

A recipe is a YAML file whose keys are these fields. `base: other` starts from another recipe, `key.sub=value` on the
command line overrides. An unknown key, a wrong type or two values that cannot go together is a `ConfigError` that
names the values and the cure. Derived numbers are properties with their formula, not further options.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from aster.errors import ConfigError
from aster.types import Budget, Sampling


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class RunConfig(_Section):
    """Where the run lives and how long it lasts."""

    name: str = "aster"
    """Directory directly under `dir`."""
    dir: str = "runs"
    seed: int = 1
    steps: int | None = Field(default=None, ge=1)
    """Stop after this many rollout steps (RL) or optimizer steps (SFT); null = `data.epochs` decides."""
    save_every: int = Field(default=10, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    """How many of the newest checkpoints stay on disk."""
    val_every: int = Field(default=10, ge=0)
    """Validate every so many steps; 0 = never."""
    val_before_train: bool = True
    val_overlap: bool = True
    """Validate beside the next step, which has the same weights; its publication waits for the end. False, and in
    deterministic runs: in between."""
    resume: bool = True
    """Continue from the newest checkpoint of the run directory when there is one."""
    journal: bool = True
    """Engines write each finished turn to `journal/` in the run's directory (which all nodes must see), so that a
    killed run and a lost trajectory's next attempt go on from there."""
    deterministic: bool = False
    """One engine, one sequence at a time, FIFO: a repeated or resumed run is bit-equal, at the price of speed."""
    trace_every: int = Field(default=1, ge=0)
    """Write every so many steps to trace.json, for https://ui.perfetto.dev; 0 = never. The newest steps are kept, in
    128 MB at most."""
    tensorboard: bool = True
    wandb_project: str | None = None

    @property
    def path(self) -> Path:
        return Path(self.dir) / self.name


class ModelConfig(_Section):
    """The model directory (Hugging Face layout); its tokenizer and chat template are the only ones used."""

    path: str = ""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Forward and backward of the learner; masters and reductions are always fp32."""
    gradient_checkpointing: bool = True
    attention: Literal["auto", "sdpa", "flash", "varlen", "flex"] = "auto"
    """`auto`: for bfloat16 on CUDA flash-attn when importable, else `varlen` (torch's own); otherwise sdpa."""
    liger: bool = False
    """Fused kernels of the liger-kernel package for norms, rotary embedding and SwiGLU; CUDA only."""


class DataConfig(_Section):
    """Prompt or conversation files in the columns of the README's data table."""

    train_files: tuple[str, ...] = ()
    val_files: tuple[str, ...] = ()
    epochs: int = Field(default=1, ge=1)
    shuffle_seed: int = 1
    """Order of the prompts, in RL. SFT: `sft.seed`."""
    max_rows: int | None = Field(default=None, ge=1)
    """Use the first so many training rows only."""
    val_max_rows: int | None = Field(default=None, ge=1)


class BudgetConfig(_Section):
    """Tokens, calls and seconds of one trajectory. The response budget counts model and observation tokens."""

    max_prompt_tokens: int = Field(default=2048, ge=1)
    max_response_tokens: int = Field(default=16384, ge=1)
    max_tool_calls: int = Field(default=50, ge=0)
    """Exact: so many calls, then one final generation."""
    max_turn_tokens: int | None = Field(default=None, ge=1)
    trajectory_timeout_s: float = Field(default=7200.0, gt=0)

    @property
    def max_model_len(self) -> int:
        """max_prompt_tokens + max_response_tokens."""
        return self.max_prompt_tokens + self.max_response_tokens


class SamplingConfig(_Section):
    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = -1

    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.top_k)


class ToolConfig(_Section):
    """The Python tool as the model sees it."""

    enabled: bool = True
    """False: no session is ever opened and a call is answered with an error (the ablation)."""
    timeout_s: float = Field(default=30.0, gt=0)
    max_output_bytes: int = Field(default=32 << 10, ge=256, le=16 << 20)
    """Hard cap in the sandbox, head and tail kept with a notice."""
    max_response_chars: int | None = Field(default=None, ge=16)
    """Cut an observation to so many characters; null = parity with the reference (no cut)."""
    truncate_side: Literal["left", "middle", "right"] = "middle"
    max_response_tokens: int | None = Field(default=None, ge=8)
    """Cut an observation to so many tokens; null = an overflow ends the trajectory."""
    on_malformed: Literal["continue", "end"] = "continue"
    """end: a turn with a call that cannot be run (unreadable, unknown tool, wrong arguments) is the last one."""
    max_calls_per_turn: int = Field(default=1, ge=1)
    """Further calls of a turn are not run, are counted, and the model is told."""
    force_first_call: bool = False
    """Every first turn begins with the opening of a call, without a thought before it (the paper's ablation
    ZeroForceTool); the model samples the call itself. The opening is no model token: it is in the budget, not in the
    loss. Holds for training, validation and `aster eval`, wherever the loop has tools."""


class RolloutConfig(_Section):
    """Engines and how they sample."""

    engines: int = Field(default=1, ge=1)
    tensor_parallel: int = Field(default=1, ge=1)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    prompts_per_step: int = Field(default=128, ge=1)
    group_size: int = Field(default=8, ge=1)
    max_num_seqs: int = Field(default=1024, ge=1)
    max_num_batched_tokens: int | None = Field(default=None, ge=1)
    gpu_memory_utilization: float = Field(default=0.90, gt=0, lt=1)
    kv_cache_bytes: int | None = Field(default=None, ge=1 << 20)
    """Explicit KV cache per engine; needed on CPU (null = let vLLM profile a GPU)."""
    enforce_eager: bool = False
    max_staleness: int = Field(default=0, ge=0, le=16)
    """0 = synchronous. k: rollouts may be k versions older than the learner. At most 16."""
    weight_backend: Literal["auto", "gloo", "nccl", "vllm_nccl"] = "auto"
    """Ours over gloo or NCCL (`auto`: by device), or vLLM's stock NCCL engine."""
    weight_rollback: bool = True
    """Learner rank 0 holds the last published weights in host memory (the wire's bytes once, twice while publishing;
    over gloo always twice, and once when this is off), to give them back to the engines when a publication fails. Off:
    they stay shut then. Not with vllm_nccl."""
    publish_timeout_s: float = Field(default=300.0, gt=0)
    """One step of a publication (the group opens, the weights go over the wire, they are loaded, the canary), and one
    bucket on the wire: so long the learner waits for an engine that died under NCCL. More than a micro-batch takes."""
    tree_turns: tuple[int, ...] = ()
    """Before each of these turns (the first is 0) a training trajectory splits into `tree_factor`, tokens and session,
    so that `group_size` leaves grow from group_size / tree_factor^len(tree_turns) trunks; () = each sample by itself.
    A path that ends before it splits is all of its leaves."""
    tree_factor: int = Field(default=2, ge=2)
    start_timeout_s: float = Field(default=900.0, gt=0)
    generate_timeout_s: float | None = Field(default=None, gt=0)
    """One generation of one turn; past it the attempt counts as lost, and the engine is asked whether it lives. null =
    `trajectory_timeout_s`; less finds an engine that hangs earlier, and must hold the longest turn."""
    max_retries: int = Field(default=1, ge=0)
    """How often a trajectory that we lost is run again elsewhere."""
    reward_workers: int | None = Field(default=None, ge=1)
    """Processes that judge answers, some 200 a second each; null = an eighth of the driver's cores, at least 2: an
    answer on which a verifier hangs occupies one of them for 10 s."""
    max_infra_failed_rate: float = Field(default=0.5, gt=0, le=1)
    """Above this share of a step's trajectories lost by our own failures the run stops. A loss that is retried counts
    from the second of its trajectory on: an engine may die and take a whole step with it. The metric
    `infra_failed_rate` is another share: all lost attempts of all attempts, those that a retry made good too."""
    mismatch_alarm_k3: float = Field(default=1e-2, gt=0)
    """Nats per token of KL(engine || learner), `training/mismatch_k3`, above which an event says so. Over tokens of the
    weights that the learner has: those of older weights are in `training/staleness_k3`, and a step that has no others
    has no mismatch metrics and no alarm. With sampling.top_p < 1 the engine records the log-probs of the nucleus and
    the learner those of the whole vocabulary: a gap of log(mass of the nucleus) in both metrics, however exact the
    engine. It adds up to -log(top_p) - (1 - top_p): 0.0013 at 0.95, 0.0054 at 0.9, 0.023 at 0.8; top_k likewise."""


class AlgoConfig(_Section):
    """GRPO as in the paper (arXiv 2602.01204), whose values are the defaults."""

    clip_low: float = Field(default=0.2, gt=0)
    clip_high: float = Field(default=0.28, gt=0)
    dual_clip: float = Field(default=10.0, gt=1)
    objective: Literal["ppo", "gspo", "cispo"] = "ppo"
    """ppo = the clipped surrogate (`aster.algo.losses`), the paper's; gspo = one ratio per sequence (use `aggregation:
    seq-mean` and clips near 3e-4); cispo = capped ratio as a weight on log pi (`clip_high` is its cap - 1; it has no
    lower clip)."""
    tis_cap: float | None = Field(default=2.0, gt=0)
    """Upper bound of the importance weight exp(old - behaviour); null = no weight."""
    tis_floor: float = Field(default=0.0, ge=0)
    """Lower bound of the importance weight."""
    tis_outside: Literal["truncate", "mask"] = "truncate"
    """What a token beyond a bound gets: the bound, or no gradient (masked importance sampling)."""
    kl_coef: float = Field(default=0.0, ge=0)
    """Weight of the KL penalty to the reference model in the loss; 0 = no reference model is loaded."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    overlong: Literal["keep", "mask"] = "keep"
    """mask: trajectories that ran out of tokens count in their group's statistics and are not trained on."""
    overlong_buffer_tokens: int | None = Field(default=None, ge=1)
    """Soft penalty (DAPO): within so many tokens of the response budget the reward falls linearly to `-penalty`."""
    overlong_penalty: float = Field(default=1.0, gt=0)
    dynamic_sampling: bool = False
    """Replace groups without variance by further prompts (DAPO)."""
    dynamic_sampling_limit: int = Field(default=3, ge=2)
    """At most so many times `prompts_per_step` prompts are sampled for a step; then it goes on with what it has."""
    aggregation: Literal["token", "group", "seq-mean", "constant"] = "token"
    aggregation_constant: int | None = Field(default=None, ge=1)
    """Denominator per sequence for `constant` (Dr.GRPO); null = max_response_tokens."""
    scale_by_std: bool = True
    drop_zero_variance: bool = False
    """True: groups without a learning signal leave the denominator too. A step that has no others makes no update
    (`training/no_signal_steps`)."""
    reward: Literal["strict", "math_verify"] = "strict"
    """strict: 1 when the last \\boxed{} of the final turn equals the ground truth character by character, else 0.
    math_verify: when it means the same (`aster.agent.rewards`). Both verdicts are recorded, whichever trains."""
    mini_batch_prompts: int = Field(default=64, ge=1)
    """Prompts per optimizer step."""
    proximal_pass: bool = True
    """Recompute pi_old with the learner before the first update. False: pi_old = the behaviour log-probs."""


class OptimConfig(_Section):
    lr: float = Field(default=1e-6, gt=0)
    min_lr: float | None = Field(default=None, ge=0)
    """Floor of a decaying schedule; null = 0."""
    schedule: Literal["constant", "cosine_with_min_lr", "linear"] = "constant"
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1)
    warmup_steps: int | None = Field(default=None, ge=0)
    """Overrides warmup_ratio."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    max_skipped_in_a_row: int = Field(default=5, ge=1)
    """A non-finite gradient norm skips the step; so many in a row end the run."""


class LearnerConfig(_Section):
    backend: Literal["fsdp2", "deepspeed_zero2", "deepspeed_zero3"] = "fsdp2"
    """DeepSpeed is for SFT only."""
    world_size: int = Field(default=1, ge=1)
    context_parallel: int = Field(default=1, ge=1)
    """So many ranks share one row, each a part of its tokens (Ulysses); for rows too long for one device."""
    micro_batch_tokens: int = Field(default=73728, ge=1)
    """Most tokens of one packed row; a longer single sample gets a row of its own."""
    logprob_chunk_tokens: int = Field(default=512, ge=1)
    """Rows of logits alive at once; about three times so many x vocabulary x 4 bytes are needed."""
    cpu_threads: int = Field(default=1, ge=1)
    """Threads of a rank on CPU. More than one only where nothing else computes meanwhile (SFT): threads that spin for
    each other on busy cores cost more than they bring."""
    offload_optimizer: bool = False
    """Keep fp32 masters, gradients and optimizer state in host memory and step there: 16 bytes per parameter less on
    the device, a slower step."""
    step_timeout_s: float = Field(default=3600.0, gt=0)


class LoraConfig(_Section):
    """Train low-rank adapters of the decoder's linear layers instead of the model; merged wherever a model leaves."""

    rank: int = Field(default=0, ge=0)
    """0 = train the whole model."""
    alpha: float = Field(default=32.0, gt=0)
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Last part of the layers' names."""

    @property
    def scale(self) -> float:
        """alpha / rank: the factor of the adapter's output."""
        return self.alpha / self.rank if self.rank else 0.0


class SftConfig(_Section):
    batch_size: int = Field(default=128, ge=1)
    """Conversations per optimizer step over all ranks (with `batch_tokens` set: an upper bound)."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """Close a batch when it holds so many tokens; null = by conversations."""
    max_length: int = Field(default=32768, ge=1)
    """Longer conversations are dropped and counted, never cut."""
    shuffle: bool = True
    """False: conversations in file order, every epoch; for a curriculum."""
    train_on_newline: bool = False
    """True = parity with the reference, which also trains on the newline after <|im_end|>."""
    format: Literal["auto", "raw", "openai", "sharegpt"] = "auto"
    """How conversation files are written; auto: told apart file by file (`aster.data.formats` says what each is)."""
    val_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Keep about this share of the problems in `data.train_files` for validation; or name `data.val_files`."""
    seed: int = 42
    """Order of the conversations, and which problems `val_fraction` keeps apart."""


class EvalConfig(_Section):
    samples: int = Field(default=16, ge=1)
    preset: Literal["repro", "paper"] | None = None
    """repro: T 1.0, top_p 1.0. paper: T 0.6, top_p 0.95. null: the `sampling` section as written."""
    budget: BudgetConfig | None = None
    """null = the training budget."""


class CollapseConfig(_Section):
    """The collapse monitor's alarm, and what the run does when it is on."""

    max_drop: float = Field(default=0.5, gt=0, lt=1)
    """On while the moving average of calls per trajectory is below this share of its first value."""
    max_ratio: float = Field(default=0.3, gt=0, le=1)
    """On while more than this share of the trajectories make at most one call."""
    ema_decay: float = Field(default=0.9, ge=0, lt=1)
    on_alarm: Literal["log", "stop", "rollback"] = "log"
    """log: an event, a metric and a line on the terminal; training goes on unchanged. stop: the run ends, checkpoints
    stay. rollback: back to the newest checkpoint from before the alarm, and on with other prompts (`aster.guard`)."""
    max_rollbacks: int = Field(default=1, ge=1)
    """So many roll-backs of one process; the next alarm ends the run."""


class SandboxConfig(_Section):
    backend: Literal["auto", "docker", "bwrap", "process"] = "auto"
    """auto: docker where a daemon answers, else bwrap. process (no isolation) only when asked for."""
    image: str = "aster-sandbox:latest"
    replicas: int = Field(default=1, ge=1)
    """Sandbox nodes."""
    max_sessions: int = Field(default=512, ge=1)
    """Per node; creating one more answers 429."""
    sessions_per_cell: int = Field(default=8, ge=1, le=64)
    max_running: int | None = Field(default=None, ge=1)
    """Cells that run at once per node; null = twice the cores."""
    memory_bytes: int = Field(default=1 << 30, ge=64 << 20, le=64 << 30)
    runtime: Literal["runc", "runsc"] = "runc"
    """Docker's runtime for a cell. runsc is gVisor's, a kernel in user space between the model's code and ours; the
    node's Docker daemon must have it. Docker cells only; not run here."""
    http_port: int = Field(default=8000, ge=0, le=65535)
    num_cpus: float = Field(default=0.0, ge=0)
    url: str | None = None
    """Use a sandbox service that runs elsewhere, over HTTP, instead of deploying one."""


class ClusterConfig(_Section):
    address: str | None = None
    """Ray address; null = the running cluster if RAY_ADDRESS names one, else a local one."""
    placement: Literal["disaggregated", "colocated"] = "disaggregated"
    """disaggregated: learners and engines have GPUs of their own. colocated: engines live on the learners' GPUs and
    sleep while they work (engine i on ranks i*t to i*t+t-1, t = `rollout.tensor_parallel`); weights go over CUDA IPC.
    No engine is replaced and no publication rolled back then. Not yet run on a GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_cpus: int | None = Field(default=None, ge=1)
    """Logical CPUs of a local cluster; null = Ray decides."""
    metrics: bool = True
    """Tell Prometheus, through each node's Ray agent, how run, pool and engines are (`actors/metrics.py`)."""


_NOT_HASHED: Mapping[str, bool | set[str]] = {
    "description": True,
    "run": {
        "name", "dir", "steps", "save_every", "keep_checkpoints", "val_every", "val_before_train", "val_overlap",
        "resume", "journal", "trace_every", "tensorboard", "wandb_project",
    },
    "data": {"epochs"},
    "sandbox": {"replicas", "max_sessions", "max_running", "http_port", "num_cpus"},
    "cluster": {"address", "num_cpus", "metrics"},
}  # fmt: skip
"""Where a run lives, how long it lasts, who watches it and on how much of a machine: a resumed run may have others."""


class Recipe(_Section):
    """Everything one verb needs. `stage` says which verb: sft, rl or eval."""

    stage: Literal["sft", "rl", "eval"]
    description: str = ""
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    budget: BudgetConfig = BudgetConfig()
    sampling: SamplingConfig = SamplingConfig()
    tool: ToolConfig = ToolConfig()
    rollout: RolloutConfig = RolloutConfig()
    algo: AlgoConfig = AlgoConfig()
    optim: OptimConfig = OptimConfig()
    learner: LearnerConfig = LearnerConfig()
    lora: LoraConfig = LoraConfig()
    sft: SftConfig = SftConfig()
    eval: EvalConfig = EvalConfig()
    collapse: CollapseConfig = CollapseConfig()
    sandbox: SandboxConfig = SandboxConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _cross_field(self) -> Recipe:
        problems = list(self._problems())
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        if self.run.name in {"", ".", ".."} or "/" in self.run.name:
            yield (
                f"run.name={self.run.name!r} must be the name of one directory, without a slash: where it lies is "
                f"run.dir={self.run.dir}"
            )
        if self.stage == "rl":
            p, mini = self.rollout.prompts_per_step, self.algo.mini_batch_prompts
            if p % mini:
                yield (
                    f"rollout.prompts_per_step={p} is not a multiple of algo.mini_batch_prompts={mini} "
                    f"({p} = {p // mini} x {mini} + {p % mini}): set mini_batch_prompts to a divisor of {p}"
                )
            if self.learner.backend != "fsdp2":
                yield f"learner.backend={self.learner.backend} trains SFT only: use fsdp2 for RL"
            if self.sampling.temperature == 0:
                yield "sampling.temperature=0 gives groups of equal samples and no advantage: use a value above 0"
            if self.algo.dual_clip <= 1 + self.algo.clip_high:
                yield (
                    f"algo.dual_clip={self.algo.dual_clip} must exceed 1 + clip_high = {1 + self.algo.clip_high}, "
                    "else it binds before the clip does"
                )
        turns, leaves = self.rollout.tree_turns, self.rollout.tree_factor ** len(self.rollout.tree_turns)
        if list(turns) != sorted(set(turns)) or any(turn < 1 for turn in turns):
            yield f"rollout.tree_turns={list(turns)} must be ascending turn numbers from 1 on (turn 0 is the first)"
        if self.rollout.group_size % leaves:
            yield (
                f"rollout.group_size={self.rollout.group_size} is not a multiple of the leaves of one tree, "
                f"tree_factor^len(tree_turns) = {self.rollout.tree_factor}^{len(turns)} = {leaves}: make it one"
            )
        if self.sft.val_fraction and self.data.val_files:
            yield (
                f"sft.val_fraction={self.sft.val_fraction} and data.val_files={list(self.data.val_files)} both name a "
                "validation set: give one of them"
            )
        if self.learner.world_size % self.learner.context_parallel:
            yield (
                f"learner.world_size={self.learner.world_size} is not a multiple of learner.context_parallel="
                f"{self.learner.context_parallel}: use a divisor of {self.learner.world_size}"
            )
        if self.lora.rank and self.learner.backend != "fsdp2":
            yield f"lora.rank={self.lora.rank} needs learner.backend=fsdp2, got {self.learner.backend}"
        if self.learner.context_parallel > 1 and self.learner.backend != "fsdp2":
            yield (
                f"learner.context_parallel={self.learner.context_parallel} needs learner.backend=fsdp2, "
                f"got {self.learner.backend}"
            )
        if self.rollout.max_num_batched_tokens is not None and not self.rollout.enforce_eager:
            need = self.budget.max_model_len
            if self.rollout.max_num_batched_tokens < need:
                yield (
                    f"rollout.max_num_batched_tokens={self.rollout.max_num_batched_tokens} is less than "
                    f"max_model_len = {self.budget.max_prompt_tokens} + {self.budget.max_response_tokens} = {need}: "
                    f"raise it to {need}"
                )
        if self.run.deterministic and (self.rollout.engines != 1 or self.rollout.max_num_seqs != 1):
            yield (
                f"run.deterministic needs rollout.engines=1 and rollout.max_num_seqs=1, got "
                f"{self.rollout.engines} and {self.rollout.max_num_seqs}: a batch changes log-probs in the last bits"
            )
        if self.run.deterministic and self.rollout.max_staleness:
            yield (
                f"run.deterministic needs rollout.max_staleness=0, got {self.rollout.max_staleness}: which tokens the "
                "new weights sample would depend on the time"
            )
        if self.stage == "rl" and self.cluster.placement == "colocated":
            engines, learners = self.rollout.engines * self.rollout.tensor_parallel, self.learner.world_size
            if engines > learners:
                yield (
                    f"cluster.placement=colocated puts rollout.engines={self.rollout.engines} x "
                    f"rollout.tensor_parallel={self.rollout.tensor_parallel} = {engines} GPUs onto "
                    f"learner.world_size={learners}: lower them, or set learner.world_size={engines}"
                )
            if self.rollout.max_staleness:
                yield (
                    f"cluster.placement=colocated needs rollout.max_staleness=0, got {self.rollout.max_staleness}: "
                    "engines sleep while the learners work, so nothing would be gained by older samples"
                )
            if self.rollout.weight_backend != "auto":
                yield (
                    f"cluster.placement=colocated hands weights over CUDA IPC; rollout.weight_backend="
                    f"{self.rollout.weight_backend} is for disaggregated: use auto"
                )
        if self.optim.min_lr is not None and self.optim.min_lr > self.optim.lr:
            yield f"optim.min_lr={self.optim.min_lr} is above optim.lr={self.optim.lr}: swap them"

    # derived numbers -------------------------------------------------------------------------------------------------

    @property
    def trajectories_per_step(self) -> int:
        """prompts_per_step x group_size."""
        return self.rollout.prompts_per_step * self.rollout.group_size

    @property
    def updates_per_step(self) -> int:
        """prompts_per_step / mini_batch_prompts: optimizer steps per rollout step."""
        return self.rollout.prompts_per_step // self.algo.mini_batch_prompts

    def train_budget(self) -> Budget:
        return self._budget(self.budget)

    def eval_budget(self) -> Budget:
        return self._budget(self.eval.budget or self.budget)

    def _budget(self, b: BudgetConfig) -> Budget:
        return Budget(
            max_prompt_tokens=b.max_prompt_tokens,
            max_response_tokens=b.max_response_tokens,
            max_tool_calls=b.max_tool_calls,
            max_turn_tokens=b.max_turn_tokens,
            tool_timeout_s=self.tool.timeout_s,
            trajectory_timeout_s=b.trajectory_timeout_s,
        )

    def eval_sampling(self) -> Sampling:
        if self.eval.preset == "repro":
            return Sampling(1.0, 1.0, -1)
        if self.eval.preset == "paper":
            return Sampling(0.6, 0.95, -1)
        return self.sampling.sampling()

    @property
    def max_model_len(self) -> int:
        """The longest context an engine must hold: the larger of the training and the evaluation budget."""
        return max(self.budget.max_model_len, (self.eval.budget or self.budget).max_model_len)

    @property
    def config_hash(self) -> str:
        """12 hex digits over all that can change a sample or an update: without `_NOT_HASHED`."""
        body = self.model_dump(mode="json", exclude=_NOT_HASHED)
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:12]

    # reading and writing ---------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, recipe: str, overrides: Iterable[str] = ()) -> Recipe:
        """Read a recipe by name (`rl_stage1_18k`) or path, then apply `a.b=value` overrides.

        >>> Recipe.load("rl_stage2_32k", ["optim.lr=5e-7"]).optim.lr
        5e-07
        """
        tree = _read_with_base(recipe, seen=())
        for item in overrides:
            _apply_override(tree, item)
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise ConfigError(_explain(error, recipe)) from None

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def flat(self) -> dict[str, Any]:
        """`{"optim.lr": 1e-06, ...}`: every resolved value under its override key."""
        out: dict[str, Any] = {}

        def walk(prefix: str, value: Any) -> None:
            if isinstance(value, dict):
                for key, sub in value.items():
                    walk(f"{prefix}.{key}" if prefix else key, sub)
            else:
                out[prefix] = value

        walk("", self.model_dump(mode="json"))
        return out


def recipe_names() -> list[str]:
    return sorted(
        p.name[: -len(".yaml")] for p in resources.files("aster.recipes").iterdir() if p.name.endswith(".yaml")
    )


def _read_with_base(recipe: str, *, seen: tuple[str, ...], near: Path | None = None) -> dict[str, Any]:
    if recipe in seen:
        raise ConfigError(f"recipe {recipe!r} is its own base: {' -> '.join((*seen, recipe))}")
    text, folder = _recipe_text(recipe, near)
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {recipe!r} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"recipe {recipe!r} must be a mapping of sections, got {type(tree).__name__}")
    base = tree.pop("base", None)
    if base is None:
        return tree
    return _merge(_read_with_base(str(base), seen=(*seen, recipe), near=folder), tree)


def _recipe_text(recipe: str, near: Path | None) -> tuple[str, Path | None]:
    for path in (Path(recipe), (near or Path()) / recipe, (near or Path()) / f"{recipe}.yaml"):
        if path.suffix in {".yaml", ".yml"} and path.is_file():
            return path.read_text("utf-8"), path.parent
    shipped = resources.files("aster.recipes") / f"{recipe}.yaml"
    if shipped.is_file():
        return shipped.read_text("utf-8"), None
    close = difflib.get_close_matches(recipe, recipe_names(), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ConfigError(f"no recipe {recipe!r}{hint}; shipped: {', '.join(recipe_names())}. A path must end in .yaml")


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    out = dict(under)
    for key, value in over.items():
        both = isinstance(out.get(key), dict) and isinstance(value, dict)
        out[key] = _merge(out[key], value) if both else value
    return out


def _apply_override(tree: dict[str, Any], item: str) -> None:
    key, eq, text = item.partition("=")
    if not eq or not key:
        raise ConfigError(f"override {item!r} must look like section.key=value, for example optim.lr=1e-6")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError as error:
        raise ConfigError(f"override {item!r}: the value is not YAML: {error}") from None
    *path, last = key.split(".")
    node = tree
    for part in path:
        child = node.get(part)
        if not isinstance(child, dict):
            child = node[part] = {}
        node = child
    node[last] = value


def _fields_at(path: tuple[Any, ...]) -> list[str]:
    """Names of the fields that a key at `path` could have been."""
    model: Any = Recipe
    for part in path:
        info = model.model_fields.get(part) if hasattr(model, "model_fields") else None
        if info is None:
            return []
        model = next(
            (a for a in (info.annotation, *getattr(info.annotation, "__args__", ())) if hasattr(a, "model_fields")),
            None,
        )
        if model is None:
            return []
    return list(model.model_fields)


def _explain(error: ValidationError, recipe: str) -> str:
    lines = [f"recipe {recipe!r} cannot be used:"]
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"]) or "(whole recipe)"
        if item["type"] == "extra_forbidden":
            known = _fields_at(tuple(item["loc"][:-1]))
            close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
            cure = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
            lines.append(f"  {key}: unknown key; {cure}")
        elif item["type"] == "tuple_type":
            lines.append(f"  {key}={item['input']!r}: it must be a list, as in {key}=[{item['input']}]")
        elif item["type"] == "missing":
            lines.append(f"  {key}: missing")
        elif item["type"] == "value_error":
            lines.append(f"  {item['msg'].removeprefix('Value error, ')}")
        else:
            lines.append(f"  {key}={item['input']!r}: {item['msg']}")
    return "\n".join(lines)
