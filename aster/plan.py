"""`aster plan`: what a GRPO recipe needs on GPUs: memory per role, seconds of a step, sandbox load, disk.

    aster plan --recipe rl_stage1_18k --gpus 64 --gpu h200 --mean-tokens 10000

Arithmetic alone (aster/planning.py): predictions from data sheets and assumptions that the output names, not
measurements. A recipe that cannot fit is refused with the sum. The model's shape is that of model.path, else the
paper's Qwen3-4B. --gpus N gives N GPUs to each role, which share them when placement is colocated.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from aster.command import parse_recipe, print_resolved, run_verb
from aster.config import Recipe
from aster.errors import ConfigError
from aster.planning import (
    BANDWIDTH_SHARE,
    GB,
    GPUS,
    MFU,
    MODEL_SHARE,
    QWEN3_4B,
    ModelShape,
    Plan,
    Workload,
    make_plan,
)


def main(argv: Sequence[str] | None = None) -> int:
    recipe, args = parse_recipe(
        "plan", argv, stage="rl", about=__doc__ or "", default="rl_stage1_18k", options=_add_options
    )
    if args.mean_tokens is not None and not 0 < args.mean_tokens <= recipe.budget.max_model_len:
        raise ConfigError(
            f"--mean-tokens {args.mean_tokens:g} must lie between 0 and the budget's {recipe.budget.max_model_len}"
        )
    if args.gpus is not None and args.gpus < 1:
        raise ConfigError(f"--gpus {args.gpus}: give at least one")
    if not 0 <= args.calls < math.inf:  # NaN is not either
        raise ConfigError(f"--calls {args.calls:g} must be a number of at least 0")
    if args.dry_run:
        print_resolved(recipe)
        return 0
    work = workload_of(recipe, gpus=args.gpus, mean_tokens=args.mean_tokens, calls=args.calls)
    model = ModelShape.from_config(Path(recipe.model.path) / "config.json") if recipe.model.path else QWEN3_4B
    plan = make_plan(model, GPUS[args.gpu], work)
    console = Console()
    console.print(table_of(plan, work, steps=recipe.run.steps, title=f"{recipe.run.name} on {args.gpu}: predictions"))
    console.print(
        f"Assumed: {work.mean_tokens:g} tokens and {work.calls:g} calls per trajectory, {MODEL_SHARE:.0%} of the "
        f"tokens sampled, {MFU:.0%} of peak FLOP/s in training, {BANDWIDTH_SHARE:.0%} of memory bandwidth in decoding."
    )
    return 0


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100-80", help="(%(default)s)")
    parser.add_argument("--gpus", type=int, help="of each role, instead of rollout.engines and learner.world_size")
    parser.add_argument("--mean-tokens", type=float, help="of a trajectory (0.55 of the budget)")
    parser.add_argument("--calls", type=float, default=12.0, help="per trajectory (%(default)g)")


def workload_of(recipe: Recipe, *, gpus: int | None, mean_tokens: float | None, calls: float) -> Workload:
    """A step of the recipe. `gpus` replaces the numbers of both roles."""
    budget = recipe.budget.max_model_len
    return Workload(
        trajectories=recipe.trajectories_per_step,
        mean_tokens=mean_tokens or 0.55 * budget,
        max_tokens=budget,
        calls=calls,
        engines=gpus or recipe.rollout.engines * recipe.rollout.tensor_parallel,
        learners=gpus or recipe.learner.world_size,
        tensor_parallel=recipe.rollout.tensor_parallel,
        micro_batch_tokens=recipe.learner.micro_batch_tokens // recipe.learner.context_parallel,
        logprob_chunk_tokens=recipe.learner.logprob_chunk_tokens,
        memory_utilization=recipe.rollout.gpu_memory_utilization,
        max_num_seqs=recipe.rollout.max_num_seqs,
        compute_bytes=4 if recipe.model.compute_dtype == "float32" else 2,
        checkpointing=recipe.model.gradient_checkpointing,
        fused=recipe.model.liger,
        offload_optimizer=recipe.learner.offload_optimizer,
        proximal_pass=recipe.algo.proximal_pass,
        reference_pass=recipe.algo.kl_coef > 0,
        lora_rank=recipe.lora.rank,
        lora_targets=recipe.lora.targets,
        keep_checkpoints=recipe.run.keep_checkpoints,
    )


def table_of(plan: Plan, work: Workload, *, steps: int | None, title: str) -> Table:
    """Every figure of the plan with its unit."""
    table = Table(title=title)
    for column in ("what", "predicted"):
        table.add_column(column)
    for role, parts in (("learner", plan.learner_memory), ("engine", plan.engine_memory)):
        for name, value in parts.items():
            table.add_row(f"{role}, GB per GPU: {name}", f"{value / GB:.2f}")
        table.add_row(f"{role}, GB per GPU: sum", f"{sum(parts.values()) / GB:.2f}", end_section=True)
    for name, text in (
        ("GPUs: engines, learners", f"{work.engines}, {work.learners}"),
        ("sequences per engine at once, mean length", f"{plan.sequences:.0f}"),
        ("sequences per engine at once, full length", f"{plan.full_sequences:.0f}"),
        ("tokens per step", f"{plan.tokens / 1e6:.1f} M"),
        ("sampling, s", f"{plan.decode_s:.0f} (a full-length trajectory alone: {plan.tail_s:.0f})"),
        ("pi_old, s", f"{plan.proximal_s:.1f}"),
        *([("reference model, s", f"{plan.reference_s:.1f}")] if work.reference_pass else []),
        ("update, s", f"{plan.update_s:.1f}"),
        ("weight publication, s", f"{plan.sync_s:.2f}"),
        ("step, s", f"{plan.step_s:.0f}"),
        *([("run, days", f"{steps * plan.step_s / 86400:.1f}")] if steps else []),
        ("sandbox sessions", f"{plan.sessions}"),
        ("sandbox calls per s, mean and to plan for", f"{plan.calls_per_s:.0f}, {plan.peak_calls_per_s:.0f}"),
        ("sandbox memory if nothing is shared, GB", f"{plan.session_memory / GB:.0f}"),
        ("disk: checkpoints, GB", f"{plan.disk_checkpoints / GB:.0f}"),
        ("disk: per step, MB", f"{plan.disk_per_step / 1e6:.0f}"),
    ):
        table.add_row(name, text)
    return table


if __name__ == "__main__":
    sys.exit(run_verb("plan"))
