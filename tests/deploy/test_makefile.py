"""The Makefile: every target is told by `make help`, and set-up does work only when there is some."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from deploy_scripts import ROOT

MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
BENCHES = [p.stem.replace("_", "-") for p in sorted((ROOT / "tests" / "benchmarks").glob("bench_*.py"))]
TARGETS = [*re.findall(r"^\.PHONY: ([\w-]+)$", MAKEFILE, re.MULTILINE), *BENCHES]


def _make(*arguments: str, directory: Path = ROOT) -> subprocess.CompletedProcess[str]:
    # MAKEFLAGS of a `make test` around us would be obeyed by this make too
    environment = {k: v for k, v in os.environ.items() if k not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}}
    return subprocess.run(
        ["make", *arguments], cwd=directory, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


def test_help_prints_every_target_with_its_sentence() -> None:
    printed = dict(re.findall(r"^  make (\S+) +(\S.*)$", _make("help").stdout, re.MULTILINE))
    assert set(printed) == set(TARGETS)
    assert len(TARGETS) > 15


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_is_well_formed_and_names_files_that_exist(target: str) -> None:
    plan = _make("-n", target)
    assert plan.returncode == 0, plan.stderr
    for path in re.findall(r"(?<![\w./-])((?:deploy|tests)/[\w./-]+\.(?:py|sh|yaml))", plan.stdout):
        assert (ROOT / path).exists(), f"make {target} names {path}"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What `make setup` looks at, with an environment that is newer than the lock."""
    for name in ("Makefile", "pyproject.toml", "deploy/environment.py", "deploy/requirements/cpu.lock.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".setup-cpu").touch()
    os.utime(tmp_path / ".venv" / ".setup-cpu", (time.time() + 5, time.time() + 5))
    return tmp_path


def test_setup_does_nothing_and_quickly_when_nothing_changed(checkout: Path) -> None:
    began = time.monotonic()
    done = _make("setup", directory=checkout)
    assert done.returncode == 0
    assert "Nothing to be done" in done.stdout
    assert time.monotonic() - began < 60  # an installation takes minutes


@pytest.mark.parametrize("changed", ["pyproject.toml", "deploy/requirements/cpu.lock.txt"])
def test_setup_installs_again_when_the_lock_or_the_project_changed(checkout: Path, changed: str) -> None:
    os.utime(checkout / changed, (time.time() + 60, time.time() + 60))
    assert "deploy/environment.py install --extra cpu" in _make("-n", "setup", directory=checkout).stdout


def test_a_machine_without_a_supported_python_is_told_which_one_it_needs(checkout: Path) -> None:
    (checkout / ".venv" / ".setup-cpu").unlink()
    stubs = checkout / "bin"
    stubs.mkdir()
    for name in ("bash", "make"):
        where = shutil.which(name)
        assert where is not None
        os.symlink(where, stubs / name)
    old = stubs / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    command = ["make", "setup"]
    done = subprocess.run(
        command, cwd=checkout, env={"PATH": str(stubs)}, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode != 0
    assert "no Python 3.11, 3.12 or 3.13 found" in done.stderr


@pytest.mark.parametrize(("status", "doctor"), [(0, False), (1, True), (2, True), (3, False)])
def test_a_quickstart_that_failed_says_what_the_machine_lacks_and_one_with_a_broken_claim_does_not(
    checkout: Path, status: int, doctor: bool
) -> None:
    for path, script in (
        ("deploy/bootstrap.sh", "mkdir -p .cache; echo process > .cache/sandbox_backend"),
        (".venv/bin/aster", '[ "$1" = doctor ] && echo THE TABLE; exit ${5:-0}'),  # --seed 0 sandbox.backend=... ARGS
    ):
        (checkout / path).parent.mkdir(exist_ok=True)
        (checkout / path).write_text(f"#!/bin/sh\n{script}\n")
        (checkout / path).chmod(0o755)
    done = _make("quickstart", f"ARGS={status}", directory=checkout)
    assert (done.returncode != 0) is (status != 0), done.stderr
    assert ("THE TABLE" in done.stderr) is doctor


@pytest.mark.parametrize("cache", [".cache", ".cache/second"])
def test_clean_refuses_while_a_cluster_is_up(checkout: Path, cache: str) -> None:
    state = checkout / cache / "cluster" / "state.json"
    state.parent.mkdir(parents=True)
    state.touch()
    done = _make("clean", directory=checkout)
    assert done.returncode != 0
    assert f'make cluster-down ARGS="--cache {cache}"' in done.stderr
    assert (checkout / ".venv").exists()
    state.unlink()
    assert _make("clean", "VENV=.venv", directory=checkout).returncode == 0
    assert not (checkout / ".venv").exists()
