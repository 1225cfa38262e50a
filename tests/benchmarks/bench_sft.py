"""How fast SFT goes through conversations, packed into rows and one by one. Prints one JSON line.

    make bench-sft                                                   generated conversations, the CPU recipes' model
    make bench-sft ARGS="--conversations talks.jsonl"                a file in any format that `aster sft` reads
    make bench-sft ARGS="--model MODEL --row-tokens 32768 --dtype bfloat16"        a model directory, one GPU

One learner rank trains on the same batches twice: packed into rows of `--row-tokens`, and with every conversation as
a row of its own. `*_tokens_per_s` counts the conversations' tokens over wall time, optimizer steps included, the best
of `--repeats` passes after a warm-up. `render_tokens_per_s`: reading and tokenising, before any training.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from actors.fsdp import DTYPES
from actors.learner import Learner
from aster.agent.chat import ChatRenderer
from aster.agent.tokenization import ChatTemplate
from aster.algo.packing import denominators, pack
from aster.config import Recipe
from aster.data.base_corpus import base_conversations
from aster.data.conversations import Messages, read_conversations, to_samples, write_conversations
from aster.data.templates import STATIC_TEMPLATE
from aster.prepare import write_tiny_model
from aster.sft import epoch_batches
from aster.types import Sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", help="a file of conversations (default: generated)")
    parser.add_argument("--model", help="a model directory (default: the quickstart's, tokenizer from this text)")
    parser.add_argument("--row-tokens", type=int, default=4096, help="most tokens of a packed row (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="conversations per optimizer step (%(default)s)")
    parser.add_argument("--batches", type=int, default=4, help="optimizer steps that are timed (%(default)s)")
    parser.add_argument("--max-length", type=int, default=32768, help="longer conversations are dropped (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(args, Path(folder))))


def measure(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    file = args.conversations
    if file is None:
        file = folder / "generated.parquet"
        write_conversations(file, base_conversations(echoes=0, drills=512, seed=0))
    model = args.model or tiny_model(folder / "model", read_conversations([file]))
    recipe = Recipe.load(
        "cpu_sft",
        [
            f"model.path={model}",
            f"model.compute_dtype={args.dtype}",
            f"learner.micro_batch_tokens={args.row_tokens}",
            f"sft.batch_size={args.batch_size}",
            "sft.batch_tokens=null",
        ],
    )
    began = time.perf_counter()
    conversations = read_conversations([file])
    samples, dropped = to_samples(conversations, ChatRenderer.from_model_dir(model), max_length=args.max_length)
    rendering = time.perf_counter() - began
    batches = epoch_batches(samples, recipe.sft, epoch=0)[: args.batches]
    learner = Learner(recipe, model_path=str(model), total_steps=1000)
    tokens = sum(len(s) for batch in batches for s in batch)
    packed, rows = passes(learner, batches, args.row_tokens, args.repeats)
    unpacked, _ = passes(learner, batches, 1, args.repeats)
    learner.close()
    return {
        "device": torch.cuda.get_device_name() if learner.device.type == "cuda" else "cpu",
        "model": args.model or "quickstart",
        "dtype": args.dtype,
        "conversations": len(conversations),
        "dropped_too_long": dropped,
        "mean_length": round(sum(map(len, samples)) / len(samples), 1),
        "trained_share": round(sum(int(s.mask.sum()) for s in samples) / sum(map(len, samples)), 3),
        "render_tokens_per_s": round(sum(map(len, samples)) / rendering, 1),
        "timed_tokens": tokens,
        "timed_conversations": sum(map(len, batches)),
        "rows": rows,
        "packed_tokens_per_s": round(tokens / packed, 1),
        "unpacked_tokens_per_s": round(tokens / unpacked, 1),
        "ratio": round(unpacked / packed, 2),
    }


def passes(learner: Learner, batches: Sequence[Sequence[Sample]], row_tokens: int, repeats: int) -> tuple[float, int]:
    """(best seconds of a pass over the batches, rows in it); `row_tokens=1` gives every conversation its own row."""
    seconds, rows = [], 0
    for _ in range(repeats + 1):
        rows = 0
        began = time.perf_counter()
        for batch in batches:
            tokens, groups = denominators(batch)
            for [row] in pack(batch, row_tokens=row_tokens, dp_size=1):
                learner.forward_backward(row, num_loss_tokens=tokens, num_groups=groups)
                rows += 1
            learner.optim_step()
        if learner.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:]), rows


def tiny_model(path: Path, conversations: Sequence[Messages]) -> Path:
    """The quickstart's model with random weights; its tokenizer has seen the first of these conversations."""
    template = ChatTemplate(STATIC_TEMPLATE, special_tokens={})
    texts = [template.render(list(c), tools=None, add_generation_prompt=False) for c in conversations[:400]]
    write_tiny_model(path, texts, seed=0)
    return path


if __name__ == "__main__":
    main()
