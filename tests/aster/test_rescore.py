"""`aster eval --rescore` against what the reference's own score script said of its own files."""

import json
import shutil
from pathlib import Path

import pytest

from aster.agent.rewards import math_verify_verdict
from aster.cli import main
from aster.data.rollouts import average_scores
from aster.errors import DataError
from aster.rescore import rescore

GOLDEN = Path(__file__).parents[1] / "golden" / "score"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text("utf-8"))


def test_rescoring_the_references_files_gives_its_csv_byte_for_byte_and_no_row_differs(tmp_path, capsys):
    """The golden verdicts are math-verify 0.8.0's; ours is 0.9.0, and the list of rows that differ is empty."""
    shutil.copytree(GOLDEN / "val", tmp_path / "val")
    (tmp_path / "val").chmod(0o755)
    assert main(["eval", "--rescore", str(tmp_path / "val")]) == 0
    for name, lines in EXPECTED["csv"].items():
        want = "".join(f"{line['step']},{line['avg_score']}\n" for line in lines)
        assert (tmp_path / "val/report" / name).read_text() == f"step,avg_score\n{want}"
    report = json.loads((tmp_path / "val/report/rescore.json").read_text())
    assert report["verifier_failures"] == []
    assert "aime2025" in capsys.readouterr().out


def test_every_single_verdict_is_the_references():
    seen: dict[str, list[float]] = {"0": [], "10": [], "20": []}
    average_scores(
        GOLDEN / "val",
        verify=math_verify_verdict,
        sources=("aime2025", "hmmt25"),
        on_row=lambda step, row, right: seen[str(step)].append(float(right)),
    )
    for step, verdicts in EXPECTED["per_row"].items():
        assert seen[step] == [v for v in verdicts if not isinstance(v, str)]


def test_a_verdict_that_differs_from_the_stored_one_is_listed(tmp_path):
    def line(uid: str, output: str, acc: bool | None) -> str:
        truth = {"ground_truth": "1/2"}
        return json.dumps(
            {"output": output, "acc": acc, "non_tensor_data_source": "s", "non_tensor_reward_model": truth, "uid": uid}
        )

    rows = [line("a", r"\boxed{0.5}", False), line("b", r"\boxed{\frac{1}{2}}", True), line("c", "none", None)]
    (tmp_path / "3.jsonl").write_text("\n".join(rows) + "\n")
    result = rescore(tmp_path)
    assert result.table.scores["s"][3] == pytest.approx(2 / 3)
    assert [(c["uid"], c["stored"], c["math_verify"]) for c in result.changed] == [("a", False, True)]


def test_a_data_source_may_have_a_slash_in_its_name(tmp_path):
    row = {"output": r"\boxed{2}", "data_source": "openai/gsm8k", "ground_truth": "2"}
    (tmp_path / "3.jsonl").write_text(json.dumps(row) + "\n")
    rescore(tmp_path)
    assert json.loads((tmp_path / "report/rescore.json").read_text())["scores"] == {"openai/gsm8k": {"3": 1.0}}
    assert (tmp_path / "report/openai%2Fgsm8k.csv").read_text() == "step,avg_score\n3,1.0\n"


def test_a_data_source_may_be_no_name_for_a_file_and_an_output_no_unicode(tmp_path):
    sources = ["a\0b", "x" * 300, "x" * 299 + "y", "中" * 90, "50%", 7]
    rows = [{"output": r"\boxed{2}", "data_source": s, "ground_truth": "2"} for s in sources]
    rows.append({"output": "\ud835", "data_source": 7, "ground_truth": 0, "acc": True, "uid": "\ud835"})
    (tmp_path / "3.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rescore(tmp_path)
    report = json.loads((tmp_path / "report/rescore.json").read_text("utf-8"))
    assert set(report["scores"]) == {str(s) for s in sources}
    (changed,) = report["verdicts_changed"]
    assert (changed["output_tail"], changed["ground_truth"]) == ("\ud835", "0")
    names = {path.name for path in (tmp_path / "report").glob("*.csv")}
    assert len(names) == len(sources)
    assert {"a%00b.csv", "50%25.csv", "7.csv"} <= names


def test_a_folder_without_rows_to_judge_says_so(tmp_path):
    (tmp_path / "0.jsonl").write_text('{"output": "x"}\n')
    with pytest.raises(DataError, match="nothing to judge"):
        rescore(tmp_path)
