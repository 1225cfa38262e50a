"""`aster merge`: a checkpoint of a run becomes a Hugging Face directory that transformers and vLLM load.

    aster merge --local-dir runs/rl_stage1_18k --target-dir models/stage1
    aster merge --local-dir runs/rl_stage1_18k/checkpoints/global_step_405 --target-dir models/stage1
    aster merge --backend fsdp --local-dir OTHER/global_step_405/actor --target-dir models/stage1

The third line reads a checkpoint of the reference implementation: model_world_size_W_rank_R.pt of every rank, with
huggingface/ beside them. Which of the two layouts a directory has is seen from its files. The reference's spellings,
--local_dir and --target_dir, are taken too.

Tokenizer, chat template and generation config come along; a tied head is written once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from aster import launch
from aster.checkpoints import newest, read_state
from aster.command import run_verb
from aster.errors import DataError


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="aster merge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--local-dir", "--local_dir", required=True, help="a run directory (its newest checkpoint) or a global_step_N"
    )
    parser.add_argument(
        "--backend", choices=("fsdp",), default="fsdp", help="the reference's flag: fsdp is the one kind there is"
    )
    parser.add_argument(
        "--target-dir", "--target_dir", required=True, help="the model directory to write; replaced when it exists"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the weights (%(default)s)"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be merged and stop")
    args = parser.parse_args(argv)
    if args.dry_run:
        print(f"local_dir = {args.local_dir}\ntarget_dir = {args.target_dir}\ndtype = {args.dtype}")
        return 0
    checkpoint = merge(args.local_dir, args.target_dir, dtype=args.dtype)
    print(f"{checkpoint} -> {args.target_dir}")
    return 0


def merge(local_dir: str | Path, target_dir: str | Path, *, dtype: str) -> Path:
    """Returns the checkpoint that was merged. Raises `DataError` when `local_dir` holds none."""
    path = Path(local_dir)
    Path(target_dir).parent.mkdir(parents=True, exist_ok=True)
    for reference in (path, path / "actor"):
        if any(reference.glob("model_world_size_*_rank_*.pt")):
            launch.merge_reference(str(reference), str(target_dir), dtype=dtype)
            return reference
    if not (path / "driver.json").is_file():
        found = newest(path / "checkpoints")
        if found is None:
            raise DataError(
                f"{path} is neither a checkpoint (no driver.json, no model_world_size_W_rank_R.pt) nor a run with one "
                f"under {path / 'checkpoints'}"
            )
        path = found
    read_state(path)
    launch.merge_checkpoint(str(path / "actor"), str(target_dir), source=str(path / "huggingface"), dtype=dtype)
    return path


if __name__ == "__main__":
    sys.exit(run_verb("merge"))
