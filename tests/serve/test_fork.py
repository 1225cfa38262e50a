"""A session forks: copies with its whole state, apart from each other; what has no copy is refused by name."""

import asyncio
import os
from pathlib import Path

import pytest
from sandboxes import Session, open_session

from serve.errors import CannotFork, PoolFull
from serve.pool import SandboxPool
from serve.schema import ForkSession, State, Status

pytestmark = pytest.mark.asyncio(loop_scope="module")

# `sh` ends when what it left behind goes by its own name
_DAEMON = """
import os
n = os.system('sleep 60 >/dev/null 2>&1 & until read n </proc/$!/comm && [ "$n" = sleep ]; do :; done')
"""
_SLEEP = f"87654.{os.getpid()}"  # seconds, and a name among all processes of this machine


async def fork(session: Session, count: int = 1) -> list[Session]:
    forked = await session.pool.fork(session.id, ForkSession(count=count))
    return [Session(session.pool, one.session_id) for one in forked.sessions]


async def value(session: Session, code: str) -> str | None:
    answer = await session.run(code)
    assert (answer.status, answer.state) == (Status.OK, State.KEPT), answer
    return answer.result


async def family_of(pool: SandboxPool, session: Session) -> set[str]:
    """Ids of all that share the session's slot, as the supervisor names them."""
    for cell in pool.fleet.cells:
        families = {one.session_id: one.family for one in (await cell.link.status()).sessions}
        if session.id in families:
            return {key for key, family in families.items() if family == families[session.id]}
    return set()


async def test_copies_have_the_state_and_change_it_apart(session: Session) -> None:
    code = (
        "import numpy as np\nx = [1]; y = x; a = np.arange(4)\n"
        "def g():\n    yield from range(9)\nit = g(); n = next(it)"
    )
    await session.run(code)
    one, other = await fork(session, 2)
    assert await value(one, "x.append(2); a[0] = 7; next(it), x, y is x, int(a.sum())") == "(1, [1, 2], True, 13)"
    assert await value(other, "next(it), next(it), x, int(a.sum())") == "(1, 2, [1], 6)"
    assert await value(session, "next(it), x, int(a.sum())") == "(1, [1], 6)"
    pids = {await value(s, "import os; os.getpid(), os.getsid(0) == os.getpid()") for s in (session, one, other)}
    assert len(pids) == 3
    assert all(pid and pid.endswith("True)") for pid in pids)
    for copy in (one, other):
        await copy.close()


async def test_random_numbers_go_on_from_the_same_state_in_every_copy(session: Session) -> None:
    code = "import random, numpy as np, sympy.core.random as s\nr = np.random.default_rng(); n = random.random()"
    await session.run(code)
    copies = await fork(session, 2)
    draw = "random.random(), float(np.random.rand()), float(r.random()), s.rng.random()"
    drawn = [await value(one, draw) for one in (session, *copies)]
    assert len(set(drawn)) == 1, drawn
    for copy in copies:
        await copy.close()


async def test_the_cell_counter_goes_on_and_tracebacks_find_the_earlier_cells(session: Session) -> None:
    await session.run("def f():\n    return 1 / 0  # the culprit")
    (copy,) = await fork(session)
    answer = await copy.run("f()")
    assert answer.cell == 2
    assert "1 / 0  # the culprit" in answer.stderr
    await copy.close()


async def test_a_copy_has_its_own_files_and_stands_in_the_same_directory(session: Session) -> None:
    await session.run(
        "import os, tempfile\nos.makedirs('d/e'); n = open('d/t', 'w').write('one'); os.symlink('t', 'd/link'); "
        "os.chdir('d/e')\nf = open('log', 'w+'); n = f.write('abc'); f.flush()\n"
        "t = open(tempfile.gettempdir() + '/t', 'w'); n = t.write('tmp'); t.flush()\n"
        "u = tempfile.TemporaryFile(); n = u.write(b'unnamed'); n = u.seek(2)"
    )
    (copy,) = await fork(session)
    assert await value(copy, "open('../link').read(), f.write('X'), f.flush(), f.tell()") == "('one', 1, None, 4)"
    assert await value(copy, "n = open('../t', 'w').write('two'); u.write(b'!'); u.flush(); u.seek(0); u.read()")
    assert await value(session, "open('../t').read(), open('log').read(), f.tell(), u.tell()") == "('one', 'abc', 3, 2)"
    assert await value(session, "u.seek(0); u.read()") == "b'unnamed'"
    assert await value(copy, "u.seek(0); u.read(), open('log').read()") == "(b'un!amed', 'abcX')"
    here = "os.getcwd().startswith(os.environ['HOME'] + '/d/e'), tempfile.gettempdir() == os.environ['TMPDIR']"
    assert await value(copy, here) == "(True, True)"
    assert await value(copy, "os.environ['HOME']") != await value(session, "os.environ['HOME']")
    await copy.close()
    assert await value(session, "os.listdir('.')") == "['log']"


async def test_prints_go_to_the_member_that_printed_them(session: Session) -> None:
    await session.run("import os, sys\ndup = os.dup(1)\nprint('before', end='')")
    (copy,) = await fork(session)
    both = await asyncio.gather(
        copy.run("print('copy'); n = os.write(dup, b'dup'); print('wrong', file=sys.stderr)"),
        session.run("print('original'); n = os.write(dup, b'dup')"),
    )
    assert [answer.stdout for answer in both] == ["copy\ndup", "original\ndup"]
    assert [answer.stderr for answer in both] == ["wrong\n", ""]
    await copy.close()


async def test_a_copy_can_be_copied_and_outlives_its_original(pool: SandboxPool, session: Session) -> None:
    await session.run("x = 5")
    (child,) = await fork(session)
    await child.run("x += 1")
    (grandchild,) = await fork(child)
    assert await family_of(pool, session) == {session.id, child.id, grandchild.id}
    await session.close()
    await child.close()
    assert await value(grandchild, "x += 1; x") == "7"
    assert await family_of(pool, grandchild) == {grandchild.id}
    (last,) = await fork(grandchild)
    assert await value(last, "x") == "7"
    for one in (grandchild, last):
        await one.close()
    fresh = [await open_session(pool) for _ in range(pool.backend.slots)]
    assert {await value(one, "import os; os.listdir('.'), 'x' in globals()") for one in fresh} == {"([], False)"}
    for one in fresh:
        await one.close()


@pytest.mark.parametrize(
    ("code", "named"),
    [
        ("import threading; t = threading.Timer(60, print); t.name = 'alarm'; t.start()", "live threads: alarm"),
        ("import subprocess; p = subprocess.Popen(['sleep', '60'])", "(sleep)"),
        (_DAEMON, "(sleep)"),
        ("import socket; a, b = socket.socketpair()", "(socket:["),
        ("import os; r, w = os.pipe()", "(pipe:["),
        ("import asyncio; loop = asyncio.new_event_loop()", "(anon_inode:[eventpoll])"),
        ("import numpy as np; m = np.memmap('m', mode='w+', shape=9)", "shared memory"),
    ],
)
async def test_what_has_no_copy_is_refused_by_name_and_goes_on(session: Session, code: str, named: str) -> None:
    await session.run(code)
    with pytest.raises(CannotFork, match=r"cannot be forked") as refusal:
        await fork(session)
    assert named in str(refusal.value)
    assert await value(session, "1 + 1") == "2"


async def test_what_has_ended_by_then_is_no_obstacle(session: Session) -> None:
    await session.run(
        "import subprocess, threading, asyncio\nn = subprocess.run(['true']).returncode\n"
        "t = threading.Thread(target=print); t.start(); t.join()\nasync def one(): return 1\nn = asyncio.run(one())"
    )
    (copy,) = await fork(session)
    assert await value(copy, "t.is_alive(), asyncio.run(one())") == "(False, 1)"
    assert await value(copy, "import os; os.system('exit 3') >> 8, subprocess.check_output(['echo', 'x'])")
    assert await value(copy, "t = threading.Thread(target=print); t.start(); t.join(); t.is_alive()") == "False"
    await copy.close()


async def test_threads_signals_and_linear_algebra_work_in_a_copy(session: Session) -> None:
    await session.run("import numpy as np, signal, threading, time; a = np.eye(200) * 2")
    (copy,) = await fork(session)
    code = (
        "got = []\nold = signal.signal(signal.SIGUSR1, lambda *_: got.append(threading.current_thread().name))\n"
        "main = threading.main_thread().ident\n"
        "t = threading.Thread(target=signal.pthread_kill, args=(main, signal.SIGUSR1)); t.start(); t.join()\n"
        "time.sleep(.05); import os\n"
        "got, float(np.linalg.inv(a @ a)[0, 0]), threading.get_native_id() == os.getpid()"
    )
    assert await value(copy, code) == "(['MainThread'], 0.25, True)"
    code = "import multiprocessing as mp\nwith mp.Pool(2) as pool: r = pool.map(abs, [-1, 2])\nr"
    assert await value(copy, code) == "[1, 2]"
    await copy.close()


async def test_a_dead_interpreter_cannot_be_copied_and_says_why(session: Session) -> None:
    await session.run("import os; os._exit(3)")
    with pytest.raises(CannotFork, match="exited with 3"):
        await fork(session)
    assert (await session.run("1")).state is State.LOST
    (copy,) = await fork(session)
    await copy.close()


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("import os; os._exit(3)", Status.SESSION_DIED),
        ("import ctypes; ctypes.string_at(0)", Status.SESSION_DIED),
        ("import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass", Status.TIMEOUT),
        ("print('a' * (100 << 20))", Status.OUTPUT_LIMIT),
        ("import os\nos.closerange(3, 512)", Status.SESSION_DIED),
    ],
)
async def test_a_member_s_death_is_its_own(session: Session, code: str, status: Status) -> None:
    await session.run("x = 1; n = open('kept', 'w').write('y')")
    one, other = await fork(session, 2)
    answer = await one.run(
        f"import subprocess; p = subprocess.Popen(['sleep', '{_SLEEP}'], start_new_session=True)\n{code}",
        timeout_s=3 if status is Status.TIMEOUT else 20,
    )
    assert (answer.status, answer.state) == (status, State.LOST)
    after = await one.run("'x' in globals(), __import__('os').listdir('.')")
    assert (after.result, after.state) == ("(False, [])", State.LOST)
    assert not sleepers()
    for sibling in (session, other):
        assert await value(sibling, "x, open('kept').read()") == "(1, 'y')"
    assert await value(one, "import os, subprocess; subprocess.run(['true']).returncode") == "0"
    (again,) = await fork(one)
    for member in (one, other, again):
        await member.close()
    assert await value(session, "x, open('kept').read()") == "(1, 'y')"


def sleepers() -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cmdline").read_bytes() == f"sleep\0{_SLEEP}\0".encode():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


async def test_a_timeout_interrupts_one_member_only(session: Session) -> None:
    (copy,) = await fork(session)
    slow = asyncio.create_task(session.run("import time; time.sleep(1); 'done'"))
    answer = await copy.run("import time; time.sleep(60)", timeout_s=0.3)
    assert (answer.status, answer.state) == (Status.TIMEOUT, State.KEPT)
    assert (await slow).result == "done"
    await copy.close()


async def test_reset_of_a_member_leaves_its_siblings_alone(pool: SandboxPool, session: Session) -> None:
    await session.run("x = 1; n = open('kept', 'w').write('y')")
    (copy,) = await fork(session)
    await pool.reset(copy.id)
    assert await value(copy, "'x' in globals(), __import__('os').listdir('.')") == "(False, [])"
    await pool.reset(session.id)
    assert await value(session, "'x' in globals(), __import__('os').listdir('.')") == "(False, [])"
    await copy.close()


async def test_a_closed_member_leaves_no_process_and_no_file(pool: SandboxPool, session: Session) -> None:
    (copy,) = await fork(session)
    await copy.run(f"import subprocess; p = subprocess.Popen(['sleep', '{_SLEEP}'], start_new_session=True)")
    home = await value(copy, "import os; n = open('f', 'w').write('x'); os.chmod('.', 0); os.environ['HOME']")
    assert len(sleepers()) == 1
    await copy.close()
    assert not sleepers()
    assert await value(session, f"import os; os.path.exists({home!r}), os.path.exists(os.path.dirname({home!r}))") == (
        "(False, False)"
    )


async def test_a_family_has_at_most_64_members_and_all_of_them_work(pool: SandboxPool, session: Session) -> None:
    if pool.settings.max_sessions < 66:
        pool.settings = pool.settings.model_copy(update={"max_sessions": 200})
    await session.run("x = 3")
    copies = await fork(session, 63)
    with pytest.raises(PoolFull, match="64 at most"):
        await fork(session)
    code = "import subprocess; x += 1; x, subprocess.run(['true']).returncode"
    values = await asyncio.gather(*(value(copy, code) for copy in copies))
    assert set(values) == {"(4, 0)"}
    await asyncio.gather(*(copy.close() for copy in copies))
    assert await value(session, "x") == "3"


async def test_a_full_disk_refuses_the_copy_and_leaves_nothing_of_it(pool: SandboxPool, session: Session) -> None:
    if pool.backend.name == "process":
        pytest.skip("no disk of its own")
    await session.run("n = open('big', 'wb').write(b'x' * (40 << 20))")
    with pytest.raises(PoolFull, match="No space left"):
        await fork(session)
    assert await family_of(pool, session) == {session.id}
    assert await value(session, "import os; os.remove('big'); os.listdir('.')") == "[]"
    (copy,) = await fork(session)
    await copy.close()


async def test_all_copies_or_none(pool: SandboxPool, session: Session) -> None:
    if pool.backend.name == "process":
        pytest.skip("no disk of its own")
    await session.run("n = open('big', 'wb').write(b'x' * (14 << 20))")
    with pytest.raises(PoolFull, match="No space left"):
        await fork(session, 5)
    assert await family_of(pool, session) == {session.id}
    copies = await fork(session, 3)
    for copy in copies:
        await copy.close()


async def test_open_figures_and_monkeypatches_are_copied(session: Session) -> None:
    if (await session.run("import matplotlib.pyplot as plt")).error:
        pytest.skip("this machine has no matplotlib")
    await session.run("import math; math.tau2 = 12; fig = plt.figure(3); line, = plt.plot([1, 2])")
    (copy,) = await fork(session)
    assert await value(copy, "math.tau2, plt.get_fignums(), plt.gca().lines[0] is line") == "(12, [3], True)"
    await copy.close()


async def test_a_hostile_original_cannot_pass_another_process_off_as_its_copy(session: Session) -> None:
    """It has the fork's descriptors and may say what it likes; the kernel says who speaks."""
    code = (
        "import os\nfrom sandbox_image import branch, frames\n"
        "def lie(interpreter, request, fds):\n"
        "    body = frames.encode({'nonce': request['copy_nonce'], 'ok': True, 'pid': 1})\n"
        "    os.write(fds[0], body)\n    return {'nonce': request['nonce'], 'ok': True}\n"
        "branch.branch = lie"
    )
    await session.run(code)
    with pytest.raises(CannotFork, match="not where it should be"):
        await fork(session)
    assert await value(session, "os._exit is not None") == "True"
    await session.run("os._exit(5)")
    assert (await session.run("1")).reason == "the interpreter exited with 5"
