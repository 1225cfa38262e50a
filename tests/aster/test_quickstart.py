"""The quickstart's plan and its care with directories; the stages themselves run in tests/e2e."""

import pytest

from aster import quickstart
from aster.cli import main
from aster.errors import ConfigError
from aster.quickstart import MARKER, Claim, Plan, _clear


def test_each_stage_starts_from_what_the_stage_before_wrote(tmp_path):
    plan = Plan(tmp_path, seed=3)
    assert plan.base().model.path == str(plan.data / "model")
    assert plan.sft().model.path == str(plan.models / "base")
    assert plan.stage1().model.path == str(plan.models / "sft")
    assert plan.stage2().model.path == str(plan.models / "stage1")
    assert plan.stage2().data.train_files == (str(plan.filtered),)
    assert {r.run.seed for r in (plan.base(), plan.sft(), plan.stage1(), plan.stage2())} == {3}


def test_evaluations_differ_in_sampling_and_tool_only(tmp_path):
    t1, t06, alone = Plan(tmp_path, seed=0).evals("stage2")
    assert (t1.eval_sampling().temperature, t06.eval_sampling().temperature) == (1.0, 0.6)
    assert (t1.tool.enabled, alone.tool.enabled) == (True, False)
    assert t1.model == t06.model == alone.model
    assert t1.rollout == t06.rollout == alone.rollout


def test_an_override_reaches_every_stage(tmp_path):
    plan = Plan(tmp_path, seed=0, overrides=("sandbox.backend=bwrap",))
    assert {r.sandbox.backend for r in (plan.base(), plan.stage1(), plan.stage2(), *plan.evals("sft"))} == {"bwrap"}


def test_only_a_directory_of_an_earlier_quickstart_is_cleared(tmp_path):
    root = tmp_path / "run"
    _clear(root)
    (root / "old").write_text("x")
    _clear(root)
    assert [p.name for p in root.iterdir()] == [MARKER]
    (root / MARKER).unlink()
    (root / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="no earlier quickstart made it"):
        _clear(root)
    assert (root / "thesis.txt").read_text() == "mine"


def test_the_dry_run_lists_every_stage(capsys, tmp_path):
    assert main(["quickstart", "--dry-run", "--dir", str(tmp_path / "q")]) == 0
    out = capsys.readouterr().out
    for stage in ("base", "sft", "rl_stage1", "rl_stage2", "eval_stage2_T1", "eval_stage2_notool"):
        assert f"# ---- {stage}" in out
    assert not (tmp_path / "q").exists()


def test_a_broken_claim_has_a_status_of_its_own(monkeypatch, tmp_path):
    claims = [Claim("shown", True)]
    monkeypatch.setattr(quickstart, "run", lambda plan, console: claims)
    assert main(["quickstart", "--dir", str(tmp_path)]) == 0
    claims.append(Claim("not shown", False))
    assert main(["quickstart", "--dir", str(tmp_path)]) == 3
    monkeypatch.undo()
    (tmp_path / "thesis.txt").write_text("mine")
    assert main(["quickstart", "--dir", str(tmp_path)]) == 1
