"""`make cluster-up` and `cluster-down`: a real cluster that leaves nothing, and marks that spare everybody else's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from deploy_scripts import ROOT, load
from ports import free_ports

from aster import report
from aster.data.base_corpus import base_conversations
from aster.data.conversations import write_conversations

cluster = load("cluster")
parts = sys.modules["cluster_parts"]  # which it imports

_TREE = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(600)"
_STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ignored", flush=True)
time.sleep(600)
"""
_MARK = f"test-{os.getpid()}"  # a test run beside this one has processes of its own


def _state(pid: int, **changes: object) -> object:
    process = cluster.read_process(pid)
    values = {
        "cluster_id": _MARK,
        "pid": pid,
        "started": process.started,
        "port": 1,
        "dashboard_port": 1,
        "serve_port": 1,
    }
    return cluster.State(**{**values, "temp_dir": "/nowhere", **changes})


@pytest.fixture
def head() -> Iterator[subprocess.Popen[bytes]]:
    """A session leader with one child that ignores SIGTERM, as `ray start --block` has children."""
    code = _TREE.format(child=_STUBBORN)
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ignored\n"  # by the child, which has the same pipe
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)
    process.stdout.close()


def test_down_ends_the_head_and_a_child_that_ignores_sigterm_and_nobody_else(
    head: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "TERM_S", 0.5)
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        state = _state(head.pid)
        pids = cluster.processes_of(state)
        assert len(pids) == 2
        assert bystander.pid not in pids
        assert os.getpid() not in pids
        assert cluster.end_processes(state) == 2
        head.wait(10)
        assert cluster.processes_of(state) == []
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait(10)


def test_a_reused_process_number_is_not_taken_for_the_cluster(head: subprocess.Popen[bytes]) -> None:
    assert cluster.processes_of(_state(head.pid, started=1)) == []


def test_a_process_that_left_the_session_is_known_by_its_environment() -> None:
    environment = os.environ | {"ASTER_CLUSTER_ID": _MARK}
    stray = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True, env=environment
    )
    try:
        deadline = time.monotonic() + 60
        while not parts.has_mark(stray.pid, _MARK) and time.monotonic() < deadline:
            time.sleep(0.02)  # the environment is there after exec
        state = cluster.State(_MARK, 2**22 + 1, 0, 1, 1, 1, "/nowhere")
        assert cluster.processes_of(state) == [stray.pid]
    finally:
        stray.kill()
        stray.wait(10)


def test_ports_for_rays_own_services_avoid_its_range_for_workers() -> None:
    ports = cluster.free_ports(20)
    assert len(set(ports)) == 20
    assert not [port for port in ports if 10002 <= port <= 19999]


def test_a_taken_port_is_named_with_its_cure() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(cluster.ClusterError, match=rf"port {port} \(dashboard-port\).*--dashboard-port {port + 1}"):
            cluster.require_free("dashboard-port", port)


def test_the_serve_file_gets_only_what_is_given(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("http_options: {host: 127.0.0.1, port: 8000}\napplications: [{name: a, args: {backend: auto}}]\n")
    config = cluster.serve_config(path, port=8123, backend=None, replicas=3)
    assert config["http_options"] == {"host": "127.0.0.1", "port": 8123}
    assert config["applications"] == [{"name": "a", "args": {"backend": "auto", "replicas": 3}}]


def test_tokens_are_readable_by_their_owner_only_and_stay(tmp_path: Path) -> None:
    token = cluster.token_in(tmp_path / "token")
    assert len(token) == 64
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
    assert cluster.token_in(tmp_path / "token") == token


def test_prometheus_reads_the_ports_of_the_newest_cluster_by_a_link(tmp_path: Path) -> None:
    files = cluster.Files(tmp_path / ".cache")
    files.directory.mkdir(parents=True)
    for name in ("older", "newer"):
        temp_dir = tmp_path / name
        temp_dir.mkdir()
        (temp_dir / "prom_metrics_service_discovery.json").write_text(name)
        cluster.link_metrics_ports(files, cluster.State("c", 1, 0, 1, 1, 1, str(temp_dir)))
    assert files.metrics_ports.read_text() == "newer"
    folder = ROOT / "deploy" / "prometheus"
    (job,) = yaml.safe_load((folder / "prometheus.yml").read_text())["scrape_configs"]
    read = {os.path.normpath(folder / name) for name in job["file_sd_configs"][0]["files"]}
    assert str(cluster.Files(ROOT / ".cache").metrics_ports) in read


def test_down_without_a_cluster_says_so_and_is_no_error(tmp_path: Path) -> None:
    assert cluster.main(["down", "--cache", str(tmp_path)]) == 0


def test_a_cluster_file_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cluster.main(["up", "--cluster", "nowhere.yaml", "--cache", str(tmp_path)]) == 1
    assert "no cluster file 'nowhere.yaml'" in capsys.readouterr().err


def fine_tuning(folder: Path) -> list[str]:
    """Two steps of `aster sft` with a new tiny model: its settings."""
    from aster.prepare import write_tiny_model

    conversations = base_conversations(echoes=8, drills=8, seed=0)
    write_conversations(folder / "sft.parquet", conversations)
    write_tiny_model(folder / "model", [m["content"] for c in conversations for m in c], seed=0)
    files = [f"model.path={folder / 'model'}", f"data.train_files=[{folder / 'sft.parquet'}]"]
    return ["--recipe", "cpu_sft", *files, f"run.dir={folder / 'runs'}", "run.steps=2"]


@pytest.mark.e2e
@pytest.mark.timeout(900)  # all of its own limits together
def test_a_cluster_comes_up_runs_a_job_and_a_session_and_leaves_nothing(tmp_path: Path) -> None:
    port, dashboard, serve = free_ports(3)
    arguments = ["--cache", str(tmp_path), f"--port={port}", f"--dashboard-port={dashboard}", f"--serve-port={serve}"]
    script = [sys.executable, str(ROOT / "deploy" / "cluster.py")]
    files = cluster.Files(tmp_path)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    try:
        subprocess.run([*script, "up", *arguments, "--num-cpus=2"], env=clean, check=True, timeout=300)
        state = files.read_state()
        again = subprocess.run([*script, "up", *arguments], env=clean, capture_output=True, text=True, timeout=60)
        assert again.returncode == 1
        assert "a cluster is up already" in again.stderr

        # the dashboard wants the token
        with pytest.raises(urllib.error.HTTPError, match="403"):
            cluster.request("GET", f"{state.dashboard}/api/jobs/", token="wrong")
        assert cluster.request("GET", f"{state.dashboard}/api/jobs/", token=files.ray_token.read_text()) == []

        # so does the sandbox, with a token of its own
        url = f"http://127.0.0.1:{serve}"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            cluster.request("POST", f"{url}/v1/sessions", token=files.ray_token.read_text(), body={})
        token = files.sandbox_token.read_text()
        session = cluster.request("POST", f"{url}/v1/sessions", token=token, body={})["session_id"]
        for code, expected in (("x = 41", ""), ("x + 1", "42")):
            answer = cluster.request("POST", f"{url}/v1/sessions/{session}/execute", token=token, body={"code": code})
            assert (answer["status"], answer["text"].strip()) == ("ok", expected)

        # what `source .cache/cluster.env` sets is enough for a job, and `python` is this environment's
        job = tmp_path / "job"
        job.mkdir()
        (job / "probe.py").write_text(
            "import json, ray, sys\nray.init(logging_level='ERROR')\n"
            "print('PROBE', json.dumps([sys.executable, ray.cluster_resources()['sandbox']]))\n"
        )
        command = f"source {files.environment}; ray job submit --working-dir {job} -- python probe.py"
        output = subprocess.run(["bash", "-c", command], env=clean, capture_output=True, text=True, timeout=150).stdout
        probe = next(line for line in output.splitlines() if line.startswith("PROBE"))
        assert json.loads(probe.removeprefix("PROBE ")) == [str(cluster.BIN / "python"), 1.0]

        # a job of ours: the same progress, metrics and report as on the command line
        settings = " ".join(fine_tuning(tmp_path))
        command = f"source {files.environment}; ray job submit --working-dir {job} -- python -m aster.sft {settings}"
        done = subprocess.run(["bash", "-c", command], env=clean, capture_output=True, text=True, timeout=150)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
        assert "sft 2/2" in done.stdout
        steps = [json.loads(line) for line in (tmp_path / "runs/sft/metrics.jsonl").read_text().splitlines()]
        assert [m["step"] for m in steps if "train/loss" in m] == [1, 2]
        assert report.main([str(tmp_path / "runs/sft"), "--output", str(tmp_path / "report.html")]) == 0
        assert '"stage":"sft"' in (tmp_path / "report.html").read_text()
    finally:
        subprocess.run([*script, "down", "--cache", str(tmp_path)], env=clean, check=True, timeout=150)
    assert cluster.processes_of(state) == []
    assert cluster.remove_containers(state) == 0
    assert not Path(state.temp_dir).exists()
    assert not files.state.exists()
    assert not files.environment.exists()
    assert not files.metrics_ports.is_symlink()
