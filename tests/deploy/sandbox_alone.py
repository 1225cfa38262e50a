"""Serves one cell over HTTP from an environment that has the `sandbox` extra only. Run by `make test-sandbox-extra`.

Not a pytest module: that environment has no pytest either. Ends with status 0, or with what is wrong.
"""

import contextlib
import importlib.util
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_UP_S = 300


def main() -> None:
    began = time.monotonic()
    present = [name for name in ("torch", "vllm", "transformers") if importlib.util.find_spec(name)]
    assert not present, f"this is to be shown without {present}: use an environment of the sandbox extra"
    import serve.app
    from serve.blocking import SandboxClient

    ours = {name.partition(".")[0] for name in sys.modules}
    assert not ours & {"aster", "actors"}, "serve must not import the trainer"
    with (
        tempfile.TemporaryDirectory() as cache,
        cluster(Path(cache)) as (url, token),
        SandboxClient(url, token=token) as client,
        client.session() as session,
    ):
        session.execute("import numpy, scipy, sympy\nx = sympy.Symbol('x')")
        answer = session.execute("print(sympy.factor(x**2 - 1))")
        assert answer.text == "(x - 1)*(x + 1)\n", answer
        print(f"one cell on {client.health().backend}: {answer.text.strip()}, {time.monotonic() - began:.0f} s")
    assert serve.app.APP_NAME == "sandbox"


@contextlib.contextmanager
def cluster(cache: Path) -> Iterator[tuple[str, str]]:
    """A Ray head of its own with deploy/serve.yaml on it. Yields the service's URL and token."""
    # by its path: with tests/ on sys.path, tests/sandbox_image would stand for the package
    port, dashboard, http = runpy.run_path(str(ROOT / "tests" / "ports.py"))["free_ports"](3)
    command = [sys.executable, str(ROOT / "deploy" / "cluster.py")]
    where = ["--cache", str(cache), "--port", str(port), "--dashboard-port", str(dashboard), "--serve-port", str(http)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"RAY_USAGE_STATS_ENABLED": "0"}
    try:
        subprocess.run([*command, "up", *where, "--backend", backend()], check=True, timeout=_UP_S, env=environment)
        token = (cache / "cluster" / "sandbox_token").read_text("utf-8").strip()
        yield f"http://127.0.0.1:{http}", token
    finally:
        subprocess.run([*command, "down", *where], check=True, timeout=_UP_S, env=environment)


def backend() -> str:
    """What a user's first deployment gets; without a container runtime the point can still be shown."""
    from serve.cells import BackendUnavailable, CellSettings, choose_backend

    try:
        return choose_backend("auto", CellSettings()).name
    except BackendUnavailable:
        return "process"


if __name__ == "__main__":
    main()
