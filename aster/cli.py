"""`aster VERB ...`: finds the verb, runs it, and turns our own errors into one readable message."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from rich.console import Console

from aster.errors import AsterError

VERBS = {
    "quickstart": "everything on this machine: prepare, SFT, RL stage 1, filter, RL stage 2, merge, eval, report",
    "prepare": "model directory, prompts and cold-start conversations of a task",
    "sft": "cold-start supervised fine-tuning",
    "train": "GRPO",
    "filter": "drop the prompts that a stage already answers every time",
    "merge": "checkpoint -> Hugging Face directory",
    "eval": "sample a benchmark with the tool and score it",
    "report": "one offline HTML page for one or several runs",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Exit status: 0 done, 1 our error (explained), 2 wrong usage, 130 interrupted."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in {"-h", "--help", "help"}:
        print(_usage())
        return 0 if args else 2
    verb, *rest = args
    if verb not in VERBS:
        print(f"aster: no verb {verb!r}\n\n{_usage()}", file=sys.stderr)
        return 2
    return run_verb(verb, rest)


def run_verb(verb: str, argv: Sequence[str] | None = None) -> int:
    """`python -m aster.VERB` and `aster VERB` both come here, so that both fail alike."""
    module = importlib.import_module(f"aster.{verb}")
    try:
        return int(module.main(argv))
    except AsterError as error:
        Console(stderr=True).print(f"[bold red]aster {verb}: {type(error).__name__}[/]: ", end="")
        Console(stderr=True, highlight=False, markup=False).print(str(error))
        return 1
    except KeyboardInterrupt:
        print(f"aster {verb}: interrupted", file=sys.stderr)
        return 130


def _usage() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {text}" for verb, text in VERBS.items()]
    return "usage: aster VERB [options]      aster VERB --help tells more\n\n" + "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
