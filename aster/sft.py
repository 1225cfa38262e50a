"""`aster sft`: supervised fine-tuning on conversations, loss on what the sampler would emit.

    aster sft --recipe sft model.path=models/base 'data.train_files=[data/sft.parquet]' sft.val_fraction=0.02
    aster sft --recipe sft model.path=models/base 'data.train_files=[data/sft.parquet]' --show 3     # tokens and masks

Conversations are our own, OpenAI's `messages` or ShareGPT's (`aster.data.formats`). Every `run.val_every` steps the
validation set is scored: its loss, and of how many of its calls the form would come out right.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console

from aster import launch, metrics
from aster.agent.call_format import call_forms
from aster.agent.chat import ChatRenderer
from aster.agent.masks import masks_text
from aster.algo.packing import denominators, pack, unpack
from aster.checkpoints import DirectoryCheckpointer, finishing
from aster.command import parse_recipe, print_resolved, run_verb
from aster.config import Recipe, SftConfig
from aster.data.conversations import Messages, read_conversations, split, to_samples
from aster.errors import ConfigError, DataError
from aster.roles import LearnerGroup
from aster.tracking import Tracker
from aster.types import OptimStats, Sample, StepStats

_MORE_LIKELY_THAN_NOT = float(np.log(0.5))


@dataclass(frozen=True)
class Samples:
    """What a run trains on and what it is validated on; `dropped` of each: conversations that were too long."""

    train: list[Sample]
    val: list[Sample]
    dropped: int
    val_dropped: int


def main(argv: Sequence[str] | None = None) -> int:
    recipe, args = parse_recipe("sft", argv, stage="sft", about=__doc__ or "", default="sft", options=_options)
    if args.dry_run:
        print_resolved(recipe)
        return 0
    launch.require_model(recipe)
    if args.show is not None:
        if args.show < 1:
            raise ConfigError(f"--show {args.show} must be at least 1")
        renderer = ChatRenderer.from_model_dir(recipe.model.path)
        show(load_samples(recipe, renderer), renderer, count=args.show, console=Console(highlight=False))
        return 0
    with launch.cluster(recipe):
        asyncio.run(run(recipe))
    return 0


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--show", type=int, metavar="N", help="print the first N samples, tokens that are trained on in green, and stop"
    )


async def run(recipe: Recipe) -> None:
    """Train for `data.epochs` or `run.steps`, resuming from the newest checkpoint of the run directory."""
    renderer = ChatRenderer.from_model_dir(recipe.model.path)
    samples = load_samples(recipe, renderer)
    forms = [call_forms(s.ids, s.mask, renderer) for s in samples.val]
    row_tokens = recipe.learner.micro_batch_tokens
    plan = [b for epoch in range(recipe.data.epochs) for b in epoch_batches(samples.train, recipe.sft, epoch=epoch)]
    steps = min(recipe.run.steps or len(plan), len(plan))
    order = data_state(samples.train, recipe.sft)
    checkpoints = DirectoryCheckpointer(
        recipe.run.path / "checkpoints",
        model_path=recipe.model.path,
        config_hash=recipe.config_hash,
        keep=recipe.run.keep_checkpoints,
    )
    with Tracker.open(recipe, total_steps=steps, extra=launch.metric_sinks(recipe)) as tracker:
        async with launch.learners(recipe, total_steps=steps) as learners, finishing(checkpoints):
            step = 0
            if not recipe.run.resume:
                checkpoints.set_aside()
            path = checkpoints.latest()
            if path is not None:
                state = await checkpoints.restore(path, learners)
                require_same_data(state.get("sft"), order, path)
                step = int(str(state["step"]))
                if step >= steps:
                    tracker.event(
                        step, "complete", f"all {steps} steps are done: raise run.steps or data.epochs for more"
                    )
            elif samples.val and recipe.run.val_before_train and recipe.run.val_every:
                tracker.log(0, await validate(learners, samples.val, forms, row_tokens=row_tokens))
            for batch in plan[step:steps]:
                step += 1
                began = time.monotonic()
                stats, optim = await update(learners, batch, row_tokens=row_tokens)
                seconds = time.monotonic() - began
                tokens = sum(len(s) for s in batch)
                tracker.log(
                    step,
                    metrics.update_metrics([stats], [optim])
                    | {
                        "train/loss": stats.loss,
                        "data/dropped_too_long": float(samples.dropped),
                        "data/val_dropped_too_long": float(samples.val_dropped),
                        "perf/total_num_tokens": float(tokens),
                        "perf/throughput": tokens / seconds,
                        "timing_s/step": seconds,
                        "training/global_step": float(step),
                    },
                )
                if samples.val and recipe.run.val_every and (step % recipe.run.val_every == 0 or step == steps):
                    tracker.log(step, await validate(learners, samples.val, forms, row_tokens=row_tokens))
                if step % recipe.run.save_every == 0 or step == steps:
                    await checkpoints.save(step, learners, {"sft": order})


def data_state(samples: Sequence[Sample], config: SftConfig) -> dict[str, object]:
    """What the batches of a run depend on, for its checkpoints: the samples, as a hash, and how they are ordered."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(len(sample).to_bytes(8, "big") + sample.ids.tobytes() + sample.mask.tobytes())
    order = {"batch_size": config.batch_size, "batch_tokens": config.batch_tokens, "shuffle": config.shuffle}
    return {"samples": digest.hexdigest()[:16], **order, "seed": config.seed}


def require_same_data(old: object, new: dict[str, object], path: str) -> None:
    """`DataError` unless the checkpoint at `path` was made with the batches that this run would go on with."""
    if not isinstance(old, dict):
        raise DataError(f"{path} is no checkpoint of `aster sft`: name another run.name, or run.resume=false")
    changed = [f"{key} was {old.get(key)!r}, is {value!r}" for key, value in new.items() if old.get(key) != value]
    if changed:
        raise DataError(
            f"{path} was made with other conversations or batches: {', '.join(changed)}; restore them, or start a new "
            "run (another run.name, or run.resume=false)"
        )


def load_samples(recipe: Recipe, renderer: ChatRenderer) -> Samples:
    """The recipe's conversations as samples. Raises `DataError` when nothing is left on a side that was asked for."""
    if not recipe.data.train_files:
        raise ConfigError("data.train_files is empty: name at least one file of conversations")
    form = None if recipe.sft.format == "auto" else recipe.sft.format
    conversations = read_conversations(recipe.data.train_files, form=form)[: recipe.data.max_rows]
    heldout: list[Messages] = []
    if recipe.sft.val_fraction:
        conversations, heldout = split(conversations, fraction=recipe.sft.val_fraction, seed=recipe.sft.seed)
        if not conversations or not heldout:
            raise DataError(
                f"sft.val_fraction={recipe.sft.val_fraction} leaves {len(conversations)} conversations to train on "
                f"and {len(heldout)} to validate with: the problems are too few; name data.val_files"
            )
    elif recipe.data.val_files:
        heldout = read_conversations(recipe.data.val_files, form=form)

    def render(some: list[Messages]) -> tuple[list[Sample], int]:
        samples, dropped = to_samples(
            some, renderer, max_length=recipe.sft.max_length, train_on_newline=recipe.sft.train_on_newline
        )
        if some and not samples:
            raise DataError(
                f"all {dropped} conversations are longer than sft.max_length={recipe.sft.max_length} tokens: raise it"
            )
        return samples, dropped

    train, dropped = render(conversations)
    val, val_dropped = render(heldout[: recipe.data.val_max_rows])
    return Samples(train, val, dropped, val_dropped)


def show(samples: Samples, renderer: ChatRenderer, *, count: int, console: Console) -> None:
    """Print the first `count` training samples with their masks, then what the set holds."""
    for number, sample in enumerate(samples.train[:count]):
        console.rule(f"sample {number}: {len(sample)} tokens, {int(sample.mask.sum())} trained on", align="left")
        console.print(masks_text(sample, renderer), soft_wrap=True)
    tokens, trained = sum(map(len, samples.train)), sum(int(s.mask.sum()) for s in samples.train)
    console.print(
        f"{len(samples.train):,} samples of {tokens:,} tokens, {trained:,} of them trained on; "
        f"{samples.dropped:,} conversations dropped as too long; "
        f"{len(samples.val):,} samples for validation, {samples.val_dropped:,} too long"
    )


def epoch_batches(samples: Sequence[Sample], config: SftConfig, *, epoch: int) -> list[list[Sample]]:
    """One epoch, shuffled by (seed, epoch); a batch closes at `batch_size` samples or `batch_tokens` tokens.

    >>> five = [Sample(ids=np.zeros(3, np.int32), mask=np.ones(3, bool))] * 5
    >>> [len(b) for b in epoch_batches(five, SftConfig(batch_size=4, batch_tokens=6), epoch=0)]
    [2, 2, 1]
    """
    batches: list[list[Sample]] = []
    open_batch: list[Sample] = []
    tokens = 0
    order = list(range(len(samples)))
    if config.shuffle:
        np.random.default_rng([config.seed, epoch]).shuffle(order)
    for index in order:
        open_batch.append(samples[index])
        tokens += len(samples[index])
        if len(open_batch) >= config.batch_size or (config.batch_tokens is not None and tokens >= config.batch_tokens):
            batches.append(open_batch)
            open_batch, tokens = [], 0
    return [*batches, open_batch] if open_batch else batches


async def update(learners: LearnerGroup, batch: Sequence[Sample], *, row_tokens: int) -> tuple[StepStats, OptimStats]:
    """One optimizer step; the loss is the mean over all target tokens of the batch, however it is packed."""
    total = StepStats()
    tokens, conversations = denominators(batch)
    for per_rank in pack(batch, row_tokens=row_tokens, dp_size=learners.dp_size):
        total += await learners.forward_backward(per_rank, num_loss_tokens=tokens, num_groups=conversations)
    return total, await learners.optim_step()


async def validate(
    learners: LearnerGroup, samples: Sequence[Sample], forms: Sequence[Sequence[np.ndarray]], *, row_tokens: int
) -> dict[str, float]:
    """`val/loss`: nats per target token. `val/tool_format_accuracy`: the share of calls in `forms` (per sample, one
    array of positions per call) where each token of the form has a probability above 1/2, given what stands before
    it: greedy sampling would write it. `val/tokens` and `val/tool_calls`: over how many.
    """
    rows = pack(samples, row_tokens=row_tokens, dp_size=learners.dp_size)
    scores = [await learners.log_probs(per_rank) for per_rank in rows]
    logprobs = unpack([[s.logprobs for s in ranks] for ranks in scores], rows, [len(s) for s in samples])
    tokens, _ = denominators(samples)
    total = sum(float(lp[1:][s.mask[1:]].sum(dtype=np.float64)) for lp, s in zip(logprobs, samples, strict=True))
    out = {"val/loss": -total / tokens, "val/tokens": float(tokens)}
    right = [
        bool((lp[form] > _MORE_LIKELY_THAN_NOT).all())
        for lp, calls in zip(logprobs, forms, strict=True)
        for form in calls
    ]
    if right:
        out |= {"val/tool_format_accuracy": float(np.mean(right)), "val/tool_calls": float(len(right))}
    return out


if __name__ == "__main__":
    sys.exit(run_verb("sft"))
