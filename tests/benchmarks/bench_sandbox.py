"""Latency and memory of the sandbox against two yardsticks that are measured in the same run, interleaved with it.

    B  a new `python -c "import numpy, sympy; exec(cell)"` per call: what a stateless sandbox costs
    L  a persistent interpreter over a pipe: what no sandbox can beat

    python tests/benchmarks/bench_sandbox.py [--backend docker|bwrap] [--serve]      one JSON line; seconds, bytes

Not a test: ratios depend on the machine. `--serve` adds the deployment handle and HTTP on a local Ray.
"""

import argparse
import asyncio
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from serve.pool import PoolSettings, SandboxPool
from serve.schema import CreateSession, ExecuteRequest

CELL = "x = 1\nx + 1"
_ECHO = "import sys\nfor line in sys.stdin:\n    exec('x = 1\\nx + 1'); print('2', flush=True)"


def percentiles(seconds: list[float]) -> dict[str, float]:
    return {"p50": float(np.percentile(seconds, 50)), "p95": float(np.percentile(seconds, 95)), "n": len(seconds)}


async def timed(call: Callable[[], Awaitable[Any]]) -> float:
    began = time.perf_counter()
    await call()
    return time.perf_counter() - began


class Baselines:
    """B and L, a few calls at a time, so that every figure is taken under the same load as its yardsticks."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._environment = environment
        self._pipe = subprocess.Popen(
            [sys.executable, "-c", _ECHO], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self.b: list[float] = []
        self.limit: list[float] = []

    def take(self, *, b: int, limit: int) -> None:
        code = f"import numpy, sympy; exec({CELL!r})"
        for _ in range(b):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, env=self._environment, timeout=60)
            self.b.append(time.perf_counter() - began)
        assert self._pipe.stdin is not None
        assert self._pipe.stdout is not None
        for _ in range(limit):
            began = time.perf_counter()
            self._pipe.stdin.write(b"\n")
            self._pipe.stdin.flush()
            self._pipe.stdout.readline()
            self.limit.append(time.perf_counter() - began)

    def close(self) -> None:
        assert self._pipe.stdin is not None
        self._pipe.stdin.close()
        self._pipe.wait(10)


async def follow_ups(
    call: Callable[[], Awaitable[Any]], baselines: Baselines, *, rounds: int, calls: int
) -> list[float]:
    out: list[float] = []
    for _ in range(rounds):
        baselines.take(b=1, limit=calls // 4)
        out += [await timed(call) for _ in range(calls)]
    return out


async def at_the_node(backend: str, baselines: Baselines) -> dict[str, Any]:
    began = time.perf_counter()
    pool = SandboxPool(PoolSettings(backend=backend, max_sessions=64, max_running=16), node="bench")
    await pool.start()
    out: dict[str, Any] = {"backend": pool.backend.name, "pool_start_s": time.perf_counter() - began}
    try:
        session = (await pool.create(CreateSession())).session_id
        request = ExecuteRequest(code=CELL)
        out["follow_up"] = percentiles(
            await follow_ups(lambda: pool.execute(session, request), baselines, rounds=6, calls=100)
        )
        fresh, closes = [], []
        for _ in range(12):
            baselines.take(b=0, limit=5)
            await asyncio.sleep(0.15)  # a slot is refilled in the background; this measures a warm one
            began = time.perf_counter()
            other = (await pool.create(CreateSession())).session_id
            await pool.execute(other, request)
            fresh.append(time.perf_counter() - began)
            closes.append(await timed(lambda other=other: pool.close(other)))  # type: ignore[misc]
        out["fresh_session_and_first_call"], out["close"] = percentiles(fresh), percentiles(closes)
        big = (await pool.create(CreateSession())).session_id
        await pool.execute(big, ExecuteRequest(code="import numpy as np; a = np.ones(50 << 17)"))
        pairs = []
        for _ in range(100):
            one = await timed(lambda: pool.execute(session, request))
            pairs.append((await timed(lambda: pool.execute(big, request))) / one)
        out["with_50_mb_array_ratio"] = float(np.median(pairs))
        two_mb = ExecuteRequest(code="print('x' * (2 << 20))")
        out["print_2_mb"] = percentiles([await timed(lambda: pool.execute(session, two_mb)) for _ in range(5)])
        over = []
        for _ in range(3):
            answer = await pool.execute(session, ExecuteRequest(code="import time; time.sleep(9)", timeout_s=0.2))
            over.append(answer.duration_s - 0.2)
        out["timeout_overshoot_kept"] = max(over)
        stubborn = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass"
        killed = await pool.execute(big, ExecuteRequest(code=stubborn, timeout_s=0.2))
        out["timeout_overshoot_killed"] = killed.duration_s - 0.2
        out["throughput_16_clients"] = await throughput(pool, 16, 60)
        out["private_bytes_per_session"] = await private_bytes(pool)
    finally:
        began = time.perf_counter()
        await pool.stop()
        out["pool_stop_s"] = time.perf_counter() - began
    return out


async def throughput(pool: SandboxPool, clients: int, calls: int) -> float:
    """Calls per second over all clients."""
    sessions = [(await pool.create(CreateSession())).session_id for _ in range(clients)]
    request = ExecuteRequest(code=CELL)

    async def client(session: str) -> None:
        for _ in range(calls):
            await pool.execute(session, request)

    began = time.perf_counter()
    await asyncio.gather(*(client(session) for session in sessions))
    seconds = time.perf_counter() - began
    for session in sessions:
        await pool.close(session)
    return clients * calls / seconds


async def private_bytes(pool: SandboxPool) -> float:
    """Median memory that a session has to itself, numpy, scipy and sympy ready, as it counts its own pages."""
    code = (
        "import sys\nassert 'numpy' in sys.modules and 'scipy' in sys.modules and 'sympy' in sys.modules\n"
        "sum(int(l.split()[1]) for l in open('/proc/self/smaps_rollup') if l.startswith('Private')) * 1024"
    )
    values = []
    for _ in range(4):
        session = (await pool.create(CreateSession())).session_id
        await pool.execute(session, ExecuteRequest(code=CELL))
        values.append(int((await pool.execute(session, ExecuteRequest(code=code))).result or 0))
    return float(np.median(values))


async def over_serve(port: int, baselines: Baselines) -> dict[str, Any]:
    import httpx

    from actors.sandbox import HandleSandboxFactory

    sandbox = await HandleSandboxFactory().open("bench")
    handle = await follow_ups(lambda: sandbox.execute(CELL, timeout_s=30, call_id=""), baselines, rounds=4, calls=100)
    await sandbox.close()
    headers = {"Authorization": "Bearer bench"}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers, trust_env=False) as client:
        session = (await client.post("/v1/sessions")).json()["session_id"]
        path = f"/v1/sessions/{session}/execute"
        http, noop = [], []
        for _ in range(8):  # in turns, so that both see the same load
            http += await follow_ups(lambda: client.post(path, json={"code": CELL}), baselines, rounds=1, calls=25)
            noop += [await timed(lambda: client.post("/noop/", json={"code": CELL})) for _ in range(25)]
    return {
        "handle_follow_up": percentiles(handle),
        "http_follow_up": percentiles(http),
        "http_noop_two_hops": percentiles(noop),
    }


def deploy_noop() -> None:
    """What Serve itself costs on the same way: proxy, ingress, a second deployment that does nothing."""
    from fastapi import FastAPI
    from ray import serve
    from ray.serve.handle import DeploymentHandle

    api = FastAPI()

    class Nothing:
        async def execute(self, body: dict[str, Any]) -> dict[str, Any]:
            return body

    @serve.ingress(api)
    class Front:
        def __init__(self, behind: DeploymentHandle) -> None:
            self._behind = behind.options(method_name="execute", _by_reference=False)

        @api.post("/")
        async def execute(self, body: dict[str, Any]) -> Any:
            return await self._behind.remote(body)

    light = {"ray_actor_options": {"num_cpus": 0}, "max_ongoing_requests": 256}
    behind = serve.deployment(name="Nothing", **light)(Nothing).bind()  # type: ignore[arg-type]
    front = serve.deployment(name="Front", **light)(Front)  # type: ignore[arg-type]
    serve.run(front.bind(behind), name="noop", route_prefix="/noop")


def with_serve(backend: str, baselines: Baselines) -> dict[str, Any]:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    import ray
    from ray import serve

    from actors.sandbox import deploy_sandbox
    from aster.config import SandboxConfig

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with tempfile.TemporaryDirectory(prefix="rb", dir="/tmp", ignore_cleanup_errors=True) as directory:
        ray.init(include_dashboard=False, _temp_dir=directory, log_to_driver=False, num_cpus=2)
        try:
            deploy_sandbox(SandboxConfig(backend=backend, http_port=port), token="bench")  # type: ignore[arg-type]
            deploy_noop()
            return asyncio.run(over_serve(port, baselines))
        finally:
            serve.shutdown()
            ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="auto", choices=["auto", "docker", "bwrap", "process"])
    parser.add_argument("--serve", action="store_true")
    args = parser.parse_args()
    baselines = Baselines()
    out = asyncio.run(at_the_node(args.backend, baselines))
    if args.serve:
        out |= with_serve(out["backend"], baselines)
    baselines.close()
    out["baseline_new_python"], out["limit_pipe"] = percentiles(baselines.b), percentiles(baselines.limit)
    base = out["baseline_new_python"]["p50"]
    out["times_faster_than_new_python"] = {
        name: base / out[name]["p50"]
        for name in ("follow_up", "fresh_session_and_first_call", "handle_follow_up", "http_follow_up")
        if name in out
    } | {"follow_up_p95": out["baseline_new_python"]["p95"] / out["follow_up"]["p95"]}
    if args.serve:
        out["http_over_noop"] = out["http_follow_up"]["p50"] / out["http_noop_two_hops"]["p50"]
    out["throughput_vs_new_python"] = out["throughput_16_clients"] * base
    out["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(out))


if __name__ == "__main__":
    main()
