"""The command line: every verb answers --help and --dry-run without model, data or GPU; errors are one message."""

import subprocess
import sys

import pytest

from aster.cli import VERBS, main


@pytest.mark.parametrize(
    ("argv", "lines"),
    [
        (
            ["train", "--recipe", "rl_stage1_18k", "--dry-run"],
            ["budget.max_response_tokens = 16384", "optim.lr = 1e-06", "max_model_len = 18432"],
        ),
        (
            ["train", "--recipe", "rl_stage2_32k", "--dry-run"],
            ["budget.max_response_tokens = 30720", "run.steps = 234"],
        ),
        (["sft", "--recipe", "sft", "--dry-run"], ["optim.lr = 3e-05", "sft.max_length = 32768"]),
        (["eval", "--recipe", "eval_90k", "--dry-run"], ["budget.max_response_tokens = 92160", "eval.samples = 16"]),
    ],
)
def test_dry_run_prints_resolved_values_as_plain_numbers(argv, lines, capsys):
    assert main(argv) == 0
    printed = capsys.readouterr().out.splitlines()
    for line in lines:
        assert line in printed


def test_an_override_shows_in_the_dry_run(capsys):
    assert main(["train", "--recipe", "rl_stage1_18k", "--dry-run", "optim.lr=5e-7"]) == 0
    assert "optim.lr = 5e-07" in capsys.readouterr().out.splitlines()


def test_a_recipe_of_another_stage_names_the_verb_to_use(capsys):
    assert main(["train", "--recipe", "sft", "--dry-run"]) == 1
    assert "aster sft --recipe sft" in capsys.readouterr().err.replace("\n", " ")


def test_a_missing_model_is_one_readable_message(capsys):
    assert main(["eval", "--recipe", "eval_90k", "model.path=/nowhere", "data.val_files=[x.parquet]"]) == 1
    err = capsys.readouterr().err
    assert "/nowhere" in err
    assert "Traceback" not in err


def test_an_unknown_verb_prints_the_usage(capsys):
    assert main(["trian"]) == 2
    assert "no verb 'trian'" in capsys.readouterr().err


def test_explain_prints_what_a_key_means_with_its_value(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--explain", "rollout", "rollout.max_staleness=1"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "rollout.max_staleness = 1\n    0 = synchronous. k: rollouts may be k versions older" in printed
    assert "optim.lr" not in printed
    with pytest.raises(SystemExit):
        main(["train", "--explain"])
    assert "optim.lr = 1e-06" in capsys.readouterr().out
    assert main(["train", "--explain", "optim.l"]) == 1, "part of a name is no name"
    assert "no such key" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "own", "other"), [("train", "rl_stage1_18k", "cpu_sft"), ("sft", "cpu_sft", "cpu_eval")]
)
def test_the_help_offers_only_recipes_of_the_verb(verb, own, other, capsys):
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    printed = capsys.readouterr().out
    assert own in printed
    assert other not in printed


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_runs_as_a_module_and_explains_itself(verb):
    done = subprocess.run(
        [sys.executable, "-m", f"aster.{verb}", "--help"], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--dry-run" in done.stdout


@pytest.mark.parametrize("argv", [["eval", "eval.samples=2", "--dry-run", "run.seed=3"], ["train", "run.seed=3"]])
def test_overrides_may_stand_on_either_side_of_an_option(argv, capsys):
    assert main([*argv, "--dry-run", "run.name=late"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "run.seed = 3" in printed
    assert "run.name = late" in printed


def test_the_quickstart_takes_overrides_on_either_side_of_an_option_too(tmp_path, capsys):
    argv = ["quickstart", "--seed", "3", "sandbox.backend=bwrap", "--dir", str(tmp_path / "q"), "optim.beta2=0.9"]
    assert main([*argv, "--dry-run"]) == 0
    printed = capsys.readouterr().out.splitlines()
    stages = sum(line.startswith("# ----") for line in printed)
    assert stages > 1
    assert printed.count("sandbox.backend = bwrap") == printed.count("optim.beta2 = 0.9") == stages


def test_so_does_prepare(tmp_path, capsys):
    argv = ["prepare", "--task", "quickstart", "sandbox.backend=bwrap", "--out", str(tmp_path / "d"), "run.seed=3"]
    assert main([*argv, "--dry-run"]) == 0
    assert "overrides = ['sandbox.backend=bwrap', 'run.seed=3']" in capsys.readouterr().out.splitlines()


def test_so_does_synthesize(tmp_path, capsys):
    argv = ["synthesize", "--from", "r", "--dataset", "d", "--model", "m", "run.seed=3", "--out", str(tmp_path / "o")]
    assert main([*argv, "optim.lr=1e-4"]) == 1
    assert "run.seed=3: a recipe's values count with --endpoint only" in capsys.readouterr().err.replace("\n", " ")
