"""The synthetic tool-use tasks of the CPU recipes: problems, their answers, and two ways to work them out.

Short multi-step arithmetic, number theory and counting: hard in the head, easy with a few stateful tool calls. A
problem knows its exact answer (computed here, never by a model), a *plan* (cells for one Python session, where later
cells use the names of earlier ones) and its *head work* (the same computation written out by hand). Turning a plan
into a conversation means executing it, which `coldstart.py` does; nothing is executed in this module.

The split is a property of the problem text alone (`is_heldout`), so no seed, size or order can mix the two sides.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from aster.data.prompts import user_message
from aster.errors import DataError
from aster.types import PromptRow

DATA_SOURCE = "aster_tasks"

HELDOUT_PERCENT = 10


@dataclass(frozen=True)
class Problem:
    """One problem. `plan` is ((thought, cell), ...): run in one session, in order, the last cell prints the answer.

    >>> p = affine(random.Random(3))
    >>> p.text
    'Start at x=21 and repeat 4 times x=(4*x+6)%26. Find x.'
    >>> p.plan[:2]
    (('set up', 'x=21;f=lambda x:(4*x+6)%26;print(x)'), ('repeat 4', 'x=f(x);print(x)'))
    """

    family: str
    text: str
    answer: str
    plan: tuple[tuple[str, str], ...]
    head_work: str

    @property
    def row_id(self) -> str:
        return f"{self.family}-{hashlib.sha256(self.text.encode()).hexdigest()[:12]}"


def is_heldout(problem_text: str) -> bool:
    """Whether the problem belongs to the evaluation side; a pure function of its text."""
    digest = hashlib.sha256(problem_text.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELDOUT_PERCENT


# the families ---------------------------------------------------------------------------------------------------------


def affine(rng: random.Random) -> Problem:
    """An affine map modulo m, applied a few times. The session keeps both the value and the function."""
    m, times = rng.randint(11, 49), rng.randint(2, 4)
    a, b, x = rng.randint(2, 9), rng.randint(1, 9), rng.randint(2, 29)
    work, value = [], x
    for _ in range(times):
        product = a * value + b
        work.append(f"{product}%{m}={product % m}")
        value = product % m
    plan = [("set up", f"x={x};f=lambda x:({a}*x+{b})%{m};print(x)")]
    plan += [(f"repeat {left}", "x=f(x);print(x)") for left in range(times, 0, -1)]
    text = f"Start at x={x} and repeat {times} times x=({a}*x+{b})%{m}. Find x."
    return Problem("affine", text, str(value), tuple(plan), "\n".join(work))


def pair(rng: random.Random) -> Problem:
    """A two-term recurrence modulo m: two numbers of state."""
    m, times = rng.randint(11, 49), rng.randint(2, 4)
    c, a, b = rng.randint(2, 9), rng.randint(2, 29), rng.randint(2, 29)
    work, u, v = [], a, b
    for _ in range(times):
        total = c * u + v
        work.append(f"{total}%{m}={total % m}")
        u, v = v, total % m
    plan = [("set up", f"a={a};b={b};f=lambda a,b:(b,({c}*a+b)%{m});print(b)")]
    plan += [(f"repeat {left}", "a,b=f(a,b);print(b)") for left in range(times, 0, -1)]
    text = f"Start at a={a};b={b} and repeat {times} times a,b=b,({c}*a+b)%{m}. Find b."
    return Problem("pair", text, str(v), tuple(plan), "\n".join(work))


def digits(rng: random.Random) -> Problem:
    """The digit sum of a product of three factors."""
    a, b, c = (rng.randint(12, 99) for _ in range(3))
    product, answer = a * b * c, sum(map(int, str(a * b * c)))
    tens, ones = b // 10 * 10, b % 10
    work = (
        f"{a}*{tens}={a * tens}",
        f"{a}*{ones}={a * ones}",
        f"{a * tens}+{a * ones}={a * b}",
        f"{a * b}*{c}={product}",
        "+".join(str(product)) + f"={answer}",
    )
    plan = (
        ("multiply", f"y={a}*{b}*{c};print(y)"),
        ("digits", "d=list(map(int,str(y)))"),
        ("add", "print(sum(d))"),
    )
    return Problem("digits", f"Find the digit sum of {a}*{b}*{c}.", str(answer), plan, "\n".join(work))


def count(rng: random.Random) -> Problem:
    """How many x below n satisfy a congruence condition."""
    n, m, c = rng.randint(10, 20), rng.randint(11, 49), rng.randint(3, 9)
    a, b = rng.randint(2, 9), rng.randint(1, 9)
    values = [(a * x + b) % m for x in range(n)]
    hits = [v for v in values if v < c]
    work = f"{' '.join(map(str, values))}\n{' '.join(map(str, hits)) or 'none'}"
    plan = (
        ("values", f"v=[({a}*x+{b})%{m} for x in range({n})]"),
        ("filter", f"w=[t for t in v if t<{c}]"),
        ("count", "print(len(w))"),
    )
    return Problem("count", f"Count the x in range({n}) with ({a}*x+{b})%{m}<{c}.", str(len(hits)), plan, work)


def power(rng: random.Random) -> Problem:
    """Two modular powers, the second taken of the first."""
    g, e, m = rng.randint(2, 9), rng.randint(5, 12), rng.randint(11, 49)
    f, k = rng.randint(3, 9), rng.randint(11, 49)
    a = pow(g, e, m)
    b = pow(a + 2, f, k)
    chain = [pow(g, i, m) for i in range(1, e + 1)], [pow(a + 2, i, k) for i in range(1, f + 1)]
    work = [" ".join(map(str, c)) for c in chain] + [f"{a}*{b}={a * b}"]
    plan = (
        ("power", f"a={g}**{e}%{m};print(a)"),
        ("power", f"b=(a+2)**{f}%{k};print(b)"),
        ("multiply", "print(a*b)"),
    )
    text = f"Let a={g}**{e}%{m} and b=(a+2)**{f}%{k}. Find a*b."
    return Problem("power", text, str(a * b), plan, "\n".join(work))


def divisors(rng: random.Random) -> Problem:
    """A greatest common divisor of two products plus a least common multiple."""
    a, b, p, q = (rng.randint(12, 60) for _ in range(4))
    c, e = rng.randint(12, 30), rng.randint(12, 30)
    g, multiple = math.gcd(a * b, p * q), math.lcm(c, e)
    work, u, v = [f"{a}*{b}={a * b}", f"{p}*{q}={p * q}"], a * b, p * q
    while v:
        work.append(f"{u}%{v}={u % v}")
        u, v = v, u % v
    work.append(f"{c}*{e}/{math.gcd(c, e)}={multiple}")
    work.append(f"{g}+{multiple}={g + multiple}")
    plan = (
        ("gcd", f"import math;g=math.gcd({a}*{b},{p}*{q});print(g)"),
        ("lcm", f"l=math.lcm({c},{e});print(l)"),
        ("add", "print(g+l)"),
    )
    text = f"Let g=gcd({a}*{b},{p}*{q}) and l=lcm({c},{e}). Find g+l."
    return Problem("divisors", text, str(g + multiple), plan, "\n".join(work))


def series(rng: random.Random) -> Problem:
    """A sum of residues, itself reduced."""
    a, b, m = rng.randint(2, 9), rng.randint(1, 9), rng.randint(11, 49)
    low = rng.randint(2, 19)
    high, q = low + rng.randint(7, 15), rng.randint(11, 29)
    terms = [(a * k + b) % m for k in range(low, high)]
    total = sum(terms)
    work = f"{' '.join(map(str, terms))}\n{total}%{q}={total % q}"
    plan = (
        ("terms", f"v=[({a}*k+{b})%{m} for k in range({low},{high})]"),
        ("add", "s=sum(v);print(s)"),
        ("reduce", f"print(s%{q})"),
    )
    text = f"Let s be the sum of ({a}*k+{b})%{m} for k in range({low},{high}). Find s%{q}."
    return Problem("series", text, str(total % q), plan, work)


def primes(rng: random.Random) -> Problem:
    """How many primes of an interval fall into some residue classes. The session keeps the test and both lists."""
    low = rng.randint(11, 60)
    high, m = rng.randint(low + 20, low + 39), rng.randint(5, 29)
    c = rng.randint(2, m - 2)
    found = [n for n in range(low, high) if _is_prime(n)]
    hits = [n for n in found if n % m < c]
    work = f"{' '.join(map(str, found))}\n{' '.join(map(str, hits)) or 'none'}"
    plan = (
        ("primes", "p=lambda n:all(n%d for d in range(2,n))"),
        ("list", f"v=[n for n in range({low},{high}) if p(n)]"),
        ("filter", f"w=[n for n in v if n%{m}<{c}]"),
        ("count", "print(len(w))"),
    )
    text = f"Count the primes n in range({low},{high}) with n%{m}<{c}."
    return Problem("primes", text, str(len(hits)), plan, work)


def residue(rng: random.Random) -> Problem:
    """A residue of a residue. The head can only guess: right in 35 of 100, or in 43 when it always says 0."""
    n = rng.randint(10, 999)
    plan = (
        ("set up", f"x={n};print(x)"),
        ("reduce", "y=x%7;print(y)"),
        ("again", "z=y%3;print(z)"),
        ("check", "print(x%7%3)"),
    )
    return Problem("residue", f"Find {n}%7%3.", str(n % 7 % 3), plan, "")


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


FAMILIES: dict[str, Callable[[random.Random], Problem]] = {
    draw.__name__: draw for draw in (affine, pair, digits, count, power, divisors, series, primes, residue)
}


QUICKSTART_FAMILIES = ("affine", "pair", "count", "series", "primes")
"""What the sub-million-parameter model learns within the quickstart; the other three copy more numbers a problem."""


# drawing and writing down ---------------------------------------------------------------------------------------------


def draw_problems(
    number: int,
    *,
    seed: int,
    heldout: bool,
    families: Sequence[str] = tuple(FAMILIES),
    exclude: frozenset[str] = frozenset(),
) -> list[Problem]:
    """`number` distinct problems of one side of the split, families in turn, none whose text is in `exclude`.

    Same arguments, same list. `DataError` for an unknown family, or when the space has not that many problems.
    """
    unknown = [name for name in families if name not in FAMILIES]
    if unknown or not families:
        raise DataError(f"task families {unknown or '()'} do not exist: choose among {', '.join(FAMILIES)}")
    rng = random.Random(f"aster-tasks/{seed}/{heldout}")
    out: list[Problem] = []
    seen, misses = set(exclude), 0
    while len(out) < number:
        problem = FAMILIES[families[len(out) % len(families)]](rng)
        if problem.text in seen or is_heldout(problem.text) is not heldout:
            misses += 1
            if misses > 1000 * (number + 1):
                raise DataError(f"only {len(out)} distinct problems found of the {number} asked for: ask for fewer")
            continue
        seen.add(problem.text)
        out.append(problem)
    return out


def to_row(problem: Problem) -> PromptRow:
    """A row in the columns of the paper's files; `ability` names the family."""
    return PromptRow(
        row_id=problem.row_id,
        messages=({"role": "user", "content": user_message(problem.text)},),
        ground_truth=problem.answer,
        data_source=DATA_SOURCE,
        agent_name="code_agent",
        extra={"ability": problem.family},
    )
