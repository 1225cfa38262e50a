"""What the verbs share on the command line: errors as one message, --recipe, key=value overrides, --dry-run."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from tempfile import TemporaryFile

from rich.console import Console

from aster.config import Recipe, recipe_names
from aster.errors import AsterError, ConfigError


def run_verb(verb: str, argv: Sequence[str] | None = None) -> int:
    """`python -m aster.VERB` and `aster VERB` both come here, so that both fail alike."""
    module = importlib.import_module(f"aster.{verb}")
    try:
        return int(module.main(argv))
    except AsterError as error:
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        console.print(f"[bold red]aster {verb}: {type(error).__name__}[/]:", end=" ")
        console.print(str(error), markup=False)
        return 1
    except KeyboardInterrupt:
        print(f"aster {verb}: interrupted", file=sys.stderr)
        return 130


def parse_recipe(
    verb: str,
    argv: Sequence[str] | None,
    *,
    stage: str,
    about: str,
    default: str,
    options: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
) -> tuple[Recipe, argparse.Namespace]:
    """Read `[--recipe NAME|FILE] [--dry-run] [--explain [KEY]] [key=value ...]`, and what `options` adds for the verb.

    `ConfigError` also for a recipe of another stage. With --explain it prints and exits.
    """
    parser = argparse.ArgumentParser(
        prog=f"aster {verb}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    fitting = ", ".join(name for name in recipe_names() if Recipe.load(name).stage == stage)
    parser.add_argument("--recipe", default=default, help=f"a file, or one of: {fitting} (%(default)s)")
    parser.add_argument(
        "--dry-run", action="store_true", help="print every resolved value and stop; needs nothing else"
    )
    parser.add_argument(
        "--explain",
        nargs="?",
        const="",
        metavar="KEY",
        help="print keys (of rollout, optim.lr), their values and what they mean, and stop",
    )
    options(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example optim.lr=1e-6 run.name=mine")
    args = parser.parse_intermixed_args(argv)  # key=value may stand on either side of an option
    recipe = Recipe.load(args.recipe, args.overrides)
    if args.explain is not None:
        print(explained(recipe, args.explain))
        raise SystemExit(0)
    if recipe.stage != stage:
        raise ConfigError(
            f"aster {verb} runs recipes with stage: {stage}, but {args.recipe!r} has stage: {recipe.stage}; "
            f"use `aster {_VERB_OF[recipe.stage]} --recipe {args.recipe}`"
        )
    return recipe, args


def require_writable(option: str, path: Path, *, directory: bool = False) -> None:
    """Raises `ConfigError` when `path`, given with `option`, cannot become a file (or a directory): before the work."""
    if directory and path.exists() and not path.is_dir():
        raise ConfigError(f"{option} {path} is a file: name the directory to write")
    if not directory and path.is_dir():
        raise ConfigError(f"{option} {path} is a directory: name the file to write")
    above = next(p for p in path.absolute().parents if p.exists())
    if not above.is_dir():
        raise ConfigError(f"{option} {path} cannot be made: {above} is a file")
    if not os.access(path if path.exists() else above, os.W_OK):
        raise ConfigError(f"{option} {path} cannot be written: {path if path.exists() else above} is not writable")
    folder = path if path.is_dir() else above
    try:  # to root everything is writable, /proc and a full disk too
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be written: no file can be made in {folder} ({error})") from None


_VERB_OF = {"rl": "train", "sft": "sft", "eval": "eval"}


def print_resolved(recipe: Recipe) -> None:
    """Every value under its override key, as plain numbers (`optim.lr = 1e-06`), then the derived ones."""
    derived = {"config_hash": recipe.config_hash, "max_model_len": recipe.max_model_len}
    if recipe.stage == "rl":
        derived |= {
            "trajectories_per_step": recipe.trajectories_per_step,
            "updates_per_step": recipe.updates_per_step,
        }
    for key, value in {**recipe.flat(), **derived}.items():
        print(f"{key} = {_plain(value)}")


def explained(recipe: Recipe, key: str = "") -> str:
    """The keys at or below `key` (all: ""), each with its value in `recipe` and the docstring of its field."""
    values = recipe.flat()
    lines = []
    for name in values:
        if f"{name}.".startswith(f"{key}." if key else ""):
            lines.append(f"{name} = {_plain(values[name])}")
            lines += textwrap.wrap(_meaning(recipe, name), 100, initial_indent="    ", subsequent_indent="    ")
    if not lines:
        raise ConfigError(f"--explain {key}: no such key; there are {', '.join({n.split('.')[0]: 0 for n in values})}")
    return "\n".join(lines)


def _meaning(recipe: Recipe, name: str) -> str:
    *sections, field = name.split(".")
    config = reduce(getattr, sections, recipe)
    return type(config).model_fields[field].description or ""


def _plain(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)
