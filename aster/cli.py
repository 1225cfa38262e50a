"""`aster VERB ...`: finds the verb, runs it, and turns our own errors into one readable message."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from aster.command import run_verb

VERBS = {
    "quickstart": "everything on this machine: prepare, SFT, RL stage 1, filter, RL stage 2, merge, eval, report",
    "prepare": "model directory, prompts and cold-start conversations of a task",
    "synthesize": "cold-start conversations from a teacher's trajectories",
    "sft": "cold-start supervised fine-tuning",
    "train": "one stage of GRPO",
    "filter": "drop the prompts that a stage already answers every time",
    "merge": "checkpoint -> Hugging Face directory",
    "eval": "sample a benchmark with the tool and score it",
    "report": "one offline HTML page for one or several runs",
    "replay": "run a trajectory's cells again in a fresh session and compare the outputs",
    "plan": "memory, seconds and sandbox load of a GRPO recipe on GPUs, by arithmetic",
    "doctor": "what this machine has and lacks, each with its cure",
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


def _usage() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {text}" for verb, text in VERBS.items()]
    return "usage: aster VERB [options]      aster VERB --help tells more\n\n" + "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
