"""The GRPO loop against `roles.py`: sample, score, advantage, update, publish. No Ray, no torch, no device.

Legend: P prompts of a step · G samples of a prompt · M optimizer mini-batches of a step · k = `max_staleness`.

                      journal <-- finished turns --+
                         | after a kill            |
                         v                         |
    PromptStream --submit--> Leftovers ---> RolloutPool --groups, as they complete--> Inbox --take P--> a learner step
                    ^                        ^                                          |                  |
                    |                        +----- validation rows of version v -------+                  +--> Recorder
                    |                               (beside step v+1, which has the same weights)          |  (a thread)
                    +----------------- at most (k+1)·P groups outstanding <--------- publish v+1 ----------+

With k = 0 nothing of the training is in flight while the learner works, so no sample is ever older than the weights it
trains. With k > 0 rollouts go on during the update; their tokens carry their own version and log-probs, and a group
that holds a token more than k versions old is dropped, counted and replaced.

Beside the loop, in one task group, whose first failure ends the run with its own traceback:
- the validation of version v. Its prompts stand behind the training prompts of step v+1, so that the learner waits for
  none of them; the engines work on them while it updates; the publication of v+1 waits for the last one.
- the recorder (`recorder.py`): metrics, rollouts and validation files, at most two steps behind.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any

import numpy as np

from aster import metrics
from aster.algo.advantages import group_advantages, tree_advantages, tree_paths
from aster.algo.collapse import EntropyTally
from aster.algo.importance import stored_gap
from aster.algo.packing import denominators, packed, unpack_row
from aster.algo.regions import Markers
from aster.algo.shaping import has_signal, is_trained, shaped_reward
from aster.checkpoints import finishing
from aster.config import Recipe
from aster.data.rollouts import Decode
from aster.errors import AsterError, WeightSyncError
from aster.guard import CollapseGuard
from aster.leftovers import Leftovers
from aster.recorder import Log, Recorder, RolloutStep, RunRecord
from aster.roles import Checkpointer, LearnerGroup, Prompts, RolloutPool
from aster.types import (
    Cause,
    OptimStats,
    PromptRow,
    RolloutWork,
    StepStats,
    Trajectory,
    TrajectoryGroup,
    TrajectorySample,
)
from aster.validation import Inbox, Validation

log = logging.getLogger("aster")

_COLLECT_AFTER = 50_000  # new objects


@dataclass
class GrpoLoop:
    """One training run. `_train()` is the whole of it; each other method is one line of the algorithm box."""

    recipe: Recipe
    learners: LearnerGroup
    pool: RolloutPool
    prompts: Prompts
    log: Log
    decode: Decode
    val_rows: Sequence[PromptRow] = ()
    checkpoints: Checkpointer | None = None
    guard: CollapseGuard | None = None
    markers: Markers | None = None  # how the tokenizer spells thoughts and calls

    def __post_init__(self) -> None:
        self.total_steps = self.recipe.run.steps or self.prompts.total_steps
        self.step = 0
        self.stale_groups = 0
        self.no_signal_steps = 0  # from which there was nothing to learn
        self._outstanding = 0
        self._leftovers = Leftovers(self.recipe)
        self._places = count()
        self._first_place = 0  # groups from before it may be of weights that were rolled back
        self._inbox = Inbox(self.pool.groups())
        self._record = RunRecord(self.recipe, self.log, self.decode, markers=self.markers)
        self._recorder = Recorder()
        self._beside = asyncio.TaskGroup()
        self._validation = Validation(
            self.recipe,
            self.pool,
            self._inbox,
            self.val_rows,
            leftovers=self._leftovers,
            record=self._record_validation,
        )

    async def run(self) -> None:
        """Train to the last step. However that ends, the checkpoint and the records under way are completed first."""
        with _rare_collections():
            if self.checkpoints is None:
                await self._supervised()
            else:
                async with finishing(self.checkpoints):
                    await self._supervised()

    async def _supervised(self) -> None:
        """Beside the tasks that run with it. The first failure of any ends all, and is raised as it was."""
        failure: BaseException | None = None
        try:
            async with self._beside:
                watching = self._beside.create_task(self._recorder.broken(), name="the recorder")
                try:
                    await self._train()
                    await self._recorder.flush()
                finally:
                    await self._recorder.settle()
                    watching.cancel()
        except BaseExceptionGroup as group:
            failure = group.exceptions[0]
        if failure is not None:
            raise failure  # here, and not above, so that its own cause stays

    async def _train(self) -> None:
        await self.resume()
        await self.publish()
        if self._validation_is_owed():
            await self.validate()
        while self.step < self.total_steps:
            began = time.monotonic()
            self.step += 1
            step = await self.sample()
            sampled = time.monotonic()
            values = await self.learn(step)
            values |= await self.publish()
            await self.record(step, values, began=began, sampled=sampled)
            if await self.rolled_back():
                continue
            if self._due(self.recipe.run.val_every):
                await self.validate()
            if self._due(self.recipe.run.save_every):
                await self.save()
        await self._validation.over(self._beside)

    # the steps of the algorithm --------------------------------------------------------------------------------------

    async def sample(self) -> RolloutStep:
        """P scored groups, in the order they were asked for: who was faster must not decide on mini-batches.

        Groups older than k versions are dropped and replaced.
        With dynamic sampling so are groups without variance, until `dynamic_sampling_limit` * P groups were seen.
        """
        r, algo = self.recipe.rollout, self.recipe.algo
        groups: list[TrajectoryGroup] = []
        replaced: list[TrajectoryGroup] = []
        stale: list[TrajectoryGroup] = []
        most = (algo.dynamic_sampling_limit - 1) * r.prompts_per_step if algo.dynamic_sampling else 0
        while len(groups) < r.prompts_per_step:
            self._submit((r.max_staleness + 1) * r.prompts_per_step - self._outstanding - len(groups))
            self._validation.begin(self._beside)
            group = await self._inbox.next("train")
            self._outstanding -= 1
            self.prompts.done(group.row)
            self._leftovers.done(group.row, group.step)
            if self._is_too_old(group):
                self.stale_groups += 1
                stale.append(group)
            elif len(replaced) < most and not has_signal(group.scored, algo, budget=self._response_tokens):
                replaced.append(group)
            else:
                groups.append(group)
        return RolloutStep(sorted(groups, key=lambda g: g.place), replaced, stale)

    async def learn(self, step: RolloutStep) -> dict[str, float]:
        """Advantages, the proximal pass, then one optimizer step per mini-batch of whole groups.

        A step of which nothing is trained on leaves the weights as they are. They are published as its version all the
        same, so that ages and checkpoints go by one number; the learning-rate schedule counts updates and stands still.
        """
        algo = self.recipe.algo
        began = time.monotonic()
        samples = [s for index, group in enumerate(step.groups) for s in self.samples_of(group, index)]
        step.advantages = {s.trajectory.uid: s.advantage for s in samples}
        if not samples:
            await self._no_signal(step.groups)
            return {}
        samples, values = await self.proximal(step, samples)
        if algo.kl_coef > 0:
            reference = await self._log_probs(samples, reference=True)
            samples = [replace(s, reference_logprobs=r) for s, r in zip(samples, reference, strict=True)]
        proximal_done = time.monotonic()
        stats: list[StepStats] = []
        optims: list[OptimStats] = []
        for first in range(0, len(step.groups), algo.mini_batch_prompts):
            mini = [s for s in samples if first <= s.group < first + algo.mini_batch_prompts]
            if mini:
                step_stats, optim = await self.update(mini)
                stats.append(step_stats)
                optims.append(optim)
        values = metrics.update_metrics(stats, optims) | values  # the entropy under pi_old stands
        values["timing_s/old_log_prob"] = proximal_done - began
        values["timing_s/update_actor"] = time.monotonic() - proximal_done
        return values

    async def proximal(
        self, step: RolloutStep, samples: Sequence[TrajectorySample]
    ) -> tuple[list[TrajectorySample], dict[str, float]]:
        """The samples with their log-probs under pi_old, the weights as they are now (as the engine told them without
        a proximal pass), and what these say of entropy and of the engine."""
        if not self.recipe.algo.proximal_pass:
            return [replace(s, old_logprobs=s.behaviour_logprobs) for s in samples], {}
        entropies = EntropyTally(self.markers)
        old = await self._log_probs(
            samples, entropies=lambda s, e: entropies.add(s.trajectory, e, source=step.groups[s.group].row.data_source)
        )
        step.gaps = {
            s.trajectory.uid: stored_gap(o, s.behaviour_logprobs)[len(s.trajectory.prompt_ids) :]
            for s, o in zip(samples, old, strict=True)
        }
        values = {"actor/entropy": entropies.mean} | entropies.metrics() | self._mismatch(samples, old)
        return [replace(s, old_logprobs=o) for s, o in zip(samples, old, strict=True)], values

    async def _no_signal(self, groups: Sequence[TrajectoryGroup]) -> None:
        """Count the step and say why. Options make it normal; without a single score everything is broken: raises."""
        algo, members = self.recipe.algo, [t for g in groups for t in g.trajectories]
        scored = [t for g in groups for t in g.scored]
        if not scored:
            causes = ", ".join(f"{cause} {n}" for cause, n in Counter(t.cause for t in members).most_common())
            raise AsterError(f"step {self.step}: none of its {len(members)} trajectories has a reward ({causes})")
        self.no_signal_steps += 1
        alike = sum(not has_signal(g.scored, algo, budget=self._response_tokens) for g in groups)
        message = (
            f"nothing to learn from, no update: {len(scored)} of {len(members)} trajectories have a reward, in {alike} "
            f"of {len(groups)} groups no two differ (algo.drop_zero_variance={str(algo.drop_zero_variance).lower()}), "
            f"{sum(not is_trained(t, algo) for t in scored)} are not trained on (algo.overlong={algo.overlong})"
        )
        await self._recorder.put(partial(self.log.event, self.step, "no_signal", message))

    def _mismatch(self, samples: Sequence[TrajectorySample], old: Sequence[np.ndarray]) -> dict[str, float]:
        """Engine against learner over the tokens of the weights that the learner has; apart, over those of older ones,
        from which the policy itself has moved."""

        def sides(own: Callable[[Trajectory], np.ndarray]) -> tuple[Iterator[np.ndarray], Iterator[np.ndarray]]:
            ours = ((s.trajectory, o[len(s.trajectory.prompt_ids) :]) for s, o in zip(samples, old, strict=True))
            return (s.trajectory.behaviour_logprobs[own(s.trajectory)] for s in samples), (o[own(t)] for t, o in ours)

        newest = self.step - 1
        return metrics.mismatch_metrics(*sides(lambda t: t.mask & (t.versions == newest))) | metrics.staleness_metrics(
            *sides(lambda t: t.mask & (t.versions != newest))
        )

    def samples_of(self, group: TrajectoryGroup, index: int) -> list[TrajectorySample]:
        """Training sequences of one group. Trajectories that we lost have no reward and no share in the statistics."""
        scored = group.scored
        if not scored or (len(scored) < 2 <= self.recipe.rollout.group_size):
            return []  # nothing left to compare with: the whole group is masked
        algo = self.recipe.algo
        rewards_G = np.array([shaped_reward(t, algo, budget=self._response_tokens) for t in scored], dtype=np.float64)
        advantages = self._advantages(scored, rewards_G)
        if algo.drop_zero_variance and not any(np.any(a) for a in advantages):
            return []
        return [
            TrajectorySample(t, advantage=advantage, group=index)
            for t, advantage in zip(scored, advantages, strict=True)
            if is_trained(t, algo)
        ]

    def _advantages(self, scored: Sequence[Trajectory], rewards_G: np.ndarray) -> Sequence[float | np.ndarray]:
        """Per trajectory one for all its tokens; for leaves of trees [S], one for each stretch between two splits."""
        rollout, scale = self.recipe.rollout, self.recipe.algo.scale_by_std
        if not rollout.tree_turns:
            return [float(a) for a in group_advantages(rewards_G, scale_by_std=scale)]
        samples_G = np.array([t.sample for t in scored])
        paths_GD = tree_paths(samples_G, factor=rollout.tree_factor, splits=len(rollout.tree_turns))
        out: list[float | np.ndarray] = []
        for t, advantages_D in zip(scored, tree_advantages(rewards_G, paths_GD, scale_by_std=scale), strict=True):
            splits = [t.turns[n].start if n < len(t.turns) else len(t.ids) for n in rollout.tree_turns]
            lengths = np.diff([-len(t.prompt_ids), *splits, len(t.ids)])
            out.append(np.repeat(advantages_D.astype(np.float32), lengths))
        return out

    async def update(self, mini: Sequence[TrajectorySample]) -> tuple[StepStats, OptimStats]:
        """One optimizer step. Denominators are those of the whole mini-batch, so packing cannot change the loss."""
        tokens, groups = denominators(mini)
        total = StepStats()
        for per_rank in packed(mini, row_tokens=self.recipe.learner.micro_batch_tokens, dp_size=self.learners.dp_size):
            total += await self.learners.forward_backward(per_rank, num_loss_tokens=tokens, num_groups=groups)
        return total, await self.learners.optim_step()

    async def publish(self) -> dict[str, float]:
        """Hand the weights to the engines; their version is the number of rollout steps learnt from.

        A publication that was rolled back is tried once more, since one failure may be a flipped bit. What fails
        twice, or leaves the engines shut, ends the run.
        """
        waited = await self._validation.over(self._beside)
        began = time.monotonic()
        source = self.learners.weight_source()
        try:
            report = await self.pool.publish(source, self.step)
        except WeightSyncError as error:
            if error.restored is None:
                raise
            log.warning("%s; version %d is published once more", error, self.step)
            report = await self.pool.publish(source, self.step)
        self._leftovers.published(self.step)
        return {
            "timing_s/publish": time.monotonic() - began,
            "timing_s/validation_wait": waited,
            "perf/publish_bytes": float(report.bytes),
            "training/canary_max_diff": float(report.canary_max_diff or 0.0),
        }

    async def record(self, step: RolloutStep, values: Mapping[str, float], *, began: float, sampled: float) -> None:
        """Metrics, rollouts and trajectories of the step, beside the steps that follow."""
        seconds = {"gen": sampled - began, "step": time.monotonic() - began}
        about = {
            "timing_s/began_unix": time.time() - seconds["step"],  # the report lays trajectories beside the phases
            "training/global_step": float(self.step),
            "training/epoch": float(self.prompts.epoch),
            "training/stale_groups": float(self.stale_groups),
            "training/no_signal_steps": float(self.no_signal_steps),
        }
        await self._recorder.put(partial(self._record.step, self.step, step, {**values, **about}, seconds=seconds))

    async def validate(self) -> None:
        """Sample every validation row `eval.samples` times under the evaluation budget, and log val-core/*.

        Beside the next step, which begins with the same weights; at once where the run has no overlap.
        """
        self._validation.ask(self.step)
        if self.recipe.run.deterministic or not self.recipe.run.val_overlap:
            await self._validation.over(self._beside)

    async def _record_validation(self, step: int, groups: Sequence[TrajectoryGroup], seconds: float) -> None:
        await self._recorder.put(partial(self._record.validation, step, groups, seconds=seconds))

    def _validation_is_owed(self) -> bool:
        """Before the first step: of the model as it came, or of the checkpoint whose validation a kill cut short."""
        if self.step == 0:
            return self.recipe.run.val_before_train
        done = self.recipe.run.path / "val_rollout_data" / f"{self.step}.jsonl"
        return self._due(self.recipe.run.val_every) and not done.exists()

    # state -----------------------------------------------------------------------------------------------------------

    async def save(self) -> None:
        if self.checkpoints is None:
            return
        began = time.monotonic()
        self._leftovers.saving(self.step)
        saved = partial(self._leftovers.saved, self.step)
        await self.checkpoints.save(self.step, self.learners, self._state(), after=self._recorder.so_far(), then=saved)
        seconds = {"timing_s/save_checkpoint": time.monotonic() - began}
        await self._recorder.put(partial(self._record.note, self.step, seconds))

    def _state(self) -> dict[str, object]:
        return {
            "prompts": self.prompts.state_dict(),
            "asked_in": self._leftovers.state_dict(),
            "stale_groups": self.stale_groups,
            "no_signal_steps": self.no_signal_steps,
        }

    async def rolled_back(self) -> bool:
        """What `collapse.on_alarm` asks for when the alarm is on (`guard`); nothing by default. True: the run is at an
        earlier step again, with its weights and the prompts that come next."""
        if self.guard is None or self.guard.config.on_alarm == "log":
            return False
        await self._recorder.flush()  # the alarm reads what was logged, and no late line may follow a roll-back
        step = await self.guard.after_step(self.step, checkpoints=self.checkpoints, learners=self.learners)
        if step is None:
            return False
        for file in (self.recipe.run.path / "val_rollout_data").glob("*.jsonl"):
            if file.stem.isdecimal() and int(file.stem) > step:  # else the step's next validation would count as done
                file.rename(file.with_name(f"{file.name}.rolled_back"))
        self.step = step
        self._first_place = next(self._places)
        self._leftovers.rolled_back(step)
        assert self.checkpoints is not None
        await self.checkpoints.amend(step, self._state())  # a resume goes on with the prompts that come now
        await self.publish()
        return True

    async def resume(self) -> None:
        if self.checkpoints is None:
            return
        if not self.recipe.run.resume:
            self.checkpoints.set_aside()
            self._leftovers.clear()
        path = self.checkpoints.latest()
        asked_in: Any = []
        if path is not None:
            state = await self.checkpoints.restore(path, self.learners)
            self.step, self.stale_groups = int(str(state["step"])), int(str(state["stale_groups"]))
            self.no_signal_steps = int(str(state.get("no_signal_steps", 0)))
            prompts = state["prompts"]
            assert isinstance(prompts, Mapping)
            self.prompts.load_state_dict(prompts)
            asked_in = state.get("asked_in", [])
        await self._leftovers.read(asked_in, version=self.step)

    # helpers ---------------------------------------------------------------------------------------------------------

    def _submit(self, count: int) -> None:
        for _ in range(count):
            self._outstanding += 1
            row = self.prompts.take()
            step, past = self._leftovers.take(row, self.step)
            self.pool.submit(
                RolloutWork(
                    row=row,
                    group_size=self.recipe.rollout.group_size,
                    budget=self.recipe.train_budget(),
                    sampling=self.recipe.sampling.sampling(),
                    step=step,
                    seed=self.recipe.run.seed,
                    tools_enabled=self.recipe.tool.enabled,
                    tree_turns=self.recipe.rollout.tree_turns,
                    tree_factor=self.recipe.rollout.tree_factor,
                    past=past,
                    place=next(self._places),
                )
            )

    async def _log_probs(
        self,
        samples: Sequence[TrajectorySample],
        *,
        reference: bool = False,
        entropies: Callable[[TrajectorySample, np.ndarray], None] | None = None,
    ) -> list[np.ndarray]:
        """Log-probs of every sample under the weights as they are now, aligned with its ids.

        Before the first update that is pi_old; `reference` asks the frozen model instead. One row a rank is in memory
        at a time; `entropies` is told those of each sample's response [T] as they come.
        """
        lengths = [len(s) for s in samples]
        logprobs: dict[int, np.ndarray] = {}
        rows = packed(samples, row_tokens=self.recipe.learner.micro_batch_tokens, dp_size=self.learners.dp_size)
        for per_rank in rows:
            scores = await self.learners.log_probs(per_rank, reference=reference)
            for micro, score in zip(per_rank, scores, strict=True):
                logprobs.update(unpack_row(score.logprobs, micro, lengths))
                if entropies is not None:
                    for index, values in unpack_row(score.entropies, micro, lengths):
                        entropies(samples[index], values[len(samples[index].trajectory.prompt_ids) :])
        return [logprobs[index] for index in range(len(samples))]

    @property
    def _response_tokens(self) -> int:
        return self.recipe.budget.max_response_tokens

    def _is_too_old(self, group: TrajectoryGroup) -> bool:
        """A token more than k versions older than the weights that the step begins with, or one that may have been
        sampled before the last roll-back."""
        if group.place < self._first_place:
            return True
        newest = self.step - 1
        oldest = newest - self.recipe.rollout.max_staleness

        def outside(versions: np.ndarray) -> bool:
            return bool(((versions < oldest) | (versions > newest)).any())

        return any(
            t.cause is Cause.STALE or (t.reward is not None and outside(t.versions[t.mask])) for t in group.trajectories
        )

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.total_steps)


@contextmanager
def _rare_collections() -> Iterator[None]:
    """A step's records are millions of objects, hardly any in a cycle. Looking for those after every 700 new objects,
    as Python does by itself, took a sixth of the control plane's time (`make bench-control`) and stopped the event loop
    for a second at a time."""
    before = gc.get_threshold()
    gc.set_threshold(_COLLECT_AFTER, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
