"""Which sandbox backend a machine gets, on machines made of stubs; and that the choice is said where it is unsafe."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from deploy_scripts import ROOT


@dataclass(frozen=True)
class Machine:
    """A checkout with only the script, and a PATH with only stubs and what every machine has."""

    root: Path

    def stub(self, name: str, body: str) -> None:
        path = self.root / "bin" / name
        path.write_text(f'#!/bin/sh\necho "$(basename $0) $*" >> {self.root}/calls\n{body}\n')
        path.chmod(0o755)

    def run(self, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.root / "deploy" / "bootstrap.sh"), str(self.root / "bin" / "python")],
            env={"PATH": str(self.root / "bin"), "HOME": str(self.root), "CI": "true", **environment},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    @property
    def chosen(self) -> str:
        path = self.root / ".cache" / "sandbox_backend"
        return path.read_text().strip() if path.exists() else ""

    @property
    def calls(self) -> str:
        path = self.root / "calls"
        return path.read_text() if path.exists() else ""


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """No Docker, no bubblewrap, and apt-get cannot help."""
    for name in ("bin", "deploy"):
        (tmp_path / name).mkdir()
    shutil.copy(ROOT / "deploy" / "bootstrap.sh", tmp_path / "deploy")
    for name in ("bash", "sh", "cat", "dirname", "basename", "env", "id", "mkdir", "timeout"):
        where = shutil.which(name)
        assert where is not None
        os.symlink(where, tmp_path / "bin" / name)
    made = Machine(tmp_path)
    made.stub("python", "exit 1")
    made.stub("apt-get", "exit 100")
    return made


_DOCKER_AND_IMAGE = "exit 0"
_DOCKER_WITHOUT_IMAGE = 'case "$*" in *sandbox_image.build*) echo "no base image" >&2; exit 1;; esac; exit 0'


def test_a_docker_daemon_and_a_current_image_mean_docker(machine: Machine) -> None:
    machine.stub("python", _DOCKER_AND_IMAGE)
    machine.stub("bwrap", "exit 0")
    assert machine.run().returncode == 0
    assert machine.chosen == "docker"
    assert "-m sandbox_image.build" in machine.calls


def test_an_image_that_cannot_be_built_falls_back_to_bubblewrap_and_says_so(machine: Machine) -> None:
    machine.stub("python", _DOCKER_WITHOUT_IMAGE)
    machine.stub("bwrap", "exit 0")
    done = machine.run()
    assert (done.returncode, machine.chosen) == (0, "bwrap")
    assert "could not be built" in done.stderr
    assert "no base image" in done.stderr


def test_bubblewrap_is_installed_where_nothing_else_isolates(machine: Machine) -> None:
    # what apt-get would do: the program is there afterwards
    bwrap = machine.root / "bin" / "bwrap"
    machine.stub("apt-get", f'case "$*" in *bubblewrap*) printf "#!/bin/sh\\n" > {bwrap}; /bin/chmod +x {bwrap};; esac')
    machine.stub("sudo", '[ "$1" = -n ] && shift; exec "$@"')
    assert machine.run().returncode == 0
    assert machine.chosen == "bwrap"
    assert "apt-get install -y" in machine.calls


def test_without_any_isolation_the_run_goes_on_and_one_line_says_what_that_means(machine: Machine) -> None:
    done = machine.run()
    assert (done.returncode, machine.chosen) == (0, "process")
    (line,) = [x for x in done.stderr.splitlines() if "process" in x]
    assert "NO isolation" in line
    assert "the model's code runs as" in line
    assert "apt-get install bubblewrap" in line


def test_a_bubblewrap_that_cannot_make_namespaces_is_not_chosen(machine: Machine) -> None:
    machine.stub("bwrap", "echo 'No permissions to create new namespace' >&2; exit 1")
    assert machine.run().returncode == 0
    assert machine.chosen == "process"


def test_a_backend_asked_for_by_name_must_work(machine: Machine) -> None:
    done = machine.run(ASTER_SANDBOX_BACKEND="bwrap")
    assert done.returncode == 1
    assert "bubblewrap does not work here" in done.stderr
    assert machine.chosen == ""
    assert machine.run(ASTER_SANDBOX_BACKEND="process").returncode == 0
    assert machine.chosen == "process"
    assert "ASTER_SANDBOX_BACKEND=podman is none of" in machine.run(ASTER_SANDBOX_BACKEND="podman").stderr
