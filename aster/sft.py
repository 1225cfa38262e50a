"""`aster sft`: supervised fine-tuning on conversations, loss on what the sampler would emit.

aster sft --recipe sft model.path=models/base data.train_files=[data/sft.parquet]
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence

import numpy as np

from aster import launch, metrics
from aster.agent.chat import ChatRenderer
from aster.algo.packing import denominators, pack
from aster.checkpoints import DirectoryCheckpointer, finishing
from aster.command import parse_recipe, print_resolved, run_verb
from aster.config import Recipe, SftConfig
from aster.data.conversations import read_conversations, to_samples
from aster.errors import ConfigError, DataError
from aster.roles import LearnerGroup
from aster.tracking import Tracker
from aster.types import OptimStats, Sample, StepStats


def main(argv: Sequence[str] | None = None) -> int:
    recipe, args = parse_recipe("sft", argv, stage="sft", about=__doc__ or "", default="sft")
    if args.dry_run:
        print_resolved(recipe)
        return 0
    launch.require_model(recipe)
    with launch.cluster(recipe):
        asyncio.run(run(recipe))
    return 0


async def run(recipe: Recipe) -> None:
    """Train for `data.epochs` or `run.steps`, resuming from the newest checkpoint of the run directory."""
    if not recipe.data.train_files:
        raise ConfigError("data.train_files is empty: name at least one parquet of conversations")
    renderer = ChatRenderer.from_model_dir(recipe.model.path)
    conversations = read_conversations(recipe.data.train_files)
    samples, dropped = to_samples(
        conversations, renderer, max_length=recipe.sft.max_length, train_on_newline=recipe.sft.train_on_newline
    )
    if not samples:
        raise DataError(f"all {dropped} conversations are longer than sft.max_length={recipe.sft.max_length} tokens")
    plan = [b for epoch in range(recipe.data.epochs) for b in epoch_batches(samples, recipe.sft, epoch=epoch)]
    steps = min(recipe.run.steps or len(plan), len(plan))
    checkpoints = DirectoryCheckpointer(
        recipe.run.path / "checkpoints",
        model_path=recipe.model.path,
        config_hash=recipe.config_hash,
        keep=recipe.run.keep_checkpoints,
    )
    with Tracker.open(recipe, total_steps=steps) as tracker:
        async with launch.learners(recipe, total_steps=steps) as learners, finishing(checkpoints):
            step = 0
            if not recipe.run.resume:
                checkpoints.set_aside()
            path = checkpoints.latest()
            if path is not None:
                step = int(str((await checkpoints.restore(path, learners))["step"]))
            for batch in plan[step:steps]:
                step += 1
                began = time.monotonic()
                stats, optim = await update(learners, batch, row_tokens=recipe.learner.micro_batch_tokens)
                seconds = time.monotonic() - began
                tokens = sum(len(s) for s in batch)
                tracker.log(
                    step,
                    metrics.update_metrics([stats], [optim])
                    | {
                        "train/loss": stats.loss,
                        "data/dropped_too_long": float(dropped),
                        "perf/total_num_tokens": float(tokens),
                        "perf/throughput": tokens / seconds,
                        "timing_s/step": seconds,
                        "training/global_step": float(step),
                    },
                )
                if step % recipe.run.save_every == 0 or step == steps:
                    await checkpoints.save(step, learners, {})


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


if __name__ == "__main__":
    sys.exit(run_verb("sft"))
