"""What the driver asks of devices and services, and nothing else of them. Protocols only: a fake is ten lines.

`actors/` implements them with Ray (prompts: `data.prompts`), `tests/fakes.py` without.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from aster.types import (
    MicroBatch,
    OptimStats,
    PromptRow,
    PublishReport,
    RolloutWork,
    StepStats,
    TensorMeta,
    TokenScores,
    Trajectory,
    TrajectoryGroup,
)
from serve.schema import CellRecord, ExecuteResponse

ExecResult = ExecuteResponse
"""What one cell did. User code that fails is data in here; a sandbox that fails raises `SandboxLost`."""


@runtime_checkable
class Sandbox(Protocol):
    """One stateful Python session; one per trajectory. Calls are serialised by the caller."""

    session_id: str

    async def execute(self, code: str, *, timeout_s: float, call_id: str) -> ExecResult:
        """Run one cell. Never re-sent blindly: `call_id` makes a repeated request return the first answer.

        Raises `SandboxLost` when the session is gone for a reason of ours.
        """
        ...

    async def fork(self) -> Sandbox: ...

    async def journal(self) -> list[CellRecord]: ...

    async def close(self) -> None:
        """Idempotent, never raises for a session that is already gone."""
        ...


class SandboxFactory(Protocol):
    async def open(self, key: str) -> Sandbox:
        """A fresh session for trajectory `key`. Raises `BackPressure` (nothing was made) or `SandboxLost`."""
        ...


class WeightSource(Protocol):
    """The learner's side of a publication: what will be sent, and the sending itself."""

    def metadata(self) -> Sequence[TensorMeta]:
        """Every tensor in wire order, Hugging Face names, tied weights once."""
        ...


class RolloutPool(Protocol):
    """Engines that run trajectories. Submitting never blocks; groups come back in order of completion."""

    def submit(self, work: RolloutWork) -> None: ...

    def groups(self) -> AsyncIterator[TrajectoryGroup]:
        """Endless; raises the pool's own failure (`CircuitOpen`, a dead background task) instead of hanging."""
        ...

    async def publish(self, source: WeightSource, version: int) -> PublishReport: ...

    async def drain(self) -> list[Trajectory]:
        """Stop everything in flight and hand back what is half done. Its finished turns are in the journal already:
        engines write each when it is finished."""
        ...

    async def close(self) -> None: ...


class LearnerGroup(Protocol):
    """The FSDP2 gang. One micro-batch per data-parallel rank and call; rank r takes `microbatch_per_rank[r]`."""

    dp_size: int

    async def log_probs(
        self, microbatch_per_rank: Sequence[MicroBatch], *, reference: bool = False
    ) -> list[TokenScores]:
        """Per rank: log pi(label) and entropy at every position. No gradient.

        `reference`: of the frozen model that the run began with, which is loaded when `algo.kl_coef` is above 0.
        """
        ...

    async def forward_backward(
        self, microbatch_per_rank: Sequence[MicroBatch], *, num_loss_tokens: int, num_groups: int
    ) -> StepStats:
        """Accumulate gradients. The denominators are those of the whole mini-batch over all ranks."""
        ...

    async def optim_step(self) -> OptimStats: ...

    def weight_source(self) -> WeightSource: ...

    async def save(self, path: str) -> None:
        """Weights, optimizer, scheduler and RNG; atomic: `path` exists only when it is complete.

        Returns when the copy in host memory is taken; the files are written behind the calls that follow.
        """
        ...

    async def saved(self) -> None:
        """Wait until the save under way is on disk. Raises what it failed with, as the next save would."""
        ...

    async def load(self, path: str) -> int:
        """Returns the number of optimizer steps of the checkpoint; works at another world size."""
        ...


class Checkpointer(Protocol):
    """Names checkpoints, keeps the newest ones, and finds the one to resume from."""

    async def save(
        self,
        step: int,
        learners: LearnerGroup,
        driver_state: dict[str, object],
        *,
        after: Callable[[], Awaitable[None]] | None = None,
        then: Callable[[], None] | None = None,
    ) -> str:
        """Returns the directory that will appear when everything in it is on disk; one save at a time.

        It appears not before `after` is done; what that raises is raised like a failed write. `then` is called when the
        directory is there.
        """
        ...

    async def finish(self) -> None:
        """Wait until the save under way is complete. Raises what it failed with. Call it before the learners close."""
        ...

    def latest(self) -> str | None: ...

    def set_aside(self) -> object:
        """Forget what is there without deleting it: `latest()` is then None."""
        ...

    async def roll_back(self, step: int) -> str | None:
        """The newest checkpoint of at most `step`, from now on the latest; None, and nothing changed, without one."""
        ...

    async def amend(self, step: int, driver_state: Mapping[str, object]) -> None:
        """Change what the checkpoint of `step` says of the driver."""
        ...

    async def restore(self, path: str, learners: LearnerGroup) -> dict[str, object]: ...


class Prompts(Protocol):
    """What the loop needs of `data.prompts.PromptStream`: rows, and a restart that loses and repeats none of them."""

    total_steps: int

    @property
    def epoch(self) -> int: ...

    def take(self) -> PromptRow: ...
    def done(self, row: PromptRow) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
