"""Every verb of the paper's pipeline on the real parts, small: Ray, vLLM, two FSDP2 ranks, sandbox cells behind Serve.

prepare -> sft -> merge -> train (2 steps, then a resumed third, as trees) -> filter -> merge -> eval -> report. A few
dozen SFT steps teach the format of a call and nothing else, which is enough to drive the tool in a real session.
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

pytest.importorskip("vllm", reason="vllm is not installed: make setup")

from aster import eval as evaluation
from aster import filter as filtering
from aster import launch, merge, prepare, report, sft, train
from aster.config import Recipe
from aster.data.trajectories import read_trajectories

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

SIZE = prepare.TaskSize(train=48, heldout=12, echoes=32, drills=32, dense=96, head=8)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("pipeline")


@pytest.fixture(scope="module")
def pipeline(root: Path) -> Path:
    """Run everything once; the tests look at what it left behind."""
    backend = os.environ.get("ASTER_TEST_BACKEND", "auto")

    def recipe(name: str, run: str, *more: str) -> Recipe:
        shared = [f"run.dir={root}", f"run.name={run}", f"sandbox.backend={backend}", "learner.world_size=2"]
        return Recipe.load(name, [*shared, *more])

    def rl(run: str, *more: str) -> Recipe:
        return recipe(
            "cpu_rl_stage1",
            run,
            f"model.path={root / 'models/sft'}",
            f"data.train_files=[{root / 'data/train.parquet'}]",
            f"data.val_files=[{root / 'data/heldout.parquet'}]",
            "rollout.prompts_per_step=8",
            "rollout.group_size=4",
            "algo.mini_batch_prompts=4",
            "run.save_every=1",
            "run.val_every=2",
            *more,
        )

    first = recipe(
        "cpu_sft",
        "sft",
        f"model.path={root / 'data/model'}",
        f"data.train_files=[{root / 'data/sft.parquet'}]",
        "sft.val_fraction=0.1",
        "run.val_every=20",
    )
    with launch.cluster(first), launch.sandboxes(first) as sandboxes:
        assert sandboxes is not None
        asyncio.run(prepare.quickstart(root / "data", seed=0, sandboxes=sandboxes, size=SIZE))
        asyncio.run(sft.run(first.model_copy(update={"data": first.data.model_copy(update={"epochs": 6})})))
        merge.merge(first.run.path, root / "models/sft", dtype="float32")
        asyncio.run(train.run(rl("rl", "run.steps=2"), sandboxes))
        asyncio.run(train.run(rl("rl", "run.steps=3", "rollout.tree_turns=[1]"), sandboxes))
        merge.merge(root / "rl", root / "models/rl", dtype="float32")
        files = ["--dataset", str(root / "data/train.parquet"), "--rollout-dir", str(root / "rl/rollout_data")]
        assert filtering.main([*files, "--output", str(root / "data/filtered.parquet")]) == 0
        settings = [f"model.path={root / 'models/rl'}", f"data.val_files=[{root / 'data/heldout.parquet'}]"]
        asyncio.run(
            evaluation.run(
                [
                    recipe("cpu_eval", "eval", *settings),
                    recipe("cpu_eval", "eval_notool", *settings, "tool.enabled=false"),
                ],
                sandboxes,
            )
        )
    report.write_report(report.find_runs([root]), root / "report.html")
    return root


def metrics(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def steps(path: Path) -> dict[int, dict[str, float]]:
    return {int(m["step"]): m for m in metrics(path) if "timing_s/gen" in m}


def test_sft_learns(pipeline):
    losses = [m["train/loss"] for m in metrics(pipeline / "sft") if "train/loss" in m]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


def test_sft_is_validated_before_during_and_after(pipeline):
    seen = {int(m["step"]): m for m in metrics(pipeline / "sft") if "val/loss" in m}
    assert list(seen)[:3] == [0, 20, 40]
    last = seen[max(seen)]
    assert last["val/loss"] < 0.5 * seen[0]["val/loss"]
    assert (seen[0]["val/tool_format_accuracy"], last["val/tool_format_accuracy"] > 0.5) == (0.0, True)


def test_a_resumed_run_goes_on_at_step_three(pipeline):
    assert sorted(steps(pipeline / "rl")) == [1, 2, 3]
    names = {p.name for p in (pipeline / "rl/checkpoints").iterdir()}
    assert "global_step_3" in names
    assert (pipeline / "rl/checkpoints/latest_checkpointed_iteration.txt").read_text() == "3\n"


def test_engine_and_learner_agree_in_fp32(pipeline):
    for step, values in steps(pipeline / "rl").items():
        assert values["training/rollout_probs_diff_max"] < 1e-4, step
        assert values["training/canary_max_diff"] < 1e-4, step
        assert values["training/mismatch_k3"] < 1e-8, step


def test_the_first_mini_batch_is_on_policy(pipeline):
    for values in steps(pipeline / "rl").values():
        assert abs(values["actor/tis_mean"] - 1.0) < 1e-3
        assert values["infra_failed_rate"] == 0.0


def test_trajectories_really_used_the_tool(pipeline):
    calls = [c for p in (pipeline / "rl/trajectories").iterdir() for t in read_trajectories(p) for c in t.calls]
    assert len(calls) > 20
    assert any(c.outcome == "success" for c in calls)


def test_tokens_know_the_version_that_sampled_them(pipeline):
    for step in (1, 2, 3):
        for t in read_trajectories(pipeline / f"rl/trajectories/{step}.parquet"):
            assert set(t.versions[t.mask]) <= {step - 1}
            assert set(t.versions[~t.mask]) <= {-1}
            assert (t.behaviour_logprobs[~t.mask] == 0).all()
            assert (t.behaviour_logprobs[t.mask] <= 0).all()


def test_the_third_step_grew_trees_whose_sessions_were_forked(pipeline):
    leaves = list(read_trajectories(pipeline / "rl/trajectories/3.parquet"))
    assert len(leaves) == 8 * 4
    by_uid = {t.uid: t for t in leaves}
    parted = 0
    for leaf in leaves:
        assert not leaf.cause.is_ours
        assert (leaf.parent is None, leaf.branch_turn) == ((True, None) if leaf.sample % 2 == 0 else (False, 1))
        if leaf.parent is None:
            continue
        trunk = by_uid[leaf.parent]
        assert trunk.sample == leaf.sample - 1
        shared = leaf.turns[1].start if len(leaf.turns) > 1 else len(leaf.ids)
        for name in ("ids", "mask", "behaviour_logprobs", "versions"):
            assert np.array_equal(getattr(leaf, name)[:shared], getattr(trunk, name)[:shared])
        if len(leaf.turns) == 1:
            assert np.array_equal(leaf.ids, trunk.ids), "it ended before it could part"
        parted += len(leaf.turns) > 1 and leaf.calls[0].outcome == "success"
    assert parted >= 1, "no leaf went on in a forked session"


def test_rollouts_and_validation_are_written_under_the_references_names(pipeline):
    rollouts = [json.loads(x) for x in (pipeline / "rl/rollout_data/1.jsonl").read_text().splitlines()]
    assert len(rollouts) == 8 * 4
    assert {"input", "output", "score", "step", "acc", "pred", "row_id", "uid"} <= rollouts[0].keys()
    validation = [json.loads(x) for x in (pipeline / "rl/val_rollout_data/2.jsonl").read_text().splitlines()]
    assert len(validation) == SIZE.heldout
    assert {"non_tensor_data_source", "non_tensor_reward_model", "num_turns", "reward"} <= validation[0].keys()


def test_the_filter_keeps_every_row_that_is_not_all_correct(pipeline):
    kept = pq.read_table(pipeline / "data/filtered.parquet")
    assert 0 < kept.num_rows <= SIZE.train
    assert "acc_mean@4" in kept.column_names


def test_the_merged_model_evaluates_and_without_the_tool_nothing_is_executed(pipeline):
    for name in ("eval", "eval_notool"):
        result = json.loads((pipeline / name / "eval.json").read_text())
        assert 0.0 <= result["val-core/aster_tasks/acc/mean@1"] <= 1.0
    rows = [json.loads(x) for x in (pipeline / "eval_notool/val_rollout_data/0.jsonl").read_text().splitlines()]
    assert len(rows) == SIZE.heldout
    assert not any(t["call"]["status"] == "ok" for r in rows for t in r["turns"] if t["call"])


def test_the_report_holds_every_run_and_no_link(pipeline):
    html = (pipeline / "report.html").read_text()
    for name in ("sft", "rl", "eval"):
        assert name in html
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert "https://" not in html


def test_thought_code_and_the_opening_of_a_call_have_entropies_of_their_own(pipeline):
    for values in steps(pipeline / "rl").values():
        parts = [values[f"collapse/entropy/{region}"] for region in ("think", "code", "call_start")]
        assert all(part >= 0 for part in parts)
        assert values["collapse/entropy/all"] == pytest.approx(values["actor/entropy"])
        assert values["collapse/surprisal/call_start"] >= 0
        assert values["collapse/alarm"] in (0.0, 1.0)


def test_the_trace_shows_both_halves_of_the_resumed_run_on_every_kind_of_track(pipeline):
    events = json.loads((pipeline / "rl/trace.json").read_text())
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    spans = [(names[e["pid"]], e["name"]) for e in events if e["ph"] == "X"]
    assert [name for process, name in spans if process == "driver" and name.startswith("step")] == [
        "step 1", "step 2", "step 3",
    ]  # fmt: skip
    assert {"forward, backward", "log-probs", "optimizer step"} <= {
        name for process, name in spans if process == "learner"
    }
    assert {"generate", "tool"} <= {name for process, name in spans if process == "engine-0"}
    assert any(process.startswith("sandbox ") for process, _ in spans), "cells carry the node that ran them"
    assert {"send", "receive", "verify"} <= {name for process, name in spans if process == "driver"}
    assert ("scoring", "score") in spans
