"""What survives a call, and an exception in between, on every backend: everything that an interpreter can hold."""

import pytest
from sandboxes import Session

from serve.schema import State, Status

pytestmark = pytest.mark.asyncio(loop_scope="module")

KINDS = {
    "generator": ("def g():\n    yield from range(9)\ng = g(); next(g)", "next(g)", "1"),
    "closure": (
        "def f():\n  n = 0\n  def g():\n    nonlocal n; n += 1; return n\n  return g\nc = f(); c()",
        "c()",
        "2",
    ),
    "open file": ("f = open('data', 'w+'); n = f.write('abc'); n = f.seek(1)", "f.read()", "bc"),
    "thread": (
        "import threading\nbox = []; go = threading.Event()\n"
        "t = threading.Thread(target=lambda: (go.wait(10), box.append(7))); t.start()",
        "go.set(); t.join(10); box",
        "[7]",
    ),
    "lock": ("import threading\nl = threading.Lock(); ok = l.acquire()", "l.locked()", "True"),
    "sqlite": (
        "import sqlite3\ndb = sqlite3.connect(':memory:'); c = db.execute('create table t(x)')",
        "db.execute('select count(*) from t').fetchone()",
        "(0,)",
    ),
    "alias": ("a = [1]; b = a", "b.append(2); a is b, a", "(True, [1, 2])"),
    "cycle": ("a = []; a.append(a)", "a[0] is a", "True"),
    "rng": (
        "import random\nr = random.Random(1); s = random.Random(1); x = r.random()",
        "s.random() == x and r.random() == s.random()",
        "True",
    ),
    "numpy view": ("import numpy as np\na = np.zeros(4); v = a[1:3]", "v[:] = 5; a.sum()", "10.0"),
    "enum and class": (
        "import enum\nclass E(enum.Enum):\n    A = 1\nclass P:\n    def __init__(self): self.e = E.A\np = P()",
        "p.e is E.A and isinstance(p, P)",
        "True",
    ),
    "dataclass": ("from dataclasses import dataclass\n@dataclass\nclass D:\n    x: int = 3\nd = D()", "d", "D(x=3)"),
    "lambda": ("f = lambda x: x + 1", "f(1)", "2"),
    "module alias": ("import itertools as it; c = it.count(5); n = next(c)", "next(c)", "6"),
    "monkeypatch": ("import math; math.tau2 = 12", "math.tau2", "12"),
    "environment": ("import os; os.environ['X_Y'] = 'z'", "os.environ['X_Y']", "z"),
    "working directory": ("import os; os.mkdir('d'); os.chdir('d')", "os.getcwd().endswith('/d')", "True"),
    "event loop": (
        "import asyncio; loop = asyncio.new_event_loop()\nasync def one(): return 1",
        "loop.run_until_complete(one())",
        "1",
    ),
    "iterator of a dict": ("d = dict(a=1, b=2); i = iter(d.items()); n = next(i)", "next(i)", "('b', 2)"),
    "regex match": ("import re; m = re.match('(a)(b)', 'ab')", "m.group(2)", "b"),
    "context manager": (
        "import tempfile; t = tempfile.TemporaryDirectory(); n = open(t.name + '/x', 'w').write('1')",
        "os.listdir(t.name)",
        "['x']",
    ),
    "child process": (
        "import subprocess; p = subprocess.Popen(['cat'], stdin=-1, stdout=-1)",
        "p.communicate(b'hi')[0].decode()",
        "hi",
    ),
    "sympy symbol": ("x = sp.Symbol('x'); e = (x + 1)**2", "sp.expand(e)", "x**2 + 2*x + 1"),
    "everything of sympy": (
        "from sympy import *\nx, y = symbols('x y'); s = solve(x**2 - 2, x)",
        "max(s), Integer(3)",
        "(sqrt(2), 3)",
    ),
    "socket pair": (
        "import socket; left, right = socket.socketpair(socket.AF_UNIX); n = left.send(b'abc')",
        "right.recv(2), left.fileno() > 2",
        "(b'ab', True)",
    ),
    "sqlite in a file, in a transaction": (
        "import sqlite3\nfd = sqlite3.connect('t.db'); c = fd.execute('create table t(x)')\n"
        "c = fd.execute('insert into t values (3)')",
        "fd.in_transaction, fd.execute('select x from t').fetchall()",
        "(True, [(3,)])",
    ),
    "module-level rng": (
        "import random, numpy as np\nrandom.seed(5); np.random.seed(5); a = random.random(), np.random.rand()\n"
        "random.seed(5); np.random.seed(5); b = random.random(), np.random.rand(); c = random.random()\n"
        "random.seed(5); n = random.random()",
        "a == b, random.random() == c",
        "(True, True)",
    ),
    "numpy generator": (
        "import numpy as np\nr, s = np.random.default_rng(1), np.random.default_rng(1); n = r.random()",
        "s.random() == n, r.random() == s.random()",
        "(True, True)",
    ),
    "mpmath precision": ("import mpmath; mpmath.mp.dps = 40", "str(mpmath.sqrt(2))[:24]", "1.4142135623730950488016"),
    "decimal context": ("import decimal; decimal.getcontext().prec = 5", "decimal.Decimal(1) / 3", "0.33333"),
    "lru_cache": (
        "import functools\n@functools.lru_cache\ndef f(n): return n if n < 2 else f(n - 1) + f(n - 2)\nn = f(90)",
        "f(91), f.cache_info().misses",
        "(4660046610375530309, 92)",
    ),
    "matplotlib figure": (
        "import matplotlib.pyplot as plt\nfig = plt.figure(7); line, = plt.plot([1, 2]); other = plt.figure(9)\n"
        "fig = plt.figure(7)",
        "plt.get_fignums(), plt.gcf().number, plt.gca().lines[0] is line",
        "([7, 9], 7, True)",
    ),
    "signal handler": (
        "import signal; got = []; old = signal.signal(signal.SIGUSR1, lambda *a: got.append(a[0]))",
        "signal.raise_signal(signal.SIGUSR1), got[0] == signal.SIGUSR1",
        "(None, True)",
    ),
    "warning filters and recursion limit": (
        "import sys, warnings; warnings.simplefilter('error'); sys.setrecursionlimit(4321)",
        "warnings.filters[0][0], sys.getrecursionlimit()",
        "('error', 4321)",
    ),
    "dynamic class and descriptor": (
        "class P:\n    @property\n    def v(self): return self.__dict__.setdefault('n', 4)\n"
        "Q = type('Q', (P,), {}); q = Q()",
        "q.v, type(q).__mro__[1] is P",
        "(4, True)",
    ),
    "weak reference and finalizer": (
        "import weakref\nclass W: pass\nw = W(); r = weakref.ref(w); ends = []\n"
        "fin = weakref.finalize(w, ends.append, 1)",
        "r() is w, fin.alive, ends",
        "(True, True, [])",
    ),
    "coroutine that waits": (
        "async def co():\n    yield 1\n    yield 2\nc = co()\n"
        "def step():\n    try: c.__anext__().send(None)\n    except StopIteration as e: return e.value\nn = step()",
        "step()",
        "2",
    ),
    "exception with traceback": (
        "try:\n    1/0\nexcept Exception as e:\n    err = e",
        "err.__traceback__.tb_lineno",
        "2",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
async def test_this_kind_of_state_survives_a_call_and_an_exception(session: Session, kind: str) -> None:
    make, use, expected = KINDS[kind]
    if "matplotlib" in make and (await session.run("import matplotlib")).error:
        pytest.skip("this machine has no matplotlib")
    assert (await session.run(make)).status is Status.OK
    assert (await session.run("raise ValueError('in between')")).status is Status.ERROR
    answer = await session.run(use)
    assert (answer.status, answer.result, answer.state) == (Status.OK, expected, State.KEPT), answer
