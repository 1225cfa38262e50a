"""What a session promises, on every backend that works here: one adversarial property per test."""

import asyncio
import os
import time
from pathlib import Path

import pytest
from sandboxes import PRINTS_LATER, Session, gone, open_session, put, there

from serve.errors import SessionGone
from serve.pool import SandboxPool
from serve.schema import State, Status

pytestmark = pytest.mark.asyncio(loop_scope="module")

_SLEEP = f"98765.{os.getpid()}"  # seconds, and a name among all processes of this machine


async def test_preamble_names_are_there_without_import(session: Session) -> None:
    answer = await session.run("sympy is sp, math.pi > 3, next(itertools.count()), os.sep")
    assert answer.result == "(True, True, 0, '/')"


async def test_a_last_expression_is_evaluated_once_and_none_is_silent(session: Session) -> None:
    answer = await session.run("calls = []\ndef f():\n    calls.append(1)\n    return 'v'\nf()")
    assert (answer.result, answer.text) == ("v", "v\n")
    assert (await session.run("len(calls)")).result == "1"
    answer = await session.run("print('once')")
    assert (answer.result, answer.text) == (None, "once\n")


async def test_pickle_and_typing_find_the_user_s_classes(session: Session) -> None:
    await session.run("import pickle, typing\nclass C:\n    x: 'int' = 1")
    answer = await session.run("pickle.loads(pickle.dumps(C())).x, typing.get_type_hints(C)['x'].__name__")
    assert answer.result == "(1, 'int')"


# errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("1/0", "ZeroDivisionError"),
        ("def f(:\n  pass", "SyntaxError"),
        ("import sys; sys.exit(3)", "SystemExit"),
        ("exit()", "SystemExit"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("input('?')", "EOFError"),
        ("import no_such_module", "ModuleNotFoundError"),
        ("def f(): return f()\nf()", "RecursionError"),
        ("'a\x00b", "SyntaxError|ValueError"),  # which one depends on the patch release
        ("class E(Exception):\n    def __str__(self): raise ValueError\nraise E", "E"),
        ("raise GeneratorExit", "GeneratorExit"),
    ],
)
async def test_an_exception_is_data_and_keeps_the_state(session: Session, code: str, name: str) -> None:
    await session.run("kept = 'yes'")
    answer = await session.run(code)
    assert (answer.status, answer.state) == (Status.ERROR, State.KEPT)
    assert answer.error is not None
    assert answer.error.name in name.split("|")
    assert answer.error.traceback in answer.stderr
    assert (await session.run("kept")).result == "yes"


async def test_a_traceback_shows_the_user_s_lines_and_none_of_ours(session: Session) -> None:
    await session.run("def inner():\n    return 1 / 0  # here")
    answer = await session.run("inner()")
    assert "1 / 0  # here" in answer.stderr
    assert '"<cell-1>", line 2' in answer.stderr
    assert '"<cell-2>", line 1' in answer.stderr
    assert "session.py" not in answer.stderr


# output --------------------------------------------------------------------------------------------------------------


async def test_streams_are_apart_and_their_interleaving_is_kept(session: Session) -> None:
    patience = (
        "from sandbox_image import session\nsession._ORDER_WAIT_S = 20\n"  # a busy machine reads later than usual
    )
    code = f"{patience}import sys\nfor i in range(20):\n    print('o', i)\n    print('e', i, file=sys.stderr)"
    answer = await session.run(code)
    assert answer.stdout == "".join(f"o {i}\n" for i in range(20))
    assert answer.stderr == "".join(f"e {i}\n" for i in range(20))
    assert answer.text == "".join(f"o {i}\ne {i}\n" for i in range(20))


async def test_two_megabytes_are_cut_in_the_middle_and_the_cut_is_told(session: Session) -> None:
    answer = await session.run("print('h' + 'x' * 2_000_000 + 't')", keep=1000)
    assert answer.status is Status.OK
    assert answer.truncated
    assert answer.stdout_bytes == 2_000_003
    assert answer.text == "h" + "x" * 499 + "\n[output truncated: 1999003 bytes]\n" + "x" * 498 + "t\n"


async def test_a_hundred_megabytes_kill_the_session_and_head_and_tail_are_told(session: Session) -> None:
    answer = await session.run("print('a' * (100 << 20))")
    assert (answer.status, answer.state) == (Status.OUTPUT_LIMIT, State.LOST)
    assert answer.text.startswith("aaa")
    assert "[output truncated: " in answer.text
    assert (await session.run("1 + 1")).result == "2"


async def test_output_of_a_child_process_is_captured(session: Session) -> None:
    answer = await session.run("import os\nprint('before')\nn = os.system('echo child; echo wrong >&2')")
    assert answer.stdout == "before\nchild\n"
    assert answer.stderr == "wrong\n"


async def test_a_closed_or_redirected_stdout_is_repaired_for_the_next_cell(session: Session) -> None:
    for breakage in ("import sys; sys.stdout.close()", "import os; os.close(1)", "import os; os.close(2); os.close(0)"):
        await session.run(breakage)
        assert (await session.run("print('again')")).text == "again\n", breakage


async def test_bytes_that_are_no_text_are_escaped(session: Session) -> None:
    assert (await session.run("import os; n = os.write(1, b'\\xff\\n')")).text == "\\xff\n"
    assert (await session.run("print('\\ud800')")).text == "\\ud800\n"
    assert (await session.run("chr(0xd800)")).result == "\\ud800"


async def test_what_a_thread_prints_after_its_cell_belongs_to_the_next_one(session: Session) -> None:
    await session.run(PRINTS_LATER)
    await put(session, "over")
    await there(session, "printed")
    assert (await session.run("print('now')")).text == "late\nnow\n"


# time ----------------------------------------------------------------------------------------------------------------


async def test_a_timeout_interrupts_and_keeps_the_state(session: Session) -> None:
    await session.run("x = 1")
    began = time.monotonic()
    answer = await session.run("import time\nprint('begun')\nx = 2\ntime.sleep(60)", timeout_s=2)
    assert (answer.status, answer.state) == (Status.TIMEOUT, State.KEPT)
    assert answer.text.startswith("begun\n")
    assert time.monotonic() - began < 20
    assert (await session.run("x")).result == "2"


async def test_a_loop_in_python_is_interrupted(session: Session) -> None:
    answer = await session.run("n = 0\nwhile True:\n    n += 1", timeout_s=2)
    assert (answer.status, answer.state) == (Status.TIMEOUT, State.KEPT)
    assert int((await session.run("n")).result or 0) > 1000


async def test_a_waited_for_child_is_interrupted_too(session: Session) -> None:
    answer = await session.run("import os; r = os.system('sleep 60')", timeout_s=0.3)
    assert (answer.status, answer.state) == (Status.TIMEOUT, State.KEPT)


@pytest.mark.parametrize(
    "code",
    [
        "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass",
        "import time\nwhile True:\n    try:\n        time.sleep(60)\n    except BaseException: pass",
        "sum(itertools.repeat(0))",  # a loop in C that never looks for signals
    ],
)
async def test_a_cell_that_ignores_interrupts_is_killed_two_seconds_late_and_that_is_told(
    session: Session, code: str
) -> None:
    await session.run("x = 1")
    answer = await session.run(code, timeout_s=2)  # long enough for any machine to begin to ignore them
    assert (answer.status, answer.state) == (Status.TIMEOUT, State.LOST)
    assert 3.9 < answer.duration_s < 20
    after = await session.run("'x' in globals()")
    assert (after.result, after.state) == ("False", State.LOST)
    assert after.reason
    assert (await session.run("1")).state is State.KEPT


async def test_an_alarm_of_an_earlier_cell_that_raises_between_two_harms_neither(session: Session) -> None:
    code = (
        "import signal\ndef late(*_):\n    if not os.path.exists('over'): return\n"
        "    t = signal.setitimer(signal.ITIMER_REAL, 0); open('alarmed', 'w').close()\n"
        "    raise TimeoutError('too late')\n"
        "old = signal.signal(signal.SIGALRM, late); t = signal.setitimer(signal.ITIMER_REAL, .05, .05); x = 1"
    )
    assert (await session.run(code)).status is Status.OK
    await put(session, "over")  # a slow cell would meet the alarm itself
    await there(session, "alarmed")
    answer = await session.run("x")
    assert (answer.status, answer.result, answer.state) == (Status.OK, "1", State.KEPT)
    assert "TimeoutError: too late" in answer.stderr


# death ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; os._exit(3)", "exited with 3"),
        ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
        ("import os; os.abort()", "SIGABRT"),
        ("import os; os.closerange(3, 512)", ""),
    ],
)
async def test_a_death_is_told_and_the_next_call_is_fresh(session: Session, code: str, reason: str) -> None:
    await session.run("x = 1")
    answer = await session.run(f"print('last words', flush=True)\n{code}")
    assert (answer.status, answer.state) == (Status.SESSION_DIED, State.LOST)
    assert answer.stdout == "last words\n"
    assert reason in answer.reason
    after = await session.run("'x' in globals()")
    assert (after.status, after.result, after.state) == (Status.OK, "False", State.LOST)


async def test_a_flood_between_two_calls_is_a_death_with_its_reason(session: Session) -> None:
    await session.run("import threading, os\nthreading.Timer(.1, lambda: os.write(1, b'x' * (80 << 20))).start()")
    await gone(session)
    answer = await session.run("1 + 1")
    assert (answer.result, answer.state) == ("2", State.LOST)
    assert "printed more than 64 MB" in answer.reason


async def test_a_death_between_two_calls_is_told_by_the_second(session: Session) -> None:
    await session.run("import os, threading\nthreading.Timer(0.05, lambda: os._exit(9)).start()")
    await gone(session)
    answer = await session.run("1 + 1")
    assert (answer.status, answer.result, answer.state) == (Status.OK, "2", State.LOST)
    assert "exited with 9" in answer.reason


async def test_too_much_memory_is_a_memory_error_and_keeps_the_state(session: Session) -> None:
    await session.run("x = 1")
    answer = await session.run("a = bytearray(8 << 30)")
    assert answer.status is Status.ERROR
    assert answer.error is not None
    assert answer.error.name == "MemoryError"
    assert (await session.run("x")).result == "1"


async def test_a_file_above_the_limit_is_an_error(pool: SandboxPool) -> None:
    session = await open_session(pool, file_bytes=1 << 20)
    answer = await session.run("open('big', 'wb').write(b'x' * (2 << 20))")
    assert answer.status is Status.ERROR
    await session.close()


# the protocol --------------------------------------------------------------------------------------------------------

FIND_CHANNEL = """
import os, socket, stat
fds = [fd for fd in map(int, os.listdir('/proc/self/fd')) if fd > 2]
channels = []
for fd in fds:
    try:
        if stat.S_ISSOCK(os.fstat(fd).st_mode): channels.append(fd)
    except OSError: pass
"""


@pytest.mark.parametrize(
    "frame",
    [
        "b'\\x00\\x00\\x00\\x02{}'",  # no nonce
        "b'\\xff\\xff\\xff\\xff'",  # four gigabytes are announced
        "b'\\x00\\x00\\x00\\x04nope'",  # not JSON
        "b'\\x00\\x00\\x00\\x02[]'",  # not an object
        "b'\\x00\\x00\\x00\\x1a' + b'[' * 26",
    ],
)
async def test_a_forged_frame_is_a_protocol_error_and_ends_the_interpreter(session: Session, frame: str) -> None:
    answer = await session.run(f"{FIND_CHANNEL}\nfor c in channels: os.write(c, {frame})\nimport time; time.sleep(5)")
    assert (answer.status, answer.state) == (Status.PROTOCOL_ERROR, State.LOST)
    assert (await session.run("1 + 1")).result == "2"


async def test_a_frame_that_nobody_asked_for_ends_the_interpreter(session: Session) -> None:
    late = "lambda: [os.write(c, b'\\x00\\x00\\x00\\x02{}') for c in channels]"
    await session.run(f"{FIND_CHANNEL}\nimport threading\nthreading.Timer(0.1, {late}).start()")
    await gone(session)
    answer = await session.run("'channels' in globals()")
    assert (answer.result, answer.state) == ("False", State.LOST)


async def test_a_forked_child_that_runs_out_of_the_cell_does_not_answer_for_its_parent(session: Session) -> None:
    answer = await session.run(
        "import os\npid = os.fork()\nif pid: r = os.waitpid(pid, 0)\nprint('parent' if pid else 'child')"
    )
    assert answer.status is Status.OK
    assert sorted(answer.stdout.split()) == ["child", "parent"]
    assert (await session.run("1")).state is State.KEPT


async def test_a_repeated_call_id_returns_the_first_answer_and_runs_nothing(session: Session) -> None:
    first = await session.run("n = globals().get('n', 0) + 1\nn", call_id="a")
    again = await session.run("n = globals().get('n', 0) + 1\nn", call_id="a")
    assert (first.result, again.result, again.cell) == ("1", "1", first.cell)
    both = await asyncio.gather(*(session.run("import time; time.sleep(.2); n += 1\nn", call_id="b") for _ in range(3)))
    assert [answer.result for answer in both] == ["2", "2", "2"]
    assert (await session.run("n")).result == "2"


async def test_a_caller_that_hangs_up_does_not_stop_the_cell_and_finds_its_answer(session: Session) -> None:
    code = "import time; time.sleep(.4); m = globals().get('m', 0) + 1\nm"
    call = asyncio.create_task(session.run(code, call_id="c"))
    await asyncio.sleep(0.15)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    assert (await session.run(code, call_id="c")).result == "1"


async def test_calls_of_one_session_are_serialised_and_waiting_is_not_run_time(session: Session) -> None:
    began = time.monotonic()
    answers = await asyncio.gather(*(session.run("import time; time.sleep(.2)") for _ in range(3)))
    assert sum(answer.duration_s for answer in answers) < time.monotonic() - began
    assert max(answer.queue_s for answer in answers) > 0.35
    assert sorted(answer.cell for answer in answers) == [1, 2, 3]


# neighbours ----------------------------------------------------------------------------------------------------------


async def test_sessions_do_not_share_random_numbers(pool: SandboxPool) -> None:
    code = (
        "import random, numpy, uuid, sympy.core.random as s\n"
        "random.random(), numpy.random.rand(), s.rng.random(), uuid.uuid4()"
    )
    sessions = [await open_session(pool) for _ in range(3)]
    results = [(await session.run(code)).result for session in sessions]
    assert len(set(results)) == 3
    assert len({(result or "").split(",")[1] for result in results}) == 3
    for session in sessions:
        await session.close()


async def test_a_closed_session_is_gone_and_leaves_no_process_and_no_file(pool: SandboxPool) -> None:
    session = await open_session(pool)
    code = (
        "import os, subprocess\nos.makedirs('a/b'); n = open('a/b/c', 'w').write('x'); os.chmod('a', 0)\n"
        f"p = [subprocess.Popen(['sleep', '{_SLEEP}'], start_new_session=True) for _ in range(3)]\n"
        "import multiprocessing as mp\nos.getcwd()"
    )
    assert (await session.run(code)).status is Status.OK
    assert _sleepers() == 3
    began = time.monotonic()
    await session.close()
    assert time.monotonic() - began < 30
    assert _sleepers() == 0
    with pytest.raises(SessionGone, match="closed by its client"):
        await session.run("1")
    await session.close()  # idempotent


def _sleepers() -> int:
    found = 0
    for entry in Path("/proc").iterdir():
        try:
            found += entry.name.isdigit() and (entry / "cmdline").read_bytes() == f"sleep\0{_SLEEP}\0".encode()
        except OSError:
            continue
    return found


async def test_no_secret_of_ours_is_in_the_environment(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASTER_SANDBOX_TOKEN", "hush")
    answer = await session.run("sorted(os.environ)")
    assert "TOKEN" not in (answer.result or "")
    assert "AWS" not in (answer.result or "")
