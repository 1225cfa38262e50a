"""What the sandbox is measured against, and how: two yardsticks, taken in turns with every figure.

    B  a new `python -c "import numpy, sympy; exec(cell)"` per call: what a stateless sandbox costs
    L  a persistent interpreter over a pipe: what no sandbox can beat

A figure is a ratio within its round: both sides of it saw the same load. What is reported is the median over rounds.
"""

import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any

import numpy as np

CELL = "x = 1\nx + 1"
_ECHO = "import sys\nfor line in sys.stdin:\n    exec('x = 1\\nx + 1'); print('2', flush=True)"


async def timed(call: Callable[[], Awaitable[Any]]) -> float:
    """Seconds."""
    began = time.perf_counter()
    await call()
    return time.perf_counter() - began


async def times(count: int, call: Callable[[], Awaitable[Any]]) -> list[float]:
    return [await timed(call) for _ in range(count)]


class Yardsticks:
    """B and L of this machine, as it is now."""

    def __init__(self) -> None:
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

    def __enter__(self) -> "Yardsticks":
        self._pipe = subprocess.Popen(
            [sys.executable, "-c", _ECHO], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self._environment
        )
        self.new_python()  # from a warm disk from here on
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._pipe.stdin is not None
        self._pipe.stdin.close()
        self._pipe.wait(10)

    def new_python(self) -> float:
        """B, seconds."""
        code = f"import numpy, sympy; exec({CELL!r})"
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, env=self._environment, timeout=60)
        return time.perf_counter() - began

    def pipe(self) -> float:
        """L, seconds."""
        assert self._pipe.stdin is not None
        assert self._pipe.stdout is not None
        began = time.perf_counter()
        self._pipe.stdin.write(b"\n")
        self._pipe.stdin.flush()
        self._pipe.stdout.readline()
        return time.perf_counter() - began


class Figures:
    """Numbers by name, one per round, and what must become of them."""

    def __init__(self) -> None:
        self._rounds: dict[str, list[float]] = defaultdict(list)

    def add(self, name: str, value: float) -> None:
        self._rounds[name].append(float(value))

    def add_latency(self, name: str, seconds: list[float], *, b: list[float]) -> None:
        """Its p50 and p95, and how many times faster than this round's B each is."""
        p50, p95 = np.percentile(seconds, (50, 95))
        self.add(f"{name}_p50_s", p50)
        self.add(f"{name}_p95_s", p95)
        self.add(f"{name}_p50_vs_b", statistics.median(b) / p50)
        self.add(f"{name}_p95_vs_b", statistics.median(b) / p95)

    def medians(self) -> dict[str, float]:
        return {name: statistics.median(values) for name, values in self._rounds.items()}

    def verdicts(self, at_least: dict[str, float], at_most: dict[str, float]) -> dict[str, dict[str, Any]]:
        """For each figure that was taken: its median, the bound, and whether it holds."""
        medians = self.medians()
        out: dict[str, dict[str, Any]] = {}
        for name, bound in at_least.items():
            if name in medians:
                out[name] = {"is": medians[name], "must": f">= {bound:g}", "met": medians[name] >= bound}
        for name, bound in at_most.items():
            if name in medians:
                out[name] = {"is": medians[name], "must": f"<= {bound:g}", "met": medians[name] <= bound}
        return out
