"""SFT on DeepSpeed ZeRO-3 and on FSDP2, and from the first stage 1 -> filter -> stage 2 on rows of the published set.

The conversations are the reference's ShareGPT parquet. They teach to compute 1 + 1 with the tool whatever is asked,
so that stage 1 always solves the problems whose answer is 2 and never another: what the filter must drop is known.
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("vllm", reason="vllm is not installed: make setup")

from aster import filter as filtering
from aster import launch, merge, sft, train
from aster.agent.tokenization import ChatTemplate
from aster.config import Recipe
from aster.data.conversations import read_conversations
from aster.data.rollouts import read_rows
from aster.data.templates import STATIC_TEMPLATE
from aster.prepare import write_tiny_model

DAPO = Path(os.environ.get("ASTER_TEST_DATA", "")) / "dapo_filter_all_correct.parquet"

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not DAPO.is_file(), reason="ASTER_TEST_DATA names no folder with the published DAPO file"),
]

SOLVED, OTHERS, LEFT_OUT = 8, 10, 2  # rows whose answer is 2, rows with another; stage 1 leaves out two of them all
GROUP = 4
SFT_STEPS = 50
CALL = {"name": "code_interpreter", "arguments": {"code": "print(1+1)"}}
LOSS_TOLERANCE = 1e-4  # relative, of the two backends' first losses; fp32, two ranks


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dapo")


@pytest.fixture(scope="module")
def stages(root: Path) -> Path:
    """Run everything once; the tests look at what it left behind."""
    write_slice(root / "dapo.parquet")
    write_cold_start(root / "sft.parquet", [row["prompt"] for row in pq.read_table(root / "dapo.parquet").to_pylist()])
    template = ChatTemplate(STATIC_TEMPLATE, special_tokens={})
    conversations = read_conversations([root / "sft.parquet"])
    texts = [template.render(list(c), tools=None, add_generation_prompt=False) for c in conversations]
    write_tiny_model(root / "model", texts, seed=0)
    backend = os.environ.get("ASTER_TEST_BACKEND", "auto")

    def recipe(name: str, run: str, model: str, data: str, *more: str) -> Recipe:
        shared = [f"run.dir={root}", f"run.name={run}", f"model.path={root / model}", f"sandbox.backend={backend}"]
        return Recipe.load(name, [*shared, f"data.train_files=[{root / data}]", "learner.world_size=2", *more])

    def cold_start(backend: str, steps: int) -> Recipe:
        settings = [f"learner.backend={backend}", "optim.warmup_steps=3", "data.epochs=40", f"run.steps={steps}"]
        return recipe("cpu_sft", f"sft_{backend}", "model", "sft.parquet", *settings)

    def stage(name: str, model: str, data: str) -> Recipe:
        return recipe(
            "cpu_rl_stage1",
            name,
            model,
            data,
            "data.val_files=[]",
            "budget.max_prompt_tokens=300",
            "rollout.prompts_per_step=8",
            f"rollout.group_size={GROUP}",
            "algo.mini_batch_prompts=8",
            "run.steps=2" if name == "stage1" else "run.steps=1",
            "run.save_every=1",
        )

    zero3, fsdp2 = cold_start("deepspeed_zero3", SFT_STEPS), cold_start("fsdp2", 4)
    with launch.cluster(zero3), launch.sandboxes(zero3) as sandboxes:
        asyncio.run(sft.run(zero3))
        asyncio.run(sft.run(fsdp2))
        merge.merge(zero3.run.path, root / "cold", dtype="float32")
        asyncio.run(train.run(stage("stage1", "cold", "dapo.parquet"), sandboxes))
        merge.merge(root / "stage1", root / "one", dtype="float32")
        argv = ["--dataset", str(root / "dapo.parquet"), "--rollout-dir", str(root / "stage1/rollout_data")]
        assert filtering.main([*argv, "--output", str(root / "filtered.parquet"), "--plot"]) == 0
        asyncio.run(train.run(stage("stage2", "one", "filtered.parquet"), sandboxes))
    return root


def write_slice(path: Path) -> None:
    """The shortest English rows of the published file, every column as it is there."""
    table = pq.read_table(DAPO)
    rows = table.select(["prompt", "reward_model"]).to_pylist()
    texts = [row["prompt"][-1]["content"] for row in rows]
    short = sorted((i for i, text in enumerate(texts) if text.isascii()), key=lambda i: (len(texts[i]), i))
    solved = [i for i in short if rows[i]["reward_model"]["ground_truth"] == "2"][:SOLVED]
    others = [i for i in short if rows[i]["reward_model"]["ground_truth"] != "2"][:OTHERS]
    pq.write_table(table.take(sorted([*solved, *others])), path)


def write_cold_start(path: Path, prompts: list[list[dict[str, str]]]) -> None:
    """A conversation per prompt, in the columns of the reference's SFT file."""
    turns = [
        ("function", f"<think>\nI add.\n</think>\n\n{json.dumps(CALL)}"),
        ("tool", "2\n"),
        ("assistant", "<think>\nSo it is.\n</think>\n\n\\boxed{2}"),
    ]
    answer = [{"role": role, "content": content} for role, content in turns]
    records = [
        {"conversations": [{"role": "user", "content": p[-1]["content"]}, *answer], "tools": "[]"} for p in prompts
    ]
    pq.write_table(pa.Table.from_pylist(records), path)


def losses(run: Path) -> list[float]:
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [m["train/loss"] for m in metrics if "train/loss" in m]


def rollouts(run: Path) -> list[dict]:
    return [row for path in sorted((run / "rollout_data").glob("*.jsonl")) for row in read_rows(path)]


def answer_of(row: dict) -> str:
    return row["reward_model"]["ground_truth"]


def test_an_sft_run_on_zero3_has_the_losses_of_one_on_fsdp2(stages: Path) -> None:
    zero3, fsdp2 = losses(stages / "sft_deepspeed_zero3"), losses(stages / "sft_fsdp2")
    assert (len(zero3), len(fsdp2)) == (SFT_STEPS, 4)
    assert zero3[:4] == pytest.approx(fsdp2, rel=LOSS_TOLERANCE)
    assert zero3[-1] < 0.1 * zero3[0]


def test_what_zero3_trained_is_sampled_by_vllm_with_the_learner_s_own_log_probs(stages: Path) -> None:
    metrics = [json.loads(line) for line in (stages / "stage1/metrics.jsonl").read_text().splitlines()]
    assert max(m["training/rollout_probs_diff_max"] for m in metrics if "timing_s/gen" in m) < 1e-4
    rows = rollouts(stages / "stage1")
    called = [t["call"] for r in rows for t in r["turns"] if t["call"]]
    # sampled: most of them, whichever the draw; without the tool it would be none
    assert sum(c["code"] == "print(1+1)" and c["outcome"] == "success" for c in called) > 0.5 * len(rows)


def test_stage_1_drew_sixteen_of_the_published_rows_and_solved_those_whose_answer_is_2(stages: Path) -> None:
    rows = rollouts(stages / "stage1")
    assert len({r["row_id"] for r in rows}) == SOLVED + OTHERS - LEFT_OUT
    by_answer: dict[bool, list[bool]] = {True: [], False: []}
    for row in rows:
        by_answer[row["ground_truth"] == "2"].append(row["acc"])
    assert sum(by_answer[True]) > 0.5 * len(by_answer[True])
    assert sum(by_answer[False]) < 0.1 * len(by_answer[False])


def test_the_filter_drops_what_was_always_solved_and_nothing_else(stages: Path) -> None:
    before, after = (pq.read_table(stages / f"{name}.parquet").to_pylist() for name in ("dapo", "filtered"))
    right: dict[str, list[bool]] = {}
    for row in rollouts(stages / "stage1"):
        right.setdefault(row["row_id"], []).append(row["acc"])
    solved = {row_id for row_id, verdicts in right.items() if all(verdicts)}
    assert solved, "stage 1 was to solve some problems every time"
    ids = [row["extra_info"]["index"] for row in after]
    assert ids == [row["extra_info"]["index"] for row in before if row["extra_info"]["index"] not in solved]
    for row, row_id in zip(after, ids, strict=True):
        verdicts = right.get(row_id)
        assert row[f"acc_mean@{GROUP}"] == (None if verdicts is None else sum(verdicts) / GROUP)
        assert row["response_count"] == (None if verdicts is None else GROUP)
    assert sum(row[f"acc_mean@{GROUP}"] is None for row in after) == LEFT_OUT
    assert "acc_mean@8" in before[0]
    assert "acc_mean@8" not in after[0], "the published accuracies are of another policy"
    assert (stages / "filtered_distribution.png").stat().st_size > 0


def test_stage_2_trains_on_what_the_filter_kept(stages: Path) -> None:
    kept = {row["extra_info"]["index"] for row in pq.read_table(stages / "filtered.parquet").to_pylist()}
    drawn = {r["row_id"] for r in rollouts(stages / "stage2")}
    assert len(drawn) == 8
    assert drawn <= kept
    assert (stages / "stage2/checkpoints/latest_checkpointed_iteration.txt").read_text() == "1\n"
