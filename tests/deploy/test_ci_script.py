"""`.ci/run` on a machine made of stubs: it starts a Docker daemon, gives `make test` what it needs, and tidies up."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from deploy_scripts import ROOT

_TOOLS = (
    "bash",
    "sh",
    "cat",
    "dirname",
    "env",
    "kill",
    "mktemp",
    "rm",
    "seq",
    "setsid",
    "sleep",
    "tail",
    "timeout",
    "touch",
)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone with only the script, shared data beside it, and a PATH of stubs: root, no daemon yet."""
    clone = tmp_path / "clone"
    (clone / ".ci").mkdir(parents=True)
    (clone / "bin").mkdir()
    shutil.copy(ROOT / ".ci" / "run", clone / ".ci" / "run")
    (tmp_path / "shared" / "data").mkdir(parents=True)
    for name in _TOOLS:
        where = shutil.which(name)
        assert where is not None
        os.symlink(where, clone / "bin" / name)
    stubs = {
        "id": "echo 0",
        "docker": f"test -e {clone}/daemon_up",
        "dockerd": f"echo $$ > {clone}/daemon_pid; touch {clone}/daemon_up; exec sleep 600",
        "debootstrap": "",
        "bwrap": "",
        "chromium": "",
        "apt-get": f'echo "$@" >> {clone}/apt',
        "make": f'echo "make $* CI=$CI data=$ASTER_TEST_DATA"; cat; test ! -e {clone}/tests_fail',
    }
    for name, body in stubs.items():
        (clone / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (clone / "bin" / name).chmod(0o755)
    return clone


def _run(clone: Path) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(clone / ".ci" / "run")]
    environment = {"PATH": str(clone / "bin"), "HOME": str(clone)}
    # the deadline is the point: a daemon that kept our pipe would keep this waiting
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False, input="never read"
    )


def test_it_starts_the_daemon_runs_make_test_and_ends_the_daemon(clone: Path) -> None:
    done = _run(clone)
    assert done.returncode == 0, done.stderr
    told = f"CI=true data={clone.parent / 'shared' / 'data'}"
    assert done.stdout.splitlines() == [f"make test-sandbox-extra {told}", f"make test {told}"]
    assert not Path(f"/proc/{(clone / 'daemon_pid').read_text().strip()}").exists()
    assert not (clone / "apt").exists()


def test_a_failing_test_run_is_a_failing_script_and_the_daemon_ends_all_the_same(clone: Path) -> None:
    (clone / "tests_fail").touch()
    assert _run(clone).returncode != 0
    assert not Path(f"/proc/{(clone / 'daemon_pid').read_text().strip()}").exists()


def test_a_daemon_that_answers_already_is_left_alone(clone: Path) -> None:
    (clone / "daemon_up").touch()
    assert _run(clone).returncode == 0
    assert not (clone / "daemon_pid").exists()


def test_a_daemon_that_dies_is_reported_and_the_tests_run_without_it(clone: Path) -> None:
    (clone / "bin" / "dockerd").write_text("#!/bin/sh\necho 'no iptables here'\nexit 1\n")
    done = _run(clone)
    assert done.returncode == 0
    assert "dockerd did not come up" in done.stdout
    assert "no iptables here" in done.stdout


def test_missing_system_packages_are_installed_by_root(clone: Path) -> None:
    (clone / "bin" / "debootstrap").unlink()
    assert _run(clone).returncode == 0
    assert (clone / "apt").read_text().splitlines() == [
        "update -qq",
        "install -y -qq --no-install-recommends debootstrap",
    ]
