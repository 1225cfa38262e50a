"""Is the final answer right? Two verifiers as pure functions, and the pool that runs slow ones outside our process.

`strict` (the training default) is exact string equality of the last `\\boxed{}`; `math_verify` (evaluation) is the
mathematical comparison of the math-verify package. Both see the final assistant turn only, with tool calls cut out.
A verifier that hangs or crashes is our failure (`RewardFailed`), never a wrong answer. Another package adds a reward of
its own through the entry point group `aster.rewards`; an agent loop names it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, Literal

from aster.data.answers import BOX, last_boxed
from aster.errors import ConfigError, RewardFailed
from aster.types import Verdicts

log = logging.getLogger(__name__)

STRICT_TAIL_CHARS = 100
"""The reference cuts to 300 and then to 100 characters, which is a cut to 100."""
MATH_VERIFY_TAIL_CHARS = 500
_VERIFY_CPU_S = 5.0
_START_S = 120.0  # a worker's import of math-verify (sympy, a parser) takes seconds, on a busy machine many


def strict_verdict(final_text: str, ground_truth: str) -> tuple[bool, str]:
    """(right, what was in the box). Exact string equality; no box, or one that never closes, is `""` and wrong.

    >>> strict_verdict("So it is \\\\boxed{34}.", "34"), strict_verdict("So it is \\\\boxed{ 34 }.", "34")
    ((True, '34'), (False, ' 34 '))
    """
    pred = last_boxed(final_text[-STRICT_TAIL_CHARS:])
    return pred is not None and pred == ground_truth, pred or ""


def math_verify_verdict(final_text: str, ground_truth: str) -> bool:
    """Whether the last 500 characters hold an answer equal to `ground_truth`: gold LaTeX, prediction Expr+LaTeX.

    Slow (milliseconds to seconds), importing sympy; may hang in arithmetic that cannot be interrupted. An answer that
    takes more than five seconds of CPU is wrong. math-verify's own limit is of the clock on the wall, and on a busy
    machine it would make right answers wrong. Main thread only (SIGPROF). Raises ValueError when the ground truth
    itself cannot be read.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    gold = parse(f"{BOX}{ground_truth}}}", (LatexExtractionConfig(),), parsing_timeout=None)
    if not gold:
        raise ValueError(f"math-verify cannot read the ground truth {ground_truth!r}")
    tail, kinds = final_text[-MATH_VERIFY_TAIL_CHARS:], (ExprExtractionConfig(), LatexExtractionConfig())
    try:
        with _limited_to(_VERIFY_CPU_S):
            return bool(verify(gold, parse(tail, kinds, parsing_timeout=None), timeout_seconds=None))
    except _TooMuchWork:
        return False


class _TooMuchWork(BaseException):
    """No `Exception`: math-verify takes those for an answer that it cannot read, and tries the next notation."""


@contextlib.contextmanager
def _limited_to(cpu_s: float) -> Iterator[None]:
    """Raises `_TooMuchWork` in the body after so many seconds of this process's CPU."""

    def strike(signum: int, frame: object) -> None:
        raise _TooMuchWork

    before = signal.signal(signal.SIGPROF, strike)
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


ENTRY_POINTS = "aster.rewards"


def named_reward(name: str) -> Callable[[str, str], float]:
    """An installed package's reward of (final_text, ground_truth). ConfigError with the names that exist."""
    known = metadata.entry_points(group=ENTRY_POINTS)
    if name not in known.names:
        have = ", ".join(sorted(known.names)) or "none"
        raise ConfigError(f"no reward {name!r} in the entry point group {ENTRY_POINTS!r}; there are: {have}")
    reward: Callable[[str, str], float] = known[name].load()
    return reward


def judge(name: str, final_text: str, ground_truth: str) -> float:
    """What a worker computes: 1.0 or 0.0 of math-verify (`name` = ""), or a named reward, which must be finite."""
    if not name:
        return float(math_verify_verdict(final_text, ground_truth))
    value = float(named_reward(name)(final_text, ground_truth))
    if not math.isfinite(value):
        raise ValueError(f"the reward {name!r} is {value}")
    return value


class RewardPool:
    """Scores answers; worker processes that never import torch run what is slow, one answer each at a time.

    A worker that is silent for `timeout_s` or dies is killed and replaced, and that answer raises RewardFailed; where
    the reward is `strict`, math-verify's opinion is only logged and its failure only leaves that verdict empty.
    Separate programs rather than multiprocessing: spawn would import the caller's main module, and with it torch.
    """

    def __init__(
        self,
        *,
        workers: int = 1,
        timeout_s: float = 10.0,
        reward: Literal["strict", "math_verify"] = "strict",
        math_verify: bool = True,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers={workers}: a reward pool needs at least one")
        self.reward = reward
        self.failures = 0
        self._ask_math_verify = math_verify or reward == "math_verify"
        self._timeout_s = timeout_s
        self._closed = False
        self._free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers: list[_Worker] = []
        self._count = workers
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="rewards")
        if self._ask_math_verify:
            self._start_workers()

    async def score_by(self, reward: str, final_text: str, ground_truth: str) -> tuple[float, Verdicts]:
        """(value of a package's reward, no verdicts: accuracy is then reward > 0.5). Raises RewardFailed."""
        try:
            return await self._ask(reward, final_text, ground_truth), Verdicts()
        except RewardFailed:
            self.failures += 1
            raise

    async def score(self, final_text: str, ground_truth: str) -> tuple[float, Verdicts]:
        """(reward 1.0 or 0.0, both verdicts). Raises RewardFailed when the verifier that decides did not answer."""
        strict, pred = strict_verdict(final_text, ground_truth)
        verified: bool | None = None
        if self._ask_math_verify:
            try:
                verified = await self._ask("", final_text[-MATH_VERIFY_TAIL_CHARS:], ground_truth) == 1.0
            except RewardFailed as error:
                self.failures += 1
                if self.reward == "math_verify":
                    raise
                log.warning("math-verify has no opinion on one answer: %s", error)
        right = verified if self.reward == "math_verify" else strict
        return float(bool(right)), Verdicts(strict=strict, math_verify=verified, pred=pred)

    def close(self) -> None:
        """Kill the workers; an answer in the making raises RewardFailed. Idempotent."""
        self._closed = True
        for worker in self._workers:
            worker.close()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _start_workers(self) -> None:
        self._workers = [_Worker() for _ in range(self._count)]
        for worker in self._workers:
            self._free.put(worker)

    async def _ask(self, reward: str, final_text: str, ground_truth: str) -> float:
        if self._closed:
            raise RewardFailed("the reward pool is closed")
        if not self._workers:  # the recipe needs none, but a loop brought a reward of its own
            self._start_workers()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._judge, reward, final_text, ground_truth)

    def _judge(self, reward: str, final_text: str, ground_truth: str) -> float:
        """Runs in one of as many threads as there are workers, so that a worker is always free."""
        worker = self._free.get(timeout=_START_S)
        try:
            return worker.ask(final_text, ground_truth, reward=reward, timeout_s=self._timeout_s)
        finally:
            self._free.put(worker)


class _Worker:
    """One verifier process, replaced when it is silent or dies. `ask` in one thread at a time, `close` from any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # a process must not be started after close()
        self._closed = False
        self._start()

    def _start(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._pipe, theirs = Pipe()
            root = str(Path(__file__).parents[2])
            path = os.environ.get("PYTHONPATH")
            self._process = subprocess.Popen(
                [sys.executable, "-m", "aster.agent.verifier", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={
                    **os.environ,
                    "PYTHONPATH": root if not path else f"{root}{os.pathsep}{path}",
                    "OMP_NUM_THREADS": "1",
                    "OPENBLAS_NUM_THREADS": "1",
                },
            )
            theirs.close()
            self._ready = False

    def ask(self, final_text: str, ground_truth: str, *, timeout_s: float, reward: str = "") -> float:
        """Raises RewardFailed. A process that is silent or dead is replaced at once, so that the next one is warm."""
        try:
            if not self._ready:
                self._receive(_START_S)
                self._ready = True
            self._pipe.send_bytes(json.dumps([reward, final_text, ground_truth, timeout_s]).encode())
            answer = self._receive(timeout_s)
        except (TimeoutError, EOFError, OSError) as error:
            self._kill()
            self._pipe.close()
            self._start()
            how = str(error) if isinstance(error, TimeoutError) else f"died ({error!r})"
            raise RewardFailed(f"the verifier {how}, comparing with {ground_truth!r}") from error
        if "error" in answer:
            raise RewardFailed(f"the verifier could not compare with {ground_truth!r}: {answer['error']}")
        return float(answer["value"])

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        if not self._pipe.poll(timeout_s):
            raise TimeoutError(f"was silent for {timeout_s:g} s")
        return dict(json.loads(self._pipe.recv_bytes()))

    def _kill(self) -> None:
        self._process.kill()
        self._process.wait(timeout=10)

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self._kill()
