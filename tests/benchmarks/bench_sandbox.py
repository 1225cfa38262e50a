"""Latency, throughput and memory of the sandbox, each beside a yardstick of the same round (`yardsticks.py`).

    python tests/benchmarks/bench_sandbox.py [--backend docker|bwrap] [--rounds 5] [--no-serve]

Prints one JSON line: medians over the rounds, in seconds, bytes or ratios, and `targets` with what must hold. Not a
test: figures depend on the machine. First the node alone (the pool in this process, gRPC over the cell's socket); then,
with Ray running, the deployment handle, and HTTP in turns with a Serve application of two hops that does nothing.
Serve runs in its throughput mode, as `make cluster-up` has it; `RAY_SERVE_THROUGHPUT_OPTIMIZED=0` or
`RAY_SERVE_ENABLE_HA_PROXY=1`, set outside, measure its other modes.
"""

import argparse
import asyncio
import json
import os
import resource
import socket
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[2]))
from yardsticks import CELL, Figures, Yardsticks, timed, times

from serve.cells.link import start_cell
from serve.pool import SandboxPool
from serve.schema import CreateSession, ExecuteRequest, ForkSession
from serve.sessions import SandboxService
from serve.settings import PoolSettings

AT_LEAST = {
    "node_p50_vs_b": 400,
    "node_p95_vs_b": 150,
    "handle_p50_vs_b": 100,
    "http_p50_vs_b": 30,
    "node_fresh_p50_vs_b": 20,
    "node_16_clients_vs_b": 300,
    "http_16_clients_vs_b": 25,
}
AT_MOST = {
    "http_over_noop": 2.0,
    "with_50_mb_array_ratio": 1.2,
    "print_2_mb_s": 0.2,
    "timeout_overshoot_kept_s": 0.2,
    "timeout_overshoot_killed_s": 2.2,
    "close_p95_s": 0.05,
    "recycle_s": 0.05,
    "cold_cell_s": 3.0,
    "private_bytes_per_session": 5 << 20,
}
_CALLS = 60
_CLIENTS = (1, 4, 16)
_REQUEST = ExecuteRequest(code=CELL)
_TOKEN = {"Authorization": "Bearer bench"}

Call = Callable[[], Awaitable[Any]]


class Node:
    """One pool in this process, with the sessions that every round uses."""

    def __init__(self, pool: SandboxPool) -> None:
        self.pool = pool

    async def start(self) -> None:
        await self.pool.start()
        self._empty = await self._session()
        self._big = await self._session("import numpy as np; a = np.ones(50 << 17)")
        self._many = await self._session("objects = [{'n': n} for n in range(100_000)]")
        self._stubborn = await self._session()

    async def _session(self, code: str = CELL) -> str:
        session_id = (await self.pool.create(CreateSession())).session_id
        answer = await self.pool.execute(session_id, ExecuteRequest(code=code))
        assert answer.status == "ok", answer
        return session_id

    async def round(self, figures: Figures, yardsticks: Yardsticks) -> None:
        pool, execute = self.pool, self.pool.execute
        b = [yardsticks.new_python()]
        seconds = await times(_CALLS, lambda: execute(self._empty, _REQUEST))
        b.append(yardsticks.new_python())
        figures.add_latency("node", seconds, b=b)
        figures.add("new_python_s", sum(b) / 2)
        figures.add("pipe_s", sorted(yardsticks.pipe() for _ in range(_CALLS))[_CALLS // 2])
        await self._lives(figures, b)
        for name, session in (("50_mb_array", self._big), ("100k_objects", self._many)):
            figures.add(f"with_{name}_ratio", await self._ratio(session))
        two_mb = ExecuteRequest(code="print('x' * (2 << 20))")
        figures.add("print_2_mb_s", min(await times(3, lambda: execute(self._empty, two_mb))))
        slow = ExecuteRequest(code="import time; time.sleep(9)", timeout_s=0.2)
        figures.add("timeout_overshoot_kept_s", (await execute(self._empty, slow)).duration_s - 0.2)
        ignoring = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass"
        killed = await execute(self._stubborn, ExecuteRequest(code=ignoring, timeout_s=0.2))
        figures.add("timeout_overshoot_killed_s", killed.duration_s - 0.2)
        await execute(self._stubborn, _REQUEST)  # a fresh interpreter
        for clients in _CLIENTS:
            rate = await throughput(pool, clients)
            figures.add(f"node_{clients}_clients_per_s", rate)
            figures.add(f"node_{clients}_clients_vs_b", rate * sum(b) / 2)
        figures.add("private_bytes_per_session", await self._private_bytes())
        figures.add("cold_cell_s", await self._cold_cell())

    async def _lives(self, figures: Figures, b: list[float]) -> None:
        """Beginnings, copies and ends of sessions, of warm slots."""
        fresh, closes, recycles = [], [], []
        for _ in range(6):
            await self._warm()
            began = time.perf_counter()
            other = (await self.pool.create(CreateSession())).session_id
            await self.pool.execute(other, _REQUEST)
            fresh.append(time.perf_counter() - began)
            closed = time.perf_counter()
            await self.pool.close(other)
            closes.append(time.perf_counter() - closed)
            await self._warm()
            recycles.append(time.perf_counter() - closed)
        figures.add_latency("node_fresh", fresh, b=b)
        figures.add("close_p50_s", sorted(closes)[3])
        figures.add("close_p95_s", max(closes))
        figures.add("recycle_s", sorted(recycles)[3])
        copies: list[str] = []

        async def fork() -> None:
            answer = await self.pool.fork(self._empty, ForkSession(count=4))
            copies.extend(copy.session_id for copy in answer.sessions)

        figures.add("fork_per_copy_s", await timed(fork) / 4)
        for copy in copies:
            await self.pool.close(copy)

    async def _warm(self) -> None:
        """Until every cell has forked its warm sessions again."""
        while True:
            states = [await cell.link.status() for cell in self.pool.fleet.cells]
            if all(state.warm >= min(self.pool.settings.warm_sessions, state.free) for state in states):
                return
            await asyncio.sleep(0.001)

    async def _ratio(self, session: str) -> float:
        pairs = []
        for _ in range(_CALLS):
            alone = await timed(lambda: self.pool.execute(self._empty, _REQUEST))
            pairs.append(await timed(lambda: self.pool.execute(session, _REQUEST)) / alone)
        return sorted(pairs)[_CALLS // 2]

    async def _private_bytes(self) -> float:
        """Of a fresh session, numpy, scipy and sympy ready, as it counts its own pages."""
        code = (
            # touches no other module's name: to count a reference is to copy a page
            "import sys\nassert 'numpy' in sys.modules and 'scipy' in sys.modules and 'sympy' in sys.modules\n"
            "sum(int(l.split()[1]) for l in open('/proc/self/smaps_rollup') if l.startswith('Private')) * 1024"
        )
        session = await self._session()
        answer = await self.pool.execute(session, ExecuteRequest(code=code))
        await self.pool.close(session)
        assert answer.result, answer
        return int(answer.result)

    async def _cold_cell(self) -> float:
        began = time.perf_counter()
        link = await start_cell(self.pool.backend, timeout_s=60)
        seconds = time.perf_counter() - began
        await link.disconnect()
        await self.pool.backend.remove(link.cell)
        return seconds


async def throughput(service: SandboxService, clients: int) -> float:
    """Calls per second over all clients, a session each."""
    sessions = [(await service.create(CreateSession())).session_id for _ in range(clients)]
    for session in sessions:
        await service.execute(session, _REQUEST)

    async def client(session: str) -> None:
        for _ in range(_CALLS // 2):
            await service.execute(session, _REQUEST)

    seconds = await timed(lambda: asyncio.gather(*(client(session) for session in sessions)))
    for session in sessions:
        await service.close(session)
    return clients * (_CALLS // 2) / seconds


class Served:
    """The application on a local Ray, by handle and by HTTP, beside one that does nothing."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    async def start(self) -> None:
        from actors.sandbox import pool_calls
        from serve.client import AsyncSandboxClient

        self._handle = pool_calls()
        self._http = httpx.AsyncClient(base_url=self._url, headers=_TOKEN, trust_env=False)
        self._client = AsyncSandboxClient(self._url, token="bench")
        self._by_handle = (await self._handle.create(CreateSession())).session_id
        self._by_http = (await self._client.create(CreateSession())).session_id

    async def round(self, figures: Figures, yardsticks: Yardsticks) -> None:
        b = [yardsticks.new_python()]
        handle = await times(_CALLS, lambda: self._handle.execute(self._by_handle, _REQUEST))
        b.append(yardsticks.new_python())
        figures.add_latency("handle", handle, b=b)
        path, body = f"/v1/sessions/{self._by_http}/execute", {"code": CELL}
        http: list[float] = []
        noop: list[float] = []
        b = [yardsticks.new_python()]
        for _ in range(_CALLS // 10):  # in turns, so that both see the same load
            http += await times(10, lambda: self._http.post(path, json=body))
            noop += await times(10, lambda: self._http.post("/noop/", json=body))
        b.append(yardsticks.new_python())
        figures.add_latency("http", http, b=b)
        figures.add_latency("noop", noop, b=b)
        figures.add("http_over_noop", sorted(http)[len(http) // 2] / sorted(noop)[len(noop) // 2])
        for clients in _CLIENTS:
            rate = await throughput(self._client, clients)
            figures.add(f"http_{clients}_clients_per_s", rate)
            figures.add(f"http_{clients}_clients_vs_b", rate * sum(b) / 2)

    async def stop(self) -> None:
        await self._handle.close(self._by_handle)
        await self._client.close(self._by_http)
        await self._http.aclose()
        await self._client.aclose()


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
    behind = serve.deployment(name="Nothing", **light)(Nothing).bind()  # type: ignore[arg-type]  # ** of a plain dict
    front = serve.deployment(name="Front", **light)(Front)  # type: ignore[arg-type]  # as above
    serve.run_many([serve.RunTarget(target=front.bind(behind), name="noop", route_prefix="/noop")])


@contextmanager
def local_serve(backend: str) -> Iterator[Served]:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")
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
            deploy_sandbox(SandboxConfig(backend=backend, http_port=port), token="bench")  # type: ignore[arg-type]  # argparse has checked it
            deploy_noop()
            yield Served(port)
        finally:
            serve.shutdown()
            ray.shutdown()


async def at_the_node(pool: SandboxPool, figures: Figures, *, rounds: int) -> None:
    node = Node(pool)
    try:
        await node.start()
        with Yardsticks() as yardsticks:
            for _ in range(rounds):
                await node.round(figures, yardsticks)
    finally:
        await pool.stop()


async def over_serve(served: Served, figures: Figures, *, rounds: int) -> None:
    await served.start()
    with Yardsticks() as yardsticks:
        for _ in range(rounds):
            await served.round(figures, yardsticks)
    await served.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="auto", choices=["auto", "docker", "bwrap", "process"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-serve", action="store_true", help="only the pool in this process, without Ray")
    args = parser.parse_args()
    figures = Figures()
    pool = SandboxPool(PoolSettings(backend=args.backend, max_sessions=64, max_running=16), node="bench")
    asyncio.run(at_the_node(pool, figures, rounds=args.rounds))
    if not args.no_serve:
        with local_serve(args.backend) as served:
            asyncio.run(over_serve(served, figures, rounds=args.rounds))
    out: dict[str, Any] = {"backend": pool.backend.name, "rounds": args.rounds, "cores": len(os.sched_getaffinity(0))}
    out |= {name: float(f"{value:.4g}") for name, value in figures.medians().items()}
    out["serve_environment"] = {k: v for k, v in os.environ.items() if k.startswith("RAY_SERVE_")}
    out["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    out["targets"] = figures.verdicts(AT_LEAST, AT_MOST)
    print(json.dumps(out))


if __name__ == "__main__":
    main()
