"""`aster filter`: between two RL stages, drop the prompts that the model already always solves.

    aster filter --dataset data/dapo.parquet --rollout-dir runs/stage1/rollout_data --step-min 271 --step-max 405 \\
        --output data/stage2.parquet --plot

Each dataset row gets the mean accuracy of its rollouts; rows at or above the threshold go, all-wrong rows stay unless
--accuracy-min or --drop-all-wrong say otherwise.
Rollouts name their row (`row_id`); the reference's own files do not, and are joined by the exact text of the prompt,
where rows with the same text share its rollouts. So are those whose row_id is here that of another problem: files that
number their rows from 0 share their ids. A row without rollouts is kept, its accuracy null. The same input
always gives the same file. Rollouts are streamed: memory grows with the number of prompts, not of rollouts.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aster.command import require_writable, run_verb
from aster.data.card import ACCURACY_COLUMN, language
from aster.data.prompts import read_prompts
from aster.data.rollouts import accuracy_of, read_rows, rollout_files
from aster.errors import ConfigError, DataError
from aster.types import PromptRow

THRESHOLD = 0.99999  # the reference's: below 1, so that a mean of ones with rounding error still counts as 1

_TURN_END = re.compile(r"(?:<\|im_end\|>)?\n(?:<\|im_start\|>)?assistant\n(?:<think>\n+(?:</think>\n+)?)?\Z")
_USER = "user\n"


@dataclass(frozen=True)
class Bounds:
    """Which rows stay, by their mean accuracy. A row that was never judged always stays."""

    below: float = THRESHOLD
    least: float = 0.0
    drop_all_wrong: bool = False

    def keep(self, accuracy: np.ndarray) -> np.ndarray:
        """[rows] bool. NaN compares false with everything, and so is kept."""
        keep = ~(accuracy >= self.below) & ~(accuracy < self.least)
        return keep & ~(accuracy == 0.0) if self.drop_all_wrong else keep


@dataclass(frozen=True)
class Seen:
    """Rollouts of one prompt in one file: `correct` of `judged` were right; `lost` were our failures, not judged."""

    row_id: str | None
    text: str  # the rendered prompt; what the join falls back to
    judged: int
    correct: float
    lost: int


@dataclass(frozen=True)
class Accuracies:
    """One entry per dataset row; NaN where it was never judged."""

    accuracy: np.ndarray  # [rows] float64
    responses: np.ndarray  # [rows] int64
    samples: int  # rollouts of a prompt per step, the most frequent number
    files: int
    joined_by_id: int
    joined_by_text: int
    unmatched: int
    misnamed: int
    lost: int

    def counts(self, bounds: Bounds) -> dict[str, int]:
        seen = ~np.isnan(self.accuracy)
        keep = bounds.keep(self.accuracy)
        solved = self.accuracy >= bounds.below
        return {
            "rows": len(self.accuracy),
            "kept": int(keep.sum()),
            "dropped_all_correct": int(solved.sum()),
            "dropped_too_hard": int((~keep & ~solved).sum()),
            "kept_all_wrong": int((keep & (self.accuracy == 0)).sum()),
            "kept_never_rolled_out": int((~seen).sum()),
            "rollouts_joined_by_row_id": self.joined_by_id,
            "rollouts_joined_by_text": self.joined_by_text,
            "rollouts_of_no_row": self.unmatched,
            "rollouts_with_a_row_id_of_another": self.misnamed,
            "rollouts_lost_to_infrastructure": self.lost,
        }


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    bounds = Bounds(args.threshold, args.accuracy_min, args.drop_all_wrong)
    if not bounds.least < bounds.below:  # NaN is no bound either
        raise ConfigError(f"--accuracy-min {bounds.least} is not below --threshold {bounds.below}: nothing would stay")
    if args.output.resolve() == args.dataset.resolve():
        raise ConfigError(f"--output {args.output} is the dataset itself: name another file")
    if not args.dataset.is_file():
        what = "is a directory" if args.dataset.is_dir() else "does not exist"
        raise DataError(f"--dataset {args.dataset} {what}: name the parquet that was trained on")
    if args.samples is not None and args.samples < 1:
        raise ConfigError(f"--samples {args.samples} must be at least 1")
    plot = args.plot_output or args.output.with_name(f"{args.output.stem}_distribution.png")
    require_writable("--output", args.output)
    if args.plot or args.plot_output:
        require_writable("--plot-output", plot)
        if plot.suffix != ".png":
            raise ConfigError(f"--plot-output {plot} must end in .png")
    files = _files(args.rollout_dir, args.step_min, args.step_max)
    print(f"{len(files)} rollout files, steps {files[0][0]} to {files[-1][0]}, dataset {args.dataset}")
    if args.dry_run:
        return 0
    rows = read_prompts([str(args.dataset)])
    result = accuracies(rows, [path for _, path in files], processes=args.threads, samples=args.samples)
    column = f"acc_mean@{result.samples}"
    for name, count in result.counts(bounds).items():
        print(f"{name:34}{count:10,}")
    write_filtered(args.dataset, args.output, result, bounds=bounds)
    kept = bounds.keep(result.accuracy)
    print(f"{'mean ' + column + ' before':34}{_mean(result.accuracy):10.4f}")
    print(f"{'mean ' + column + ' after':34}{_mean(result.accuracy[kept]):10.4f}")
    print("\n".join(breakdown(rows, result.accuracy, kept)))
    print(args.output)
    if args.plot or args.plot_output:
        plot_distribution(result, plot, bounds=bounds)
        print(plot)
    return 0


def _files(folder: Path, step_min: int | None, step_max: int | None) -> list[tuple[int, Path]]:
    """`(step, path)` of the rollout files of these steps. DataError, with what there is, when there is none."""
    files = rollout_files(folder, step_min=step_min, step_max=step_max)
    if files:
        return files
    steps = [step for step, _ in rollout_files(folder)]
    wanted = f"steps {'first' if step_min is None else step_min} to {'last' if step_max is None else step_max}"
    has = f"it has steps {steps[0]} to {steps[-1]}" if steps else "it has no STEP.jsonl at all"
    inside = folder / "rollout_data"
    cure = f"; give --rollout-dir {inside}" if not steps and inside.is_dir() else ""
    raise DataError(f"--rollout-dir {folder} has no file for {wanted}: {has}{cure}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="aster filter", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", type=Path, required=True, help="the parquet that was trained on")
    parser.add_argument("--rollout-dir", type=Path, required=True, help="folder with its STEP.jsonl files")
    parser.add_argument("--output", type=Path, required=True, help="the parquet to write")
    parser.add_argument("--step-min", type=int, help="first step to count (the first there is)")
    parser.add_argument("--step-max", type=int, help="last step to count, included (the last there is)")
    parser.add_argument(
        "--threshold", type=float, default=THRESHOLD, help="drop at or above (%(default)s; 2 keeps all)"
    )
    parser.add_argument("--accuracy-min", type=float, default=0.0, help="drop below (%(default)s)")
    parser.add_argument("--drop-all-wrong", action="store_true", help="drop rows that no rollout solved")
    parser.add_argument("--samples", type=int, help="N of the column acc_mean@N (what most prompts have per step)")
    parser.add_argument("--plot", action="store_true", help="write a histogram next to the output")
    parser.add_argument("--plot-output", type=Path, help="where to write the histogram; implies --plot")
    parser.add_argument("--threads", type=int, default=1, help="files read at once, each in a process (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="say which files would be read, then stop")
    return parser


# joining -------------------------------------------------------------------------------------------------------------


def accuracies(
    rows: Sequence[PromptRow], files: Sequence[Path], *, processes: int = 1, samples: int | None = None
) -> Accuracies:
    """Mean accuracy per row over all rollouts in `files`. Raises DataError when nothing of them belongs to `rows`."""
    by_id = {row.row_id: index for index, row in enumerate(rows)}
    texts = [_last_user(row.messages) for row in rows]
    by_text: dict[str, list[int]] = defaultdict(list)
    for index, text in enumerate(texts):
        by_text[text].append(index)
    correct, judged = np.zeros(len(rows)), np.zeros(len(rows), dtype=np.int64)
    per_step: Counter[int] = Counter()
    joined: Counter[str] = Counter()
    misnamed = lost = 0
    for seen in _tally_all(files, processes):
        how, indices = _join(seen, texts, by_id, by_text)
        total = seen.judged + seen.lost
        joined[how] += total
        misnamed += total if how != "row_id" and seen.row_id in by_id else 0
        lost += seen.lost
        per_step[total] += 1
        for index in indices:
            correct[index] += seen.correct
            judged[index] += seen.judged
    if not per_step:
        raise DataError(f"the {len(files)} rollout files hold no rollout: were they written by a run that was killed?")
    if not joined["row_id"] + joined["text"]:
        raise DataError(
            f"none of the {joined['none']} rollouts in {len(files)} files belongs to a row of the dataset, neither by "
            "row_id nor by prompt text: these rollouts come from another dataset"
        )
    with np.errstate(invalid="ignore"):
        accuracy = np.where(judged > 0, correct / judged, np.nan)
    usual = max(per_step, key=lambda n: (per_step[n], -n))
    return Accuracies(
        accuracy,
        judged,
        samples=samples or usual,
        files=len(files),
        joined_by_id=joined["row_id"],
        joined_by_text=joined["text"],
        unmatched=joined["none"],
        misnamed=misnamed,
        lost=lost,
    )


def _join(
    seen: Seen, texts: Sequence[str], by_id: Mapping[str, int], by_text: Mapping[str, list[int]]
) -> tuple[Literal["row_id", "text", "none"], Sequence[int]]:
    """How the rollouts of `seen` find their rows, and which. An id counts where the prompt does not say otherwise."""
    index = by_id.get(seen.row_id) if seen.row_id is not None else None
    if index is not None and (not seen.text or texts[index].strip() in seen.text):
        return "row_id", [index]
    found = _rows_with_text(seen.text, by_text)
    return ("text", found) if found else ("none", [])


def _tally_all(files: Sequence[Path], processes: int) -> Iterable[Seen]:
    """In file order whatever `processes` is, so that sums of floats do not depend on it."""
    if processes < 1:
        raise ConfigError(f"--threads {processes} must be at least 1")
    if processes == 1 or len(files) == 1:
        for path in files:
            yield from tally(path)
        return
    with ProcessPoolExecutor(min(processes, len(files)), mp_context=multiprocessing.get_context("spawn")) as pool:
        for found in pool.map(tally, files):
            yield from found


def tally(path: Path) -> list[Seen]:
    """The prompts of one rollout file, in order of appearance."""
    sums: dict[tuple[str | None, str], list[float]] = {}
    for number, row in enumerate(read_rows(path), 1):
        row_id, text = row.get("row_id"), row.get("input")
        if isinstance(row_id, bool) or not isinstance(row_id, str | int | float | None):
            raise DataError(f"{path}, row {number}: row_id must be text or a number, got {row_id!r:.80}")
        if not isinstance(text, str | None):
            raise DataError(f"{path}, row {number}: input must be text, got {text!r:.80}")
        if row_id is None and text is None:
            raise DataError(f"{path}, row {number} has neither row_id nor input: is this a rollout file?")
        if "acc" not in row and "score" not in row:
            raise DataError(f"{path}, row {number} has neither acc nor score: is this a rollout file?")
        # as text, as the dataset's ids are
        entry = sums.setdefault((None if row_id is None else str(row_id), text or ""), [0, 0.0, 0])
        given = row.get("acc") if row.get("acc") is not None else row.get("score")
        accuracy = accuracy_of(given, where=f"{path}, row {number}")
        if accuracy is None:
            entry[2] += 1
        else:
            entry[0] += 1
            entry[1] += accuracy
    return [Seen(i, text, int(n), correct, int(lost)) for (i, text), (n, correct, lost) in sums.items()]


def _last_user(messages: Sequence[Mapping[str, str]]) -> str:
    return next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")


def _rows_with_text(text: str, by_text: Mapping[str, list[int]]) -> list[int] | None:
    """Rows whose problem is exactly what stands in the rendered prompt between a "user" line and the end of the turn.

    The problem itself may contain such lines, so every "user" line is tried, the longest problem first.
    """
    end = _TURN_END.search(text)
    if end is None:
        return None
    body = text[: end.start()]
    at = body.find(_USER)
    while at >= 0:
        rows = by_text.get(body[at + len(_USER) :])
        if rows:
            return rows
        at = body.find(_USER, at + 1)
    return None


# writing -------------------------------------------------------------------------------------------------------------


def write_filtered(dataset: Path, output: Path, result: Accuracies, *, bounds: Bounds) -> None:
    """The kept rows with all their columns, then acc_mean@N and response_count (float, as in the published file).

    An accuracy of another N goes: response_count would no longer be its own.
    """
    table = pq.read_table(dataset)
    keep = bounds.keep(result.accuracy)
    if not keep.any():
        raise DataError(
            f"all {len(keep)} rows were judged and none has an accuracy of at least {bounds.least:g} and below "
            f"{bounds.below:g}: there is nothing left to train on"
        )
    seen = ~np.isnan(result.accuracy)
    ours = f"acc_mean@{result.samples}"
    table = table.drop_columns([n for n in table.column_names if ACCURACY_COLUMN.match(n) and n != ours])
    for name, values in (
        (ours, result.accuracy),
        ("response_count", result.responses.astype(np.float64)),
    ):
        column = pa.array(values, pa.float64(), mask=~seen)
        if name in table.column_names:  # the dataset was filtered before
            table = table.set_column(table.column_names.index(name), name, column)
        else:
            table = table.append_column(name, column)
    # pandas and Hugging Face metadata describe the unfiltered table; readers rebuild both from the schema
    about = json.dumps({"threshold": bounds.below, "files": result.files, **result.counts(bounds)})
    table = table.filter(pa.array(keep)).replace_schema_metadata({"aster_filter": about})
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    pq.write_table(table, partial)
    partial.replace(output)


def plot_distribution(result: Accuracies, path: Path, *, bounds: Bounds) -> None:
    """Histogram of accuracy over the dataset's rows: what stays, and what goes. A row that has had several times N
    rollouts counts with its accuracy rounded down, so that only what was always solved stands at N of N."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    n = result.samples
    accuracy = result.accuracy[~np.isnan(result.accuracy)]
    right = np.floor(accuracy * n + 1e-9).astype(np.int64)
    keep = bounds.keep(accuracy)
    kept, dropped = (np.bincount(right[mask], minlength=n + 1) for mask in (keep, ~keep))
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.bar(range(n + 1), kept, color="#3b6fd4", label=f"kept ({int(keep.sum()):,})")
    top = axes.bar(range(n + 1), dropped, bottom=kept, color="#c9ccd3", label=f"dropped ({int((~keep).sum()):,})")
    if n <= 16:
        axes.set_xticks(range(n + 1))
        axes.bar_label(top, [f"{total:,}" if total else "" for total in kept + dropped], padding=2, fontsize=9)
    axes.set(xlabel=f"right of {n} rollouts (mean over the steps, rounded down)", ylabel="dataset rows")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.margins(y=0.12)
    unseen = int(np.isnan(result.accuracy).sum())
    axes.set_title(f"{len(result.accuracy):,} rows; {unseen:,} never rolled out are kept and not shown", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def breakdown(rows: Sequence[PromptRow], accuracy: np.ndarray, keep: np.ndarray) -> list[str]:
    """Lines of a table: judged rows, mean accuracy and the share that stays, by language and by quarter of length."""
    lengths = np.array([len(_last_user(row.messages)) for row in rows])
    quarters = np.quantile(lengths, (0.25, 0.5, 0.75))
    which = np.searchsorted(quarters, lengths, side="left")
    languages = np.array([language(_last_user(row.messages)) for row in rows])
    masks = {name: languages == name for name in sorted(set(languages))}
    edges = [int(lengths.min()) - 1, *map(int, quarters), int(lengths.max())]
    masks |= {f"{edges[q] + 1} to {edges[q + 1]} characters": which == q for q in range(4)}
    lines = [f"{'':34}{'judged':>10}{'accuracy':>10}{'kept':>10}"]
    for name, mask in masks.items():
        judged = mask & ~np.isnan(accuracy)
        if judged.any():
            lines.append(f"{name:34}{judged.sum():10,}{accuracy[judged].mean():10.4f}{keep[judged].mean():10.1%}")
    return lines


def _mean(values: np.ndarray) -> float:
    seen = values[~np.isnan(values)]
    return float(seen.mean()) if len(seen) else float("nan")


if __name__ == "__main__":
    sys.exit(run_verb("filter"))
