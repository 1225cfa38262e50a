"""Trajectories that are worth learning from, and the conversations they become."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from agent_models import HYBRID, THINKING

from aster.agent.chat import ChatRenderer
from aster.agent.demonstrations import Wanted, histogram, select
from aster.agent.rollout import run_episode
from aster.cli import main
from aster.config import ToolConfig
from aster.data.conversations import read_conversations, to_samples
from aster.data.prompts import write_prompts
from aster.data.trajectories import write_trajectories_parquet
from aster.types import Budget, Cause, PromptRow, Sampling, Task, Trajectory, TrajectoryGroup, Verdicts
from serve.schema import ExecuteResponse, Status

ROWS = {f"row-{i}": PromptRow(f"row-{i}", ({"role": "user", "content": f"What is {i}?"},), "4", "t") for i in range(8)}
EASY = Wanted(min_calls=1)


def call(code: str) -> str:
    return f"<tool_call>\n{json.dumps({'name': 'code_interpreter', 'arguments': {'code': code}})}\n</tool_call>"


def a_turn(thought: str, rest: str) -> str:
    return f"<think>\n{thought}\n</think>\n\n{rest}"


async def trajectory(
    renderer: ChatRenderer,
    row: int,
    calls: int,
    *,
    sample: int = 0,
    reward: float = 1.0,
    turns: list[str] | None = None,
) -> Trajectory:
    """A real episode: so many calls, each with the output of a cell that prints its number; `boom` fails."""
    from scripted import ScriptedEngine, ScriptedSandbox

    said = turns or [
        *(a_turn(f"step {k}", call(f"print({k})")) for k in range(calls)),
        a_turn("so", f"\\boxed{{{sample}}}"),
    ]

    def answer(code: str) -> ExecuteResponse:
        status = Status.ERROR if "boom" in code else Status.OK
        return ExecuteResponse(status=status, text=f"{code[6:-1]}\n", stdout=f"{code[6:-1]}\n")

    budget = Budget(max_prompt_tokens=2000, max_response_tokens=8000, max_tool_calls=30, trajectory_timeout_s=120)
    row_id = f"row-{row}"
    messages = ROWS[row_id].messages
    task = Task(f"teacher/val/0/{row_id}/{sample}", row_id, sample, messages, "code_agent", budget, Sampling(), 5)
    out = await run_episode(
        task,
        generate=ScriptedEngine(renderer, list(said)),
        sandboxes=ScriptedSandbox(answer),
        renderer=renderer,
        tool=ToolConfig(),
        engine="e",
    )
    return out.with_reward(reward, Verdicts(reward > 0.5, reward > 0.5, "4"))


async def test_each_rule_drops_with_its_own_name(hybrid: ChatRenderer) -> None:
    good = await trajectory(hybrid, 0, 2)
    failed = [a_turn("x", call("print(boom)")), a_turn("so", "\\boxed{4}")]
    inside = [f"<think>\n{call('print(1)')}\n</think>\n\n", a_turn("so", "\\boxed{4}")]
    twice = [a_turn("x", call("print(1)") + "\n" + call("print(2)")), a_turn("so", "\\boxed{4}")]
    given = [
        good,
        await trajectory(hybrid, 1, 2, reward=0.0),
        await trajectory(hybrid, 2, 0),
        await trajectory(hybrid, 3, 5),
        await trajectory(hybrid, 4, 0, turns=failed),
        await trajectory(hybrid, 5, 0, turns=inside),
        await trajectory(hybrid, 5, 0, turns=twice),
        good.failed(Cause.ENGINE_LOST, "gone"),
        replace(good, cause=Cause.MAX_TOKENS),
        replace(good, row_id="of another file"),
        replace(good, row_id="row-7"),
        replace(good, uid="the same again"),
        await trajectory(hybrid, 6, 2),
    ]
    overlap = {ROWS["row-6"].messages[0]["content"]: "aime-1"}
    found = select(
        given, ROWS, hybrid, wanted=Wanted(1, max_calls=4), contaminated_by=lambda text: overlap.get(text, "")
    )
    assert [d.uid for d in found.kept] == [good.uid]
    assert [d["reason"] for d in found.dropped] == [
        "wrong",
        "too few calls",
        "too many calls",
        "a call failed",
        "cannot be written as a conversation",
        "calls that were not run",
        "lost to infrastructure",
        "not answered",
        "of no problem in the dataset",
        "another prompt",
        "copy",
        "contaminated",
    ]
    assert found.dropped[4]["detail"] == "a call inside a thought"
    report = found.report()
    assert (report["trajectories"], report["kept"], report["problems"], report["token_exact"]) == (13, 1, 1, 1)
    # calls before: 2 2 0 5 1 1 1 2 2 2 2 2 2
    assert report["calls_before"] == {"0": 1, "1": 3, "2-4": 8, "5-9": 1, "10-19": 0, "20+": 0, "mean": 24 / 13}
    assert report["calls_after"] == histogram([2])
    short = select([good], ROWS, hybrid, wanted=Wanted(1, max_tokens=good.num_tokens - 1))
    assert [d["reason"] for d in short.dropped] == ["too long"]
    assert select([good], ROWS, hybrid, wanted=Wanted(1, max_tokens=good.num_tokens)).kept


async def test_the_default_is_more_than_nine_calls(hybrid: ChatRenderer) -> None:
    nine, ten = await trajectory(hybrid, 0, 9), await trajectory(hybrid, 1, 10)
    assert [d.calls for d in select([nine, ten], ROWS, hybrid, wanted=Wanted()).kept] == [10]


async def test_a_problem_has_its_share_and_a_draw_depends_on_the_seed_alone(hybrid: ChatRenderer) -> None:
    given = [await trajectory(hybrid, row, 1, sample=sample) for row in range(8) for sample in range(3)]
    shared = select(given, ROWS, hybrid, wanted=EASY, per_problem=2)
    assert [d.row_id for d in shared.kept] == [f"row-{i}" for i in range(8) for _ in "ab"]
    drawn = [
        [d.uid for d in select(g, ROWS, hybrid, wanted=EASY, limit=6, seed=s).kept]
        for g, s in ((given, 1), (given[::-1], 1), (given, 2))
    ]
    assert len(drawn[0]) == 6
    assert drawn[0] == drawn[1][::-1], "the same ones in the order of the files"
    assert set(drawn[0]) != set(drawn[2])
    assert select(given, ROWS, hybrid, wanted=EASY, limit=6).report()["dropped"] == {"not drawn": 18}


@pytest.fixture
async def run(tmp_path: Path, hybrid: ChatRenderer) -> Path:
    """A teacher's run with two steps, and its problems."""
    for step in (2, 10):
        groups = [
            TrajectoryGroup(ROWS[f"row-{i}"], step, (await trajectory(hybrid, i, i + step, sample=step),))
            for i in range(3)
        ]
        write_trajectories_parquet(tmp_path / "teacher/trajectories", groups, step=step)
    write_prompts(tmp_path / "problems.parquet", list(ROWS.values()))
    return tmp_path


async def test_the_command_writes_what_a_student_of_another_template_trains_on(
    run: Path, model_dir: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, student = model_dir(HYBRID), ChatRenderer.from_model_dir(model_dir(THINKING))
    argv = ["synthesize", "--from", str(run / "teacher"), "--dataset", str(run / "problems.parquet")]
    argv += ["--model", str(teacher), "--out", str(run / "cold")]
    assert main([*argv, "--min-calls", "4"]) == 0
    out = capsys.readouterr().out
    assert f"{'dropped: too few calls':36}{2:8}" in out
    assert json.loads((run / "cold/report.json").read_text())["token_exact"] == 4
    assert len((run / "cold/dropped.jsonl").read_text().splitlines()) == 2
    conversations = read_conversations([run / "cold/sft.parquet"])
    assert [sum(m["role"] == "tool" for m in c) for c in conversations] == [4, 10, 11, 12]
    samples, _ = to_samples(conversations, student, max_length=10_000)
    trained = student.decode(samples[0].ids[samples[0].mask])
    assert trained.startswith(f"step 0\n</think>\n\n{call('print(0)')}<|im_end|>step 1\n")
    assert trained.endswith("so\n</think>\n\n\\boxed{2}<|im_end|>")
    first = (run / "cold/sft.parquet").read_bytes()
    assert main([*argv, "--min-calls", "4"]) == 0
    assert (run / "cold/sft.parquet").read_bytes() == first
    assert main([*argv, "--min-calls", "2", "--max-calls", "3", "--limit", "1"]) == 0
    assert pq.read_metadata(run / "cold/sft.parquet").num_rows == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--min-calls", "40"], "none of the 6 trajectories was kept: 6 too few calls; --min-calls is 40; see"),
        (["--min-calls", "5", "--max-calls", "4"], "--max-calls 4 is below --min-calls 5"),
        (["--limit", "0"], "--limit 0 must be at least 1"),
        (["--min-calls", "-1"], "--min-calls -1 must be at least 0"),
        (["--from", "nowhere"], "nowhere/trajectories holds no STEP.parquet"),
        (["--from", "RUN/teacher/trajectories"], "holds no STEP.parquet: name RUN/teacher"),
        (["--from", "RUN/cut"], "RUN/cut/trajectories/1.parquet is not a readable parquet file"),
        (["--from", "RUN/other"], "RUN/other/trajectories/1.parquet holds no trajectories: it lacks the columns"),
        (["--dataset", "RUN/others.parquet", "--min-calls", "1"], "6 of no problem in the dataset; are these problems"),
        (["--model", "RUN/strange", "--min-calls", "1"], "6 cannot be written as a conversation; is RUN/strange the"),
        (["--out", "RUN/problems.parquet"], "--out RUN/problems.parquet is a file: name the directory to write"),
    ],
)
async def test_what_cannot_be_selected_says_why(
    run: Path, model_dir: Callable[[str], Path], capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    written = next((run / "teacher/trajectories").glob("*.parquet")).read_bytes()
    for name, content in (("cut", written[:-100]), ("other", (run / "problems.parquet").read_bytes())):
        (run / name / "trajectories").mkdir(parents=True)
        (run / name / "trajectories/1.parquet").write_bytes(content)
    write_prompts(run / "others.parquet", [PromptRow("of another set", ({"role": "user", "content": "?"},), "1", "s")])
    model_dir(HYBRID).rename(run / "strange")
    vocabulary = json.loads((run / "strange/tokenizer.json").read_text())
    vocabulary["model"] |= {"vocab": {chr(0x4E00 + n): n for n in range(420)}, "merges": []}
    (run / "strange/tokenizer.json").write_text(json.dumps(vocabulary))
    argv = ["synthesize", "--from", str(run / "teacher"), "--dataset", str(run / "problems.parquet")]
    argv += ["--model", str(model_dir(HYBRID)), "--out", str(run / "cold")]
    assert main([*argv, *(option.replace("RUN", str(run)) for option in options)]) == 1
    assert words.replace("RUN", str(run)) in " ".join(capsys.readouterr().err.split())
