"""Room on an engine, in seats and in tokens of its KV cache. Bookkeeping only: no asyncio, no engine is called.

An engine has room for one more trajectory while a seat is free and what runs on it will probably fit when it is done:

    sum of mean lengths + 2 * sqrt(sum of variances) <= kv_tokens

Lengths (prompt and response) are those that trajectories of the same kind ended with. Before any has, half the budget
is assumed; in the first minutes of a run the short ones have ended and the long ones have not, so that assumption fades
only slowly. vLLM preempts what does not fit after all and computes it again: a wrong guess costs time, nothing else.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from math import sqrt
from typing import Protocol

_PRIOR = 16  # finished trajectories that the assumption weighs as much as
_MEMORY = 1024  # finished trajectories after which an old one no longer counts: lengths drift as the policy learns
_DEVIATIONS = 2.0


class Seats(Protocol):
    """What is known of an engine. `kv_tokens` 0 = not known: only seats count then."""

    name: str
    capacity: int
    kv_tokens: int


@dataclass
class Lengths:
    """Running mean and variance of the tokens of finished trajectories of one kind."""

    mean: float
    variance: float
    count: int = _PRIOR

    @classmethod
    def of_budget(cls, max_tokens: int) -> Lengths:
        """Half the budget, give or take a quarter."""
        return cls(mean=max_tokens / 2, variance=(max_tokens / 4) ** 2)

    def observe(self, tokens: int) -> None:
        self.count = min(self.count + 1, _MEMORY)
        off = tokens - self.mean
        self.mean += off / self.count
        self.variance += (off * (tokens - self.mean) - self.variance) / self.count


class Room:
    """What runs where, and what it will probably need."""

    def __init__(self) -> None:
        self._lengths: dict[str, Lengths] = {}
        self._running: defaultdict[str, Counter[str]] = defaultdict(Counter)  # engine -> kind -> trajectories
        self._seated: Counter[str] = Counter()

    def expect(self, kind: str, max_tokens: int) -> None:
        """A kind of trajectory whose budget is `max_tokens`. The first word counts; what is observed corrects it."""
        if kind not in self._lengths:
            self._lengths[kind] = Lengths.of_budget(max_tokens)

    def observe(self, kind: str, tokens: int) -> None:
        self._lengths[kind].observe(tokens)

    def enter(self, engine: str, kind: str) -> None:
        self._running[engine][kind] += 1
        self._seated[engine] += 1

    def leave(self, engine: str, kind: str) -> None:
        self._running[engine][kind] -= 1
        self._seated[engine] -= 1

    def fits(self, engine: Seats, kind: str) -> bool:
        """One more of `kind`. A lone trajectory always does: nothing else could make room for it."""
        seated = self._seated[engine.name]
        if seated >= engine.capacity:
            return False
        return not seated or not engine.kv_tokens or self.tokens(engine.name, kind) <= engine.kv_tokens

    def share(self, engine: Seats) -> float:
        """How full it is, 0 to 1, by what is scarcer."""
        seats = self._seated[engine.name] / engine.capacity
        return max(seats, self.tokens(engine.name) / engine.kv_tokens) if engine.kv_tokens else seats

    def tokens(self, engine: str, more: str | None = None) -> float:
        """What runs there will need at most, probably; with one more of kind `more`."""
        mean = variance = 0.0
        for kind, count in self._running[engine].items():
            count += kind == more
            mean += count * self._lengths[kind].mean
            variance += count * self._lengths[kind].variance
        if more is not None and more not in self._running[engine]:
            mean += self._lengths[more].mean
            variance += self._lengths[more].variance
        return mean + _DEVIATIONS * sqrt(variance)
