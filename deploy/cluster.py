"""`make cluster-up` and `make cluster-down`: a Ray head with dashboard and the sandbox service, and their exact end.

    up      ray start --head --block (in a session of its own) -> dashboard answers -> PUT deploy/serve.yaml -> RUNNING
    down    delete the Serve apps -> SIGTERM the head -> what is left of its processes -> its containers -> its files

What belongs to a cluster, and nothing else, is ended (`cluster_parts.py`). With `--cluster FILE` both hand over to `ray
up` and `ray down`. `sandbox` puts the service on any running cluster.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from cluster_parts import ClusterError, State, end_processes, processes_of, read_process, remove_containers

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
SERVE_FILE = ROOT / "deploy" / "serve.yaml"

HEAD_DEADLINE_S = 120.0
SANDBOX_DEADLINE_S = 420.0
DELETE_DEADLINE_S = 30.0


@dataclass(frozen=True)
class Files:
    """Where a cluster keeps its own files; tests use another directory than `.cache`."""

    cache: Path

    @property
    def directory(self) -> Path:
        return self.cache / "cluster"

    @property
    def state(self) -> Path:
        return self.directory / "state.json"

    @property
    def ray_token(self) -> Path:
        return self.directory / "ray_token"

    @property
    def sandbox_token(self) -> Path:
        return self.directory / "sandbox_token"

    @property
    def log(self) -> Path:
        return self.directory / "ray.log"

    @property
    def metrics_ports(self) -> Path:
        return self.directory / "prometheus.json"

    @property
    def environment(self) -> Path:
        return self.cache / "cluster.env"

    def read_state(self) -> State | None:
        return State(**json.loads(self.state.read_text("utf-8"))) if self.state.exists() else None

    def write_state(self, state: State) -> None:
        self.state.write_text(json.dumps(dataclasses.asdict(state)), "utf-8")


# --- ports and HTTP ---------------------------------------------------------------------------------------------------


def require_free(name: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise ClusterError(
                f"port {port} ({name}) is taken, perhaps by another cluster: end that one, or choose: "
                f'make cluster-up ARGS="--{name} {port + 1}"'
            ) from None


def free_ports(count: int) -> list[int]:
    """Ports outside Ray's range for workers (10002 to 19999), where it refuses its own services."""
    with contextlib.ExitStack() as stack:
        ports: list[int] = []
        while len(ports) < count:
            probe = stack.enter_context(socket.socket())
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
            if not 10002 <= port <= 19999:
                ports.append(port)
        return ports


def request(method: str, url: str, *, token: str, body: object = None, timeout_s: float = 30.0) -> Any:
    """JSON in, JSON out (None for an empty or non-JSON answer). Raises OSError, HTTPError among them."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback never goes through a proxy
    with opener.open(urllib.request.Request(url, data, headers, method=method), timeout=timeout_s) as answer:
        text = answer.read().decode()
    try:
        return json.loads(text)
    except ValueError:
        return None


# What the cluster's processes are told, by the name of the way that HTTP takes through Serve.
SERVE_MODES = {
    "standard": {},
    "throughput": {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"},
    "haproxy": {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_ENABLE_HA_PROXY": "1"},
}


def haproxy_files(directory: str) -> dict[str, str]:
    """HAProxy's own files; by default every cluster of a machine would take the same. Short names: Ray puts 56 digits
    between directory and file, and a socket's path has at most 97 characters there."""
    names = {"CONFIG_FILE_LOC": "cfg", "SOCKET_PATH": "s", "SERVER_STATE_BASE": "", "SERVER_STATE_FILE": "state"}
    return {f"RAY_SERVE_HAPROXY_{key}": str(Path(directory, "h", name)) for key, name in names.items()}


# --- up ---------------------------------------------------------------------------------------------------------------


def serve_config(path: Path, *, port: int, **args: object) -> dict[str, Any]:
    """deploy/serve.yaml with this cluster's port, and the application's `args` that are not None."""
    config: dict[str, Any] = yaml.safe_load(path.read_text("utf-8"))
    config.setdefault("http_options", {})["port"] = port
    for application in config["applications"]:
        application.setdefault("args", {}).update({key: value for key, value in args.items() if value is not None})
    return config


def start_head(files: Files, state: State, *, environment: dict[str, str], num_cpus: int | None) -> State:
    client, agent = free_ports(2)
    command = [str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={state.port}"]
    command += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={state.dashboard_port}"]
    command += [f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"]
    command += [f"--temp-dir={state.temp_dir}", "--disable-usage-stats", "--log-color=false"]
    command += ["--resources", json.dumps({"sandbox": 1})]
    command += [f"--num-cpus={num_cpus}"] if num_cpus else []
    with files.log.open("wb") as log:
        head = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=ROOT
        )
    process = read_process(head.pid)
    state = dataclasses.replace(state, pid=head.pid, started=process.started if process else 0)
    files.write_state(state)  # from here on `down` can end it
    deadline = time.monotonic() + HEAD_DEADLINE_S
    token = environment["RAY_AUTH_TOKEN"]
    while True:
        if head.poll() is not None:
            raise ClusterError(f"ray start ended with status {head.returncode}:\n{tail(files.log)}")
        with contextlib.suppress(OSError):
            answer = request("GET", f"{state.dashboard}/nodes?view=summary", token=token, timeout_s=5) or {}
            if nodes := answer.get("data", {}).get("summary"):
                state = dataclasses.replace(state, node=nodes[0]["raylet"]["nodeId"])
                files.write_state(state)
                return state
        if time.monotonic() > deadline:
            raise ClusterError(f"the dashboard did not answer within {HEAD_DEADLINE_S:.0f} s:\n{tail(files.log)}")
        time.sleep(0.3)


def deploy_sandbox(dashboard: str, config: dict[str, Any], *, token: str) -> None:
    """PUT the Serve configuration and wait until every application runs."""
    url = f"{dashboard}/api/serve/applications/"
    try:
        request("PUT", url, token=token, body=config, timeout_s=60)
    except urllib.error.HTTPError as error:
        raise ClusterError(
            f"Serve refused the configuration: {error.read().decode(errors='replace')[-2000:]}"
        ) from None
    names = [application["name"] for application in config["applications"]]
    deadline = time.monotonic() + SANDBOX_DEADLINE_S
    seen: dict[str, Any] = {}
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            seen = (request("GET", url, token=token) or {}).get("applications", {})
        for name in names:
            if seen.get(name, {}).get("status") in {"DEPLOY_FAILED", "UNHEALTHY"}:
                raise ClusterError(f"the application {name!r} did not start: {explain(seen[name])}")
        if all(seen.get(name, {}).get("status") == "RUNNING" for name in names):
            return
        time.sleep(0.5)
    raise ClusterError(
        f"{names} not running after {SANDBOX_DEADLINE_S:.0f} s: {[explain(seen.get(n, {})) for n in names]}"
    )


def explain(application: dict[str, Any]) -> str:
    """Status and messages of an application and its deployments, as Serve reports them."""
    parts = [str(application.get("status")), str(application.get("message", ""))]
    for name, deployment in (application.get("deployments") or {}).items():
        parts.append(f"{name}: {deployment.get('status')} {deployment.get('message', '')}")
    return "\n".join(part for part in parts if part)


def tail(path: Path, lines: int = 30) -> str:
    return "\n".join(path.read_text("utf-8", "replace").splitlines()[-lines:]) if path.exists() else "(no log)"


def token_in(path: Path) -> str:
    """The token kept in `path`, made on first use, readable by its owner only."""
    if not path.exists():
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    return path.read_text("utf-8").strip()


def write_environment(files: Files, state: State) -> None:
    """What a shell needs to talk to the cluster: `source .cache/cluster.env`. Tokens stay in their own files."""
    lines = [
        "# Written by make cluster-up; removed by make cluster-down.",
        f"export RAY_ADDRESS=127.0.0.1:{state.port}",
        f"export RAY_API_SERVER_ADDRESS={state.dashboard}",
        f"export RAY_DASHBOARD_ADDRESS={state.dashboard}",
        "export RAY_AUTH_MODE=token",
        f"export RAY_AUTH_TOKEN_PATH={shlex.quote(str(files.ray_token))}",
        f"export ASTER_SANDBOX_URL=http://127.0.0.1:{state.serve_port}",
        f'export ASTER_SANDBOX_TOKEN="$(cat {shlex.quote(str(files.sandbox_token))})"',
        f'export PATH={shlex.quote(str(BIN))}:"$PATH"',
    ]
    files.environment.write_text("\n".join(lines) + "\n", "utf-8")


def link_metrics_ports(files: Files, state: State) -> None:
    """A fixed name, which deploy/prometheus/prometheus.yml has, for a file in this cluster's own directory."""
    files.metrics_ports.unlink(missing_ok=True)
    files.metrics_ports.symlink_to(Path(state.temp_dir, "prom_metrics_service_discovery.json"))


@contextlib.contextmanager
def undone_on_failure(files: Files) -> Iterator[None]:
    """A start that fails or is interrupted leaves no process behind; Ray's logs stay for the reader."""
    try:
        yield
    except BaseException:
        state = files.read_state()
        if state is not None:
            end_processes(state)
            remove_containers(state)
            files.state.unlink()
            print(f"cluster: Ray's logs are in {state.temp_dir}/session_latest/logs", file=sys.stderr)
        raise


def up(files: Files, args: argparse.Namespace) -> None:
    previous = files.read_state()
    if previous is not None:
        if processes_of(previous):
            raise ClusterError(f"a cluster is up already at {previous.dashboard}: make cluster-down ends it")
        down(files)  # died with the machine or by hand: clear what is left
    for name, port in (("port", args.port), ("dashboard-port", args.dashboard_port), ("serve-port", args.serve_port)):
        require_free(name, port)
    files.directory.mkdir(parents=True, exist_ok=True)
    cluster_id = secrets.token_hex(4)
    # Sockets live below this directory and their paths may have 107 bytes, so it cannot be below the checkout.
    temp_dir = tempfile.mkdtemp(prefix=f"aster-{cluster_id}-")
    state = State(cluster_id, 0, 0, args.port, args.dashboard_port, args.serve_port, temp_dir)
    token = token_in(files.ray_token)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
        # A job's entrypoint is found in the head's PATH: `python` must be this environment's.
        "PATH": f"{BIN}:{os.environ.get('PATH', '')}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # one node: there is nowhere to drain to
        "ASTER_CLUSTER_ID": cluster_id,
        "ASTER_SANDBOX_TOKEN": token_in(files.sandbox_token),
        **SERVE_MODES[args.serve],
        **(haproxy_files(temp_dir) if args.serve == "haproxy" else {}),
    }
    with undone_on_failure(files):
        state = start_head(files, state, environment=environment, num_cpus=args.num_cpus)
        print(f"cluster: Ray head is up, dashboard {state.dashboard}")
        if args.sandbox:
            backend_file = files.cache / "sandbox_backend"
            backend = args.backend or (backend_file.read_text("utf-8").strip() if backend_file.exists() else None)
            config = serve_config(SERVE_FILE, port=state.serve_port, backend=backend)
            deploy_sandbox(state.dashboard, config, token=token)
            print(f"cluster: sandbox service is up, http://127.0.0.1:{state.serve_port}")
        write_environment(files, state)
        link_metrics_ports(files, state)
    print(hints(files))


def hints(files: Files) -> str:
    return f"""
    source {readable(files.environment)}
    ray job submit --working-dir . -- python -m aster.train --recipe rl_stage1_18k --dry-run
    curl -H "Authorization: Bearer $ASTER_SANDBOX_TOKEN" -X POST $ASTER_SANDBOX_URL/v1/sessions
    the dashboard asks for the token in {readable(files.ray_token)}
"""


def readable(path: Path) -> str:
    """As the person in the checkout would type it."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


# --- down -------------------------------------------------------------------------------------------------------------


def down(files: Files) -> None:
    state = files.read_state()
    if state is None:
        print("cluster: none is up here")
        return
    if files.ray_token.exists() and read_process(state.pid) is not None:
        # Lets the sandbox service close its own sessions and containers. A head that is already dead cannot answer;
        # the sweeps below do not depend on it.
        with contextlib.suppress(OSError):
            url = f"http://127.0.0.1:{state.serve_port}/v1/sessions"
            request("DELETE", url, token=token_in(files.sandbox_token), timeout_s=DELETE_DEADLINE_S)
        with contextlib.suppress(OSError):
            url = f"{state.dashboard}/api/serve/applications/"
            request("DELETE", url, token=token_in(files.ray_token), timeout_s=DELETE_DEADLINE_S)
    processes = end_processes(state)
    containers = remove_containers(state)
    shutil.rmtree(state.temp_dir, ignore_errors=True)
    files.environment.unlink(missing_ok=True)
    files.metrics_ports.unlink(missing_ok=True)
    files.state.unlink()
    print(f"cluster: down; {processes} processes ended, {containers} containers removed")


def sandbox_on_cluster(args: argparse.Namespace) -> None:
    """Deploy the sandbox application on a cluster that runs already: one pool on each of `--nodes` sandbox nodes."""
    address = os.environ.get("RAY_DASHBOARD_ADDRESS", f"http://127.0.0.1:{args.dashboard_port}")
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    token_file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
    if not token and token_file.exists():
        token = token_file.read_text("utf-8").strip()
    # `sandbox` is the custom resource that deploy/ray-cluster.yaml and deploy/kuberay give sandbox nodes.
    config = serve_config(
        SERVE_FILE,
        port=args.serve_port,
        backend=args.backend,
        replicas=args.nodes,
        one_per_node=True,
        resources={"sandbox": 0.01},
        socket_root=args.socket_root,
    )
    deploy_sandbox(address, config, token=token)
    print(f"cluster: sandbox service is up on {args.nodes} node(s)")


def ray_launcher(verb: str, cluster: str) -> None:
    """`ray up` or `ray down` with a cluster file. Both sides need one token: it is made here, the file copies it."""
    if not Path(cluster).is_file():
        raise ClusterError(f"no cluster file {cluster!r}; deploy/ray-cluster.yaml is the one to copy")
    environment = os.environ | {"RAY_AUTH_MODE": "token"}
    token = Path(environment.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
    if verb == "up" and not token.exists():
        subprocess.run([str(BIN / "ray"), "get-auth-token", "--generate"], check=True, stdout=subprocess.DEVNULL)
    status = subprocess.run([str(BIN / "ray"), verb, "--yes", cluster], env=environment, check=False).returncode
    if status:
        raise ClusterError(f"`ray {verb} {cluster}` ended with status {status}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("up", "down", "sandbox"), help="sandbox: deploy it on a running cluster")
    parser.add_argument("--cluster", help="a cluster file for `ray up`; default: a cluster of this machine alone")
    parser.add_argument(
        "--cache", type=Path, default=ROOT / ".cache", help="where state and tokens are kept (%(default)s)"
    )
    parser.add_argument("--port", type=int, default=6379)
    parser.add_argument("--dashboard-port", type=int, default=8265)
    parser.add_argument("--serve-port", type=int, default=8000)
    parser.add_argument(
        "--serve",
        choices=tuple(SERVE_MODES),
        default="throughput",
        help="how HTTP passes through Serve (%(default)s); haproxy takes a fraction of the time, but listens on every "
        "interface, also on 8404 and 9101",
    )
    parser.add_argument("--num-cpus", type=int, help="logical CPUs of the head; default: all")
    parser.add_argument(
        "--backend", choices=("auto", "docker", "bwrap", "process"), help="default: .cache/sandbox_backend"
    )
    parser.add_argument(
        "--sandbox", action=argparse.BooleanOptionalAction, default=True, help="deploy deploy/serve.yaml"
    )
    parser.add_argument("--nodes", type=int, default=1, help="sandbox nodes, for the verb `sandbox`")
    parser.add_argument("--socket-root", help="directory that Docker sees under the same path, for the verb `sandbox`")
    args = parser.parse_args(argv)
    try:
        if args.verb == "sandbox":
            sandbox_on_cluster(args)
        elif args.cluster:
            ray_launcher(args.verb, args.cluster)
        elif args.verb == "up":
            up(Files(args.cache.absolute()), args)
        else:
            down(Files(args.cache.absolute()))
    except ClusterError as error:
        print(f"cluster: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
