import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from aster.config import Recipe
from aster.data.evaluations import (
    Parts,
    compare,
    disagreements,
    files_hash,
    fingerprint,
    joined,
    look_at,
    read_scores,
)
from aster.errors import ConfigError, DataError
from aster.types import Cause, TrajectoryGroup, Verdicts
from tests.fakes import row, trajectory, work

MADE_OF = {"weights": "w", "data": "d", "settings": "s"}


def group(index: int, *rewards: float | None) -> TrajectoryGroup:
    request = work(row(index))
    done = tuple(
        trajectory(
            request, i, version=0, reward=reward, cause=Cause.ANSWERED if reward is not None else Cause.SANDBOX_LOST
        )
        for i, reward in enumerate(rewards)
    )
    return TrajectoryGroup(request.row, 1, done, kind="val")


def test_finished_problems_come_back_and_those_cut_short_by_us_do_not(tmp_path: Path) -> None:
    rows = [row(0), row(1), row(2)]
    parts = Parts(tmp_path / "parts", rows, made_of=MADE_OF, resume=True)
    parts.add(group(0, 1.0, 0.0), round_=0)
    parts.add(group(1, 1.0, None), round_=0)
    again = Parts(tmp_path / "parts", rows, made_of=MADE_OF, resume=True).read(round_=0, step=7)
    assert list(again) == ["row-0"]
    back, before = again["row-0"], group(0, 1.0, 0.0)
    assert (back.step, back.kind, back.row) == (7, "val", before.row)
    for one, two in zip(back.trajectories, before.trajectories, strict=True):
        assert (one.uid, one.reward, one.verdicts) == (two.uid, two.reward, two.verdicts)
        assert np.array_equal(one.ids, two.ids)
    assert parts.read(round_=1, step=7) == {}


def test_parts_of_other_weights_are_never_mixed_in(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    Parts(folder, [row(0)], made_of=MADE_OF, resume=True).add(group(0, 1.0), round_=0)
    other = MADE_OF | {"weights": "others"}
    with pytest.raises(ConfigError, match=r"other weights.*run\.name.*run\.resume=false"):
        Parts(folder, [row(0)], made_of=other, resume=True)
    fresh = Parts(folder, [row(0)], made_of=other, resume=False)
    assert fresh.read(round_=0, step=0) == {}
    fresh.remove()
    assert not folder.exists()


def test_rounds_become_one_group_with_samples_numbered_on() -> None:
    first, second = group(0, 1.0, 0.0), group(0, 1.0)
    second = replace(second, trajectories=(replace(second.trajectories[0], uid="val/1/row-0~2/0"),))
    (both,) = joined([{"row-0": first}, {"row-0": second}], [row(0)])
    assert [t.sample for t in both.trajectories] == [0, 1, 2]
    assert [t.reward for t in both.trajectories] == [1.0, 0.0, 1.0]
    assert [t.uid.rpartition("/")[2] for t in both.trajectories] == ["0", "1", "2"]
    assert both.trajectories[2].uid == "val/1/row-0/2"


def test_a_hash_follows_names_and_contents(tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / "sub").mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "sub" / "weights").write_text("abc")
    before = files_hash([model])
    assert files_hash([model]) == before
    (model.rename(tmp_path / "moved") / "sub" / "weights").write_text("abc")
    assert files_hash([tmp_path / "moved"]) == before, "where it lies does not matter"
    (tmp_path / "moved" / "sub" / "weights").write_text("abd")
    assert files_hash([tmp_path / "moved"]) != before


def test_the_fingerprint_follows_what_a_score_depends_on_and_nothing_else(tmp_path: Path) -> None:
    data = tmp_path / "x.parquet"
    data.write_bytes(b"rows")

    def of(*overrides: str) -> dict[str, str]:
        recipe = Recipe.load("cpu_eval", [f"data.val_files=[{data}]", *overrides])
        return fingerprint(recipe, weights="w", rounds=[4])

    base = of()
    assert of("run.name=other", "rollout.engines=2", "sandbox.max_sessions=9") == base
    for change in ("eval.preset=paper", "tool.enabled=false", "run.seed=99", "budget.max_tool_calls=3"):
        assert of(change)["settings"] != base["settings"], change
    data.write_bytes(b"other rows")
    assert of()["data"] != base["data"]


def write_rows(path: Path, *rows: tuple[str, str, bool | None]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"data_source": s, "row_id": r, "acc": acc}) for s, r, acc in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_scores_are_of_the_newest_step_and_leave_out_what_we_lost(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "val_rollout_data"
    old = write_rows(folder / "0.jsonl", ("aime", "r1", False))
    write_rows(folder / "10.jsonl", ("aime", "r1", True), ("aime", "r1", None), ("hmmt", "r2", False))
    expected = {"aime": {"r1": [1.0]}, "hmmt": {"r2": [0.0]}}
    assert read_scores(tmp_path / "run") == read_scores(folder) == expected
    assert read_scores(old) == {"aime": {"r1": [0.0]}}
    with pytest.raises(DataError, match="does not exist"):
        read_scores(tmp_path / "nowhere")
    for acc in ("yes", [1], 5, float("nan")):
        odd = write_rows(tmp_path / "3.jsonl", ("aime", "r1", True), ("aime", "r1", acc))
        with pytest.raises(DataError, match=r"3\.jsonl, row 2: acc \(or score\) must be true, false or a number"):
            read_scores(odd)
    anonymous = tmp_path / "0.jsonl"
    anonymous.write_text('{"data_source": "aime", "acc": true}\n')
    with pytest.raises(DataError, match="without row_id"):
        read_scores(anonymous)


def test_a_comparison_takes_the_shared_problems_only() -> None:
    a = {"aime": {"r1": [1.0, 0.0], "r2": [0.0, 0.0], "gone": [1.0]}}
    b = {"aime": {"r1": [1.0, 1.0], "r2": [0.0, 1.0], "new": [0.0]}}
    difference = compare(a, b)["aime"]
    assert (difference.mean, difference.problems) == (0.5, 2)
    with pytest.raises(DataError, match="share no problem"):
        compare(a, {"aime": {"x": [1.0]}})


def test_a_look_waits_for_the_second_sample_and_pools_the_sources() -> None:
    a = {"aime": {"r1": [0.0] * 16}, "hmmt": {"r2": [0.0] * 16}}
    assert look_at(a, {"aime": {"r1": [1.0]}}, planned=16, alpha=0.05) is None
    b = {"aime": {"r1": [1.0] * 16}, "hmmt": {"r2": [1.0] * 16}}
    seen = look_at(a, b, planned=16, alpha=0.05)
    assert seen is not None
    assert (seen.difference, seen.information, seen.decided) == (1.0, 1.0, True)


def test_only_answers_with_two_different_verdicts_are_disagreements() -> None:
    both = group(3, 1.0, 1.0, 1.0, None)
    verdicts = (Verdicts(False, True, "3.0"), Verdicts(True, True, "3"), Verdicts(False, None, "4"))
    judged = (
        *(replace(t, verdicts=v) for t, v in zip(both.trajectories, verdicts, strict=False)),
        both.trajectories[3],
    )
    (found,) = disagreements([replace(both, trajectories=judged)])
    assert (found.row_id, found.sample, found.pred, found.ground_truth) == ("row-3", 0, "3.0", "3")
    assert (found.strict, found.math_verify) == (False, True)
