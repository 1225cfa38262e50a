"""`aster doctor`: thresholds by hand, and the real machine."""

import json
import os
import socket
import subprocess
import sys

import pytest

from aster import doctor
from aster.cli import main
from aster.config import Recipe
from aster.doctor import GIB, Finding, Level, memory_finding, recipe_findings


def test_too_little_memory_is_a_warning_with_a_cure():
    assert memory_finding(available=8 * GIB).level is Level.OK
    little = memory_finding(available=3 * GIB)
    assert (little.level, little.found) == (Level.WARNING, "3.0 GiB available")
    assert "raise the container's limit" in little.cure


def test_this_machine_is_examined_and_every_complaint_has_a_cure(capsys):
    status = main(["doctor", "--json"])
    findings = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = {f["name"] for f in findings}
    assert {"python", "cpu", "memory", "/dev/shm", "packages", "vllm", "GPUs", "sandbox docker", "port 8000"} <= names
    assert all(f["cure"] for f in findings if f["level"] in ("warning", "missing"))
    assert status == int(any(f["level"] == "missing" for f in findings))
    assert next(f for f in findings if f["name"] == "python")["level"] == "ok", "these tests run on it"


def test_a_missing_package_makes_the_exit_status_1(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    monkeypatch.setattr(doctor, "CHECKS", (doctor.packages,))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "no-such-package" in out
    assert "make setup" in out


def test_one_working_sandbox_is_enough_and_none_is_not(monkeypatch):
    from serve.cells import BackendUnavailable
    from serve.cells.bwrap import BwrapBackend
    from serve.cells.docker import DockerBackend

    def lacks(self, settings):
        raise BackendUnavailable("not here; install it")

    monkeypatch.setattr(DockerBackend, "__init__", lacks)
    monkeypatch.setattr(BwrapBackend, "__init__", lambda self, settings: None)
    levels = {f.name: f.level for f in doctor.sandbox()}
    assert levels == {"sandbox docker": Level.NOTE, "sandbox bwrap": Level.OK}
    monkeypatch.setattr(BwrapBackend, "__init__", lacks)
    both = list(doctor.sandbox())
    assert [f.level for f in both] == [Level.MISSING] * 3
    assert "sandbox.backend=process" in both[2].cure


@pytest.mark.parametrize(
    ("backend", "problem", "cure"),
    [
        ("docker", "docker: no image 'aster-sandbox:latest'; build it with `make image`", "make image"),
        ("docker", "docker: no daemon answers (PermissionError(13, 'Permission denied'))", "usermod -aG docker"),
        ("bwrap", "bwrap: not installed; install the package `bubblewrap`", "apt-get install bubblewrap"),
        ("bwrap", "bwrap: cannot make namespaces here (Operation not permitted)", "unprivileged_userns"),
    ],
)
def test_the_cure_of_a_sandbox_is_that_of_what_is_wrong_with_it(backend, problem, cure):
    assert cure in doctor.sandbox_cure(backend, problem)


def test_a_machine_without_docker_and_bubblewrap_is_told_what_to_install(tmp_path):
    """The real backends with an empty PATH and a daemon that is not there."""
    env = {**os.environ, "DOCKER_HOST": f"unix://{tmp_path}/none.sock", "PATH": str(tmp_path), "RAY_ADDRESS": ""}
    done = subprocess.run(
        [sys.executable, "-m", "aster.doctor", "--json"], env=env, capture_output=True, text=True, check=False
    )
    found = {f["name"]: f for f in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 1, done.stderr
    assert "no daemon answers" in found["sandbox docker"]["found"]
    assert "install Docker Engine" in found["sandbox docker"]["cure"]
    assert "apt-get install bubblewrap" in found["sandbox bwrap"]["cure"]
    assert found["sandbox"]["level"] == "missing"
    assert found["Ray cluster"]["level"] == "ok"


def test_without_the_environment_it_says_how_to_make_it():
    """-S: no site-packages, as with the system's Python on a fresh clone."""
    done = subprocess.run([sys.executable, "-S", "-m", "aster.doctor"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "make setup" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_seen(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert doctor._answers("127.0.0.1", taken.getsockname()[1])
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{taken.getsockname()[1]}")
        assert next(doctor.cluster()).level is Level.OK
    with socket.socket() as silent:  # bound, so that nobody else can listen there meanwhile
        silent.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{silent.getsockname()[1]}")
        assert next(doctor.cluster()).level is Level.MISSING


def by_name(recipe: Recipe, gpus: int) -> dict[str, Finding]:
    return {f.name: f for f in recipe_findings(recipe, gpus=gpus)}


def test_a_recipe_is_held_against_the_machine(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    recipe = Recipe.load("rl_stage1_18k", [f"data.train_files=[{tmp_path / 'no.parquet'}]", "cluster.device=cuda"])
    found = by_name(recipe, gpus=1)
    assert found["model.path"].level is Level.MISSING
    assert str(tmp_path / "no.parquet") in found["data.train_files"].found
    wanted = recipe.rollout.engines * recipe.rollout.tensor_parallel + recipe.learner.world_size
    assert found["GPUs of the recipe"].found.startswith(f"{wanted} wanted")
    assert found["GPUs of the recipe"].level is Level.MISSING
    assert by_name(recipe, gpus=wanted)["GPUs of the recipe"].level is Level.OK
    (tmp_path / "config.json").write_text("{}")
    there = Recipe.load("rl_stage1_18k", [f"model.path={tmp_path}"])
    assert by_name(there, gpus=0)["model.path"].level is Level.OK


def test_a_dry_run_looks_at_nothing(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda recipe: pytest.fail("looked"))
    assert main(["doctor", "--dry-run"]) == 0
    assert "sandbox" in capsys.readouterr().out.split()
