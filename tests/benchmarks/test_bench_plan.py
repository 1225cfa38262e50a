"""The plan's memory arithmetic holds against a real learner: the benchmark's own verdict, within 15 % part by part."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed")

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


def test_a_learners_memory_is_what_was_predicted() -> None:
    script = Path(__file__).with_name("bench_plan.py")
    done = subprocess.run(
        [sys.executable, str(script), "--only", "learner"], capture_output=True, text=True, check=False, timeout=390
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    verdict = json.loads(done.stdout.strip().splitlines()[-1])
    assert verdict["worst"] <= 0.15
    assert len(verdict["lines"]) == 10
