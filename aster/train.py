"""`aster train`: one stage of GRPO, from a model directory to checkpoints.

    aster train --recipe rl_stage1_18k model.path=models/sft 'data.train_files=[data/dapo/train.parquet]'

Started again, it goes on from the newest checkpoint of `run.dir`/`run.name`.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from aster import launch
from aster.checkpoints import DirectoryCheckpointer
from aster.command import parse_recipe, print_resolved, run_verb
from aster.config import Recipe
from aster.data.prompts import PromptStream, read_prompts
from aster.driver import GrpoLoop
from aster.errors import ConfigError
from aster.guard import CollapseGuard
from aster.roles import SandboxFactory
from aster.trace import Tracer
from aster.tracking import Tracker


def main(argv: Sequence[str] | None = None) -> int:
    recipe, args = parse_recipe("train", argv, stage="rl", about=__doc__ or "", default="rl_stage1_18k")
    if args.dry_run:
        print_resolved(recipe)
        return 0
    launch.require_model(recipe)
    with launch.cluster(recipe), launch.sandboxes(recipe) as sandboxes:
        asyncio.run(run(recipe, sandboxes))
    return 0


async def run(recipe: Recipe, sandboxes: SandboxFactory | None) -> None:
    """Train until `run.steps` or the end of the data, resuming from the newest checkpoint of the run directory."""
    if not recipe.data.train_files:
        raise ConfigError(
            "data.train_files is empty: name at least one parquet, e.g. data.train_files=[data/train.parquet]"
        )
    prompts = PromptStream(
        read_prompts(recipe.data.train_files, max_rows=recipe.data.max_rows),
        batch=recipe.rollout.prompts_per_step,
        seed=recipe.data.shuffle_seed,
        epochs=recipe.data.epochs,
    )
    val_rows = read_prompts(recipe.data.val_files, max_rows=recipe.data.val_max_rows) if recipe.data.val_files else []
    steps = recipe.run.steps or prompts.total_steps
    sinks = launch.metric_sinks(recipe)
    with Tracker.open(recipe, total_steps=steps, extra=sinks) as tracker, Tracer.open(recipe) as tracer:
        async with launch.trainer(recipe, sandboxes=sandboxes, total_steps=steps * recipe.updates_per_step) as (
            rollouts,
            learners,
        ):
            await GrpoLoop(
                recipe=recipe,
                learners=tracer.learners(learners),
                pool=tracer.pool(rollouts.pool),
                prompts=prompts,
                log=tracker,
                decode=rollouts.renderer.decode,
                val_rows=val_rows,
                checkpoints=DirectoryCheckpointer(
                    recipe.run.path / "checkpoints",
                    model_path=recipe.model.path,
                    config_hash=recipe.config_hash,
                    keep=recipe.run.keep_checkpoints,
                ),
                guard=CollapseGuard(recipe.collapse, tracker),
                markers=rollouts.renderer.markers,
            ).run()


if __name__ == "__main__":
    sys.exit(run_verb("train"))
