"""The records that cross a process boundary. Frozen, numpy only, light to import.

Shape legend: P prompts · G samples of a prompt · T response tokens of a trajectory · R tokens of a packed row.

A trajectory's response is model text and observations in one stream:

    prompt_ids   <|im_start|>user ... <|im_start|>assistant\\n
    ids          think call <|im_end|> | \\n <|im_start|>user <tool_response> 4 ... assistant\\n | answer <|im_end|>
    mask           1    1       1      |  0       0                0              0             |   1       1

`ids`, `mask`, `behaviour_logprobs` and `versions` are aligned, all of length T. Ids under mask 1 are exactly what the
engine sampled; ids under mask 0 are the chat template's own delta around the observation.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import numpy as np


class Cause(enum.StrEnum):
    """Why a trajectory ended. Exactly one each. `is_ours` tells our failures from what the model did."""

    ANSWERED = "answered"
    MAX_TOOL_CALLS = "max_tool_calls"
    MAX_TOKENS = "max_tokens"
    OBSERVATION_OVERFLOW = "observation_overflow"
    MALFORMED_END = "malformed_end"
    ENGINE_LOST = "engine_lost"
    SANDBOX_LOST = "sandbox_lost"
    REWARD_FAILED = "reward_failed"
    STALE = "stale"
    CANCELLED = "cancelled"

    @property
    def is_ours(self) -> bool:
        return self in _OURS


_OURS = frozenset({Cause.ENGINE_LOST, Cause.SANDBOX_LOST, Cause.REWARD_FAILED, Cause.STALE, Cause.CANCELLED})


class ToolOutcome(enum.StrEnum):
    """The `tool_execution_*` bucket of one call (`agent.observations`)."""

    SUCCESS = "success"
    TIMEOUT = "timeout"
    RUNTIME_ERROR = "runtime_error"
    FORMAT_ERROR = "format_error"
    UNKNOWN_ERROR = "unknown_error"


@dataclass(frozen=True)
class PromptRow:
    """One row of a prompt parquet (README, "Data"). `ground_truth` stays with the driver; a session never sees it."""

    row_id: str
    messages: tuple[dict[str, str], ...]
    ground_truth: str
    data_source: str
    agent_name: str = "code_agent"
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Budget:
    """Limits of one trajectory, in tokens, calls and seconds. Response tokens count model and observation tokens."""

    max_prompt_tokens: int
    max_response_tokens: int
    max_tool_calls: int
    max_turn_tokens: int | None = None
    tool_timeout_s: float = 30.0
    trajectory_timeout_s: float = 3600.0

    @property
    def max_model_len(self) -> int:
        return self.max_prompt_tokens + self.max_response_tokens


@dataclass(frozen=True)
class Sampling:
    """Sampling distribution of one trajectory; behaviour log-probs are recorded for exactly this distribution."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1


@dataclass(frozen=True)
class Task:
    """What a rollout actor needs to run one trajectory. Carries no ground truth."""

    uid: str  # unique per attempt group: "{run}/{kind}/{step}/{row_id}/{sample}"
    row_id: str
    sample: int  # 0 .. G-1
    messages: tuple[dict[str, str], ...]
    agent_name: str
    budget: Budget
    sampling: Sampling
    seed: int
    attempt: int = 0
    tools_enabled: bool = True
    leaves: tuple[Task, ...] = ()  # the further leaves of a tree whose first this is
    tree_turns: tuple[int, ...] = ()
    tree_factor: int = 2
    past: Past | None = None  # finished turns to go on from


def trajectory_uid(run: str, place: str, sample: int) -> str:
    """`RUN/KIND/STEP/ROW_ID/SAMPLE`, where `place` is the middle: under it the journal finds a trajectory again."""
    return f"{run}/{place}/{sample}"


@dataclass(frozen=True)
class RolloutWork:
    """A prompt and how often to sample it. `kind` is "train" or "val"; groups come back as `TrajectoryGroup`."""

    row: PromptRow
    group_size: int
    budget: Budget
    sampling: Sampling
    step: int
    seed: int
    kind: str = "train"
    tools_enabled: bool = True
    tree_turns: tuple[int, ...] = ()  # as `rollout.tree_turns`; () = every sample by itself
    tree_factor: int = 2
    past: Mapping[int, Past] = field(default_factory=dict)  # sample -> its finished turns, to go on from
    place: int = 0  # in the order of submission; its group has it too


@dataclass(frozen=True)
class ToolCall:
    """One executed (or refused) call. `status` is the tool's word, `outcome` the metric bucket."""

    code: str  # another tool's arguments as JSON
    status: str
    outcome: ToolOutcome
    observation: str
    seconds: float
    queue_s: float = 0.0
    state_lost: bool = False
    extra_calls_dropped: int = 0
    tool: str = "code_interpreter"  # "" = the call was refused before one was found


@dataclass(frozen=True)
class Turn:
    """One generation, `ids[start:stop]` of the trajectory, then perhaps a call. Seconds since the episode began."""

    start: int
    stop: int
    finish_reason: str  # "stop" | "length"
    began_s: float
    ended_s: float
    call: ToolCall | None = None
    further_calls: tuple[ToolCall, ...] = ()  # only with tool.max_calls_per_turn > 1


@dataclass(frozen=True)
class FinishedTurn:
    """A turn with the observation behind it, as the journal keeps it; the arrays are aligned, [N] each.

    The turn's own ids are the first `turn.stop - turn.start`; the last turn of a trajectory has no others.
    """

    turn: Turn
    ids: np.ndarray  # int32
    mask: np.ndarray  # bool
    logprobs: np.ndarray  # float32
    versions: np.ndarray  # int32
    seen: tuple[str, ...] = ()  # per call: digest of what it answered, before any cut

    @property
    def oldest_version(self) -> int:
        return int(self.versions[self.mask].min())


@dataclass(frozen=True)
class Past:
    """What a killed run left of a trajectory: turns 0, 1, ... behind a prompt of this digest."""

    prompt: str
    turns: tuple[FinishedTurn, ...]


@dataclass(frozen=True)
class Verdicts:
    """Both verifiers' opinions of the final assistant turn; None = not asked."""

    strict: bool | None = None
    math_verify: bool | None = None
    pred: str = ""


@dataclass(frozen=True)
class Timing:
    """Wall seconds of one trajectory, and when it began (unix time)."""

    began_unix: float = 0.0
    total_s: float = 0.0
    generate_s: float = 0.0
    tool_s: float = 0.0
    queue_s: float = 0.0
    score_s: float = 0.0  # of the verifier, behind total_s


@dataclass(frozen=True)
class Trajectory:
    """One finished episode, token-exact. `reward` is None until scored, and stays None where `cause.is_ours`."""

    uid: str
    row_id: str
    sample: int
    prompt_ids: np.ndarray  # [P] int32
    ids: np.ndarray  # [T] int32, model and observation tokens
    mask: np.ndarray  # [T] bool, True = sampled by the model
    behaviour_logprobs: np.ndarray  # [T] float32, 0 where mask is False
    versions: np.ndarray  # [T] int32, policy version that sampled the token; -1 where mask is False
    turns: tuple[Turn, ...]
    cause: Cause
    final_text: str = ""  # the final assistant turn, special tokens skipped; what the reward looks at
    engine: str = ""
    sandbox: str = ""  # node of its session
    timing: Timing = Timing()
    parent: str | None = None  # in a tree: the uid of the leaf that this one was forked from
    branch_turn: int | None = None  # the first turn that it does not share with `parent`
    reward: float | None = None
    verdicts: Verdicts = Verdicts()
    error: str = ""  # the infrastructure's own words where cause.is_ours
    recalled_turns: int = 0  # finished by a run that was killed or an attempt that was lost, and taken from the journal
    began_afresh: bool = False  # there were such turns, but their cells gave other answers when run again

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.ids)

    @property
    def model_tokens(self) -> int:
        return int(self.mask.sum())

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        return tuple(call for t in self.turns if t.call is not None for call in (t.call, *t.further_calls))

    def with_reward(self, reward: float, verdicts: Verdicts) -> Trajectory:
        return replace(self, reward=reward, verdicts=verdicts)

    def failed(self, cause: Cause, error: str) -> Trajectory:
        assert cause.is_ours, cause
        return replace(self, cause=cause, error=error, reward=None)


@dataclass(frozen=True)
class TrajectoryGroup:
    """The G trajectories of one prompt. Those with `cause.is_ours` carry no reward and stay out of all statistics."""

    row: PromptRow
    step: int
    trajectories: tuple[Trajectory, ...]
    kind: str = "train"
    lost: tuple[Trajectory, ...] = ()  # attempts that our infrastructure lost and that were replaced by a retry
    place: int = 0  # of its work; the row alone would not tell, it may be in flight twice where two epochs meet

    @property
    def scored(self) -> tuple[Trajectory, ...]:
        return tuple(t for t in self.trajectories if t.reward is not None)


@dataclass(frozen=True)
class Sample:
    """One training sequence, before packing: a trajectory with its advantage, or an SFT conversation.

    The three log-prob arrays may be None (SFT; before the proximal pass; without a KL penalty).
    """

    ids: np.ndarray  # [S] int32, prompt and response
    mask: np.ndarray  # [S] bool, True = the loss is taken on this token
    advantage: float | np.ndarray = 1.0  # of all tokens alike, or [S], aligned with ids
    group: int = 0  # which group of the mini-batch, for `group` aggregation
    behaviour_logprobs: np.ndarray | None = None  # [S] float32, aligned with ids
    old_logprobs: np.ndarray | None = None  # [S] float32, aligned with ids
    reference_logprobs: np.ndarray | None = None  # [S] float32, aligned with ids

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def loss_tokens(self) -> int:
        """The first token is nobody's label."""
        return int(self.mask[1:].sum())

    def lengths(self) -> dict[str, int]:
        """Of the arrays that must be as long as `ids`."""
        given = {
            "mask": self.mask,
            "advantage": self.advantage if isinstance(self.advantage, np.ndarray) else None,
            "behaviour_logprobs": self.behaviour_logprobs,
            "old_logprobs": self.old_logprobs,
            "reference_logprobs": self.reference_logprobs,
        }
        return {name: len(array) for name, array in given.items() if array is not None}


@dataclass(frozen=True)
class TrajectorySample:
    """A trajectory as a training sequence, prompt first. Its arrays are put together when they are read: a step's
    tokens lie in the trajectories once, and the joined copy lives only while its row is packed."""

    trajectory: Trajectory
    advantage: float | np.ndarray = 1.0  # as in `Sample`
    group: int = 0
    old_logprobs: np.ndarray | None = None  # [S] float32, aligned with ids
    reference_logprobs: np.ndarray | None = None  # [S] float32, aligned with ids

    @property
    def ids(self) -> np.ndarray:
        """[S] int32."""
        return np.concatenate([self.trajectory.prompt_ids, self.trajectory.ids])

    @property
    def mask(self) -> np.ndarray:
        """[S] bool, False in the prompt."""
        return np.concatenate([np.zeros(len(self.trajectory.prompt_ids), bool), self.trajectory.mask])

    @property
    def behaviour_logprobs(self) -> np.ndarray:
        """[S] float32, 0 in the prompt."""
        prompt = np.zeros(len(self.trajectory.prompt_ids), np.float32)
        return np.concatenate([prompt, self.trajectory.behaviour_logprobs])

    def __len__(self) -> int:
        return self.trajectory.num_tokens

    @property
    def loss_tokens(self) -> int:
        t = self.trajectory
        return int(t.mask.sum() if len(t.prompt_ids) else t.mask[1:].sum())

    def lengths(self) -> dict[str, int]:
        t, prompt = self.trajectory, len(self.trajectory.prompt_ids)
        given = {
            "advantage": self.advantage if isinstance(self.advantage, np.ndarray) else None,
            "old_logprobs": self.old_logprobs,
            "reference_logprobs": self.reference_logprobs,
        }
        return {"mask": prompt + len(t.mask), "behaviour_logprobs": prompt + len(t.behaviour_logprobs)} | {
            name: len(array) for name, array in given.items() if array is not None
        }


class TrainingSequence(Protocol):
    """What packing needs of a `Sample` or a `TrajectorySample`; shapes as there."""

    @property
    def ids(self) -> np.ndarray: ...
    @property
    def mask(self) -> np.ndarray: ...
    @property
    def advantage(self) -> float | np.ndarray: ...
    @property
    def group(self) -> int: ...
    @property
    def behaviour_logprobs(self) -> np.ndarray | None: ...
    @property
    def old_logprobs(self) -> np.ndarray | None: ...
    @property
    def reference_logprobs(self) -> np.ndarray | None: ...
    @property
    def loss_tokens(self) -> int: ...
    def lengths(self) -> dict[str, int]: ...
    def __len__(self) -> int: ...


@dataclass(frozen=True)
class MicroBatch:
    """One packed row for one rank. Position r predicts `labels[r]`; every other array is aligned with the *label*.

    Two samples, ids [5 6 7] with mask [0 1 1] and ids [8 9] with mask [0 1], pack to

        input_ids     5 6 7 8 9
        position_ids  0 1 2 0 1
        labels        6 7 0 9 0
        loss_mask     1 1 0 1 0
        segment_ids   0 0 0 1 1

    A row of padding (a rank that has nothing to do takes part in the collectives all the same) has no loss_mask set.
    """

    input_ids: np.ndarray  # [R] int64
    position_ids: np.ndarray  # [R] int64, restarts at 0 with each sample
    labels: np.ndarray  # [R] int64, the next id of the same sample; 0 at its last position
    loss_mask: np.ndarray  # [R] bool
    advantages: np.ndarray  # [R] float32
    behaviour_logprobs: np.ndarray  # [R] float32
    old_logprobs: np.ndarray  # [R] float32; NaN where no proximal pass was made
    reference_logprobs: np.ndarray  # [R] float32; NaN where no reference model was asked
    segment_ids: np.ndarray  # [R] int32
    sample_index: tuple[int, ...]  # which samples of the packed list, in order of segment; () = padding row
    sample_group: tuple[int, ...]  # the group of each segment
    group_loss_tokens: tuple[int, ...] = ()  # per segment: loss tokens of its whole group in the packed list
    num_sequences: int = 0  # sequences with a loss token in the packed list, all rows and ranks

    @property
    def cu_seqlens(self) -> np.ndarray:
        """Boundaries of the segments, int32 [segments + 1], as varlen attention wants them."""
        counts = np.bincount(self.segment_ids)
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


@dataclass(frozen=True)
class TokenScores:
    """What the learner says of a row's labels, [R] float32 each; 0 where `loss_mask` is False."""

    logprobs: np.ndarray  # log pi(label)
    entropies: np.ndarray  # of the distribution that was sampled from, in nats


@dataclass(frozen=True)
class StepStats:
    """Token sums over one or more micro-batches (all ranks). Sums, so that adding two records is exact."""

    loss: float = 0.0  # already divided by the global denominator: adds up to the loss of the mini-batch
    tokens: int = 0  # tokens with loss_mask
    padded_tokens: int = 0  # tokens fed to the model, padding rows included
    entropy_sum: float = 0.0
    clipped_sum: float = 0.0  # tokens where the clip binds
    clipped_lower_sum: float = 0.0  # tokens where the dual clip binds
    kl_sum: float = 0.0  # sum of old - current
    tis_sum: float = 0.0  # sum of the (capped) TIS weights
    tis_capped_sum: float = 0.0
    reference_kl_sum: float = 0.0  # the estimate of `algo.kl_estimator`
    seconds: float = 0.0

    def __add__(self, other: StepStats) -> StepStats:
        return StepStats(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def per_token(self, total: float) -> float:
        return total / max(self.tokens, 1)


@dataclass(frozen=True)
class OptimStats:
    """One optimizer step."""

    grad_norm: float
    lr: float
    skipped: bool  # the norm was not finite; weights unchanged, gradients zeroed
    seconds: float = 0.0


@dataclass(frozen=True)
class TensorMeta:
    """One tensor on the wire: Hugging Face checkpoint name, wire dtype ("bfloat16" | "float32"), shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class PublishReport:
    """What one weight publication cost and how well it verified."""

    version: int
    bytes: int
    seconds: float
    engines: int
    canary_max_diff: float | None = None  # max |engine log-prob - learner log-prob| over the canary, in nats
    phases: Mapping[str, float] = field(default_factory=dict)  # seconds; some overlap, of the slowest engine each
