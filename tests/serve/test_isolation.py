"""What a session cannot do, seen from inside it: Docker and bubblewrap as root."""

import asyncio
import os

import pytest
from sandboxes import ISOLATED, Session, open_session

from serve.pool import SandboxPool
from serve.schema import ForkSession, State, Status

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.parametrize("pool", ISOLATED, indirect=True),
]


async def error_of(session: Session, code: str) -> str:
    answer = await session.run(code)
    assert answer.status is Status.ERROR, answer
    assert answer.error is not None
    return answer.error.name


async def value_of(session: Session, code: str) -> str:
    answer = await session.run(code)
    assert answer.status is Status.OK, answer
    return answer.result or ""


async def test_there_is_no_network(session: Session) -> None:
    code = "import socket\ns = socket.create_connection(('127.0.0.1', 22), 2)"
    assert await error_of(session, code) in {"OSError", "PermissionError", "ConnectionRefusedError"}
    assert await error_of(session, "s = socket.socket(); s.settimeout(2); s.connect(('192.0.2.1', 80))") in {
        "OSError",
        "PermissionError",
    }
    assert await value_of(
        session, "sorted(os.listdir('/sys/class/net')) if os.path.isdir('/sys/class/net') else ['lo']"
    ) in {
        "['lo']",
        "[]",
    }


async def test_the_root_is_read_only(session: Session) -> None:
    for path in ("/x", "/usr/x", "/etc/x", "/s/x", "/run/cell/x"):
        assert await error_of(session, f"open({path!r}, 'w')") in {"OSError", "PermissionError"}, path


async def test_the_host_s_files_are_not_there(session: Session) -> None:
    for path in ("/var/run/docker.sock", "/etc/shadow", "/root/.ssh", os.path.join(os.getcwd(), "pyproject.toml")):
        assert await error_of(
            session, f"os.listdir({path!r}) if os.path.isdir({path!r}) else open({path!r}, 'rb').read()"
        ) in {
            "FileNotFoundError",
            "PermissionError",
        }, path


async def test_a_session_has_its_own_user_no_capabilities_and_no_way_back(session: Session) -> None:
    code = (
        "d = dict(l.split(':', 1) for l in open('/proc/self/status'))\n"
        "{k: v.strip() for k, v in d.items() if k[:3] == 'Cap' or k == 'NoNewPrivs'}"
    )
    status = eval(await value_of(session, code))
    assert {status[k].strip("0") for k in ("CapEff", "CapPrm", "CapInh", "CapAmb")} == {""}
    assert status["NoNewPrivs"] == "1"
    assert await error_of(session, "os.setuid(0)") == "PermissionError"
    assert await value_of(session, "os.getuid() == os.getgid() > 1000 and os.getgroups() == []") == "True"


async def test_another_session_s_files_and_processes_are_out_of_reach(pool: SandboxPool) -> None:
    one, other = await open_session(pool), await open_session(pool)
    secret = await value_of(
        one,
        "for f in 'secret', '/tmp/one': n = open(f, 'w').write('s')\nos.getcwd(), os.getpid(), os.getuid()",
    )
    cwd, pid, uid = eval(secret)
    assert await value_of(other, "os.getuid()") != str(uid)
    assert await error_of(other, f"open({cwd!r} + '/secret').read()") == "PermissionError"
    assert await error_of(other, f"os.listdir({cwd!r})") == "PermissionError"
    assert await error_of(other, "open('/tmp/one').read()") == "PermissionError"
    assert await error_of(other, "os.unlink('/tmp/one')") == "PermissionError"
    assert await error_of(other, f"os.kill({pid}, 9)") in {"PermissionError", "ProcessLookupError"}
    assert await error_of(other, f"open('/proc/{pid}/mem', 'rb')") in {"PermissionError", "FileNotFoundError"}
    assert await value_of(one, "open('secret').read()") == "s"
    await one.close()
    assert await value_of(other, "os.path.exists('/tmp/one')") == "False"
    await other.close()


async def test_the_next_session_of_a_slot_finds_nothing_and_is_another_user(pool: SandboxPool) -> None:
    uids = set()
    for _ in range(2 * pool.settings.sessions_per_cell):
        session = await open_session(pool)
        uids.add(await value_of(session, "os.getuid()"))
        assert await value_of(session, "os.listdir('.'), os.listdir('/tmp'), os.listdir('/dev/shm')") == "([], [], [])"
        await session.run("for d in '.', '/tmp', '/dev/shm': n = open(d + '/left', 'w').write('x')")
        await session.close()
    assert len(uids) == 2 * pool.settings.sessions_per_cell


async def test_the_supervisor_s_socket_is_out_of_reach(session: Session) -> None:
    code = "import socket; s = socket.socket(socket.AF_UNIX); s.connect('/run/cell/cell.sock')"
    assert await error_of(session, code) == "PermissionError"


async def test_the_supervisor_and_the_zygote_cannot_be_killed_or_read(session: Session) -> None:
    for pid in (1, 2, 3):
        code = f"os.kill({pid}, 9)"
        assert await error_of(session, code) in {"PermissionError", "ProcessLookupError"}
        assert await error_of(session, f"open('/proc/{pid}/environ', 'rb').read()") in {
            "PermissionError",
            "FileNotFoundError",
        }
    assert await error_of(session, "os.kill(-1, 0) or 1/0") in {"ZeroDivisionError", "PermissionError"}
    assert (await session.run("1")).state is State.KEPT


async def test_a_fork_bomb_stops_at_the_limit_and_leaves_the_neighbours_alone(pool: SandboxPool) -> None:
    bomb, neighbour = await open_session(pool), await open_session(pool)
    code = (
        "import os, time\nchildren = 0\ntry:\n    for _ in range(500):\n        if os.fork() == 0:\n"
        "            time.sleep(60); os._exit(0)\n        children += 1\nexcept BlockingIOError: pass\nchildren"
    )
    answer = await bomb.run(code)
    assert answer.status is Status.OK
    assert int(answer.result or 0) < 40
    assert (await neighbour.run("import subprocess; subprocess.run(['true']).returncode")).result == "0"
    await bomb.close()
    await neighbour.close()


async def test_a_bomb_whose_children_bomb_is_gone_after_close(pool: SandboxPool) -> None:
    bomb = await open_session(pool)
    await bomb.run("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", timeout_s=0.5)
    await asyncio.wait_for(bomb.close(), 60)
    after = await open_session(pool)
    await after.run(
        "import os\ndef words(pid):\n    try: return open(f'/proc/{pid}/cmdline').read()\n"
        "    except (FileNotFoundError, ProcessLookupError): return ''"  # it has ended since it was listed
    )
    count = "sum('zygote' in words(p) for p in os.listdir('/proc') if p.isdigit())"
    assert int(await value_of(after, count)) <= 1 + pool.settings.sessions_per_cell
    await after.close()


async def test_a_slot_s_disk_is_bounded(pool: SandboxPool) -> None:
    session = await open_session(pool)
    code = "for i in range(4):\n    with open(f'f{i}', 'wb') as f: f.write(b'x' * (30 << 20))"
    assert await error_of(session, code) == "OSError"
    await session.close()
    fresh = await open_session(pool)
    assert await value_of(fresh, "import shutil; shutil.disk_usage('.').used < 1 << 20") == "True"
    await fresh.close()


async def test_tracing_namespaces_and_mounts_are_refused(session: Session) -> None:
    code = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\ndef call(name, *a): return getattr(libc, name)(*a)"
    await session.run(code)
    for call in (
        "'unshare', 0x10000000 | 0x20000",
        "'mount', b'x', b'/tmp', b'tmpfs', 0, 0",
        "'ptrace', 16, 1, 0, 0",
        "'setns', 0, 0",
    ):
        assert await value_of(session, f"call({call})") == "-1", call


async def test_unix_sockets_and_threads_and_subprocesses_still_work(session: Session) -> None:
    code = (
        "import socket, threading, subprocess\na, b = socket.socketpair(); n = a.send(b'x')\n"
        "t = threading.Thread(target=a.send, args=(b'y',)); t.start(); t.join()\n"
        "b.recv(1), b.recv(1), subprocess.check_output(['echo', 'z'])"
    )
    assert await value_of(session, code) == r"(b'x', b'y', b'z\n')"
    code = "import multiprocessing as mp\nwith mp.Pool(2) as pool: r = pool.map(abs, [-1, 2])\nr"
    assert await value_of(session, code) == "[1, 2]"


async def test_arithmetic_that_models_write_works(session: Session) -> None:
    code = (
        "import numpy as np, scipy.optimize as so\nroot = round(float(so.brentq(lambda t: t*t - 2, 0, 2)), 6)\n"
        "root, int(np.linalg.matrix_rank(np.eye(3))), sp.factorint(2**31 - 1), str(sp.integrate(sp.Symbol('t')**2))"
    )
    assert await value_of(session, code) == "(1.414214, 3, {2147483647: 1}, 't**3/3')"


# tampering -----------------------------------------------------------------------------------------------------------


async def test_nobody_becomes_root_or_another_user(session: Session) -> None:
    for call in ("os.setuid(0)", "os.setresuid(0, 0, 0)", "os.setgid(0)", "os.setgroups([0])", "os.chown('.', 0, 0)"):
        assert await error_of(session, call) == "PermissionError", call
    code = (
        "import shutil, subprocess\nn = shutil.copy('/bin/sh', 'sh'); os.chmod('sh', 0o6755)\n"
        "try: who = subprocess.run(['./sh', '-pc', 'id -u'], capture_output=True, text=True).stdout.strip()\n"
        "except PermissionError: who = str(os.getuid())\n"  # nothing is executed from there at all
        "who == str(os.getuid())"
    )
    assert await value_of(session, code) == "True"
    sets = "('CapInh', 'CapPrm', 'CapEff', 'CapAmb')"
    code = f"sorted({{l.split()[1] for l in open('/proc/self/status') if l.startswith({sets})}})"
    assert await value_of(session, code) == "['0000000000000000']"
    assert await value_of(session, "[l.split()[1] for l in open('/proc/self/status') if 'NoNewPrivs' in l]") == "['1']"


async def test_own_limits_cannot_be_raised_nor_those_of_others(session: Session) -> None:
    code = (
        "import resource as r\ndef grow(what):\n    hard = r.getrlimit(what)[1]\n"
        "    try: r.setrlimit(what, (hard + 1, hard + 1))\n    except (ValueError, PermissionError): return 'no'\n"
        "[grow(w) for w in (r.RLIMIT_NPROC, r.RLIMIT_DATA, r.RLIMIT_FSIZE, r.RLIMIT_CORE, r.RLIMIT_NOFILE)]"
    )
    assert await value_of(session, code) == "['no', 'no', 'no', 'no', 'no']"
    assert await error_of(session, "r.prlimit(1, r.RLIMIT_NOFILE)") == "PermissionError"
    code = "n = os.write(os.open('/proc/self/oom_score_adj', os.O_WRONLY), b'-1000')"
    assert await error_of(session, code) in {"PermissionError", "OSError"}


async def test_proc_tells_nothing_of_the_neighbours_but_that_they_exist(pool: SandboxPool) -> None:
    one, other = await open_session(pool), await open_session(pool)
    await one.run("import os; os.environ['SECRET'] = 'x'; f = open('secret', 'w')")
    pid = await value_of(one, "os.getpid()")
    for name in ("environ", "mem", "maps", "fd", "cwd", "root", "exe", "stack", "io", "map_files"):
        look = (
            f"p = '/proc/{pid}/{name}'; os.listdir(p) if os.path.isdir(p) else (os.readlink(p), open(p, 'rb').read())"
        )
        assert await error_of(other, look) in {"PermissionError", "FileNotFoundError", "OSError"}, name
    for path in (f"/proc/{pid}/cwd/secret", f"/proc/{pid}/root/tmp", f"/proc/{pid}/fd/3"):
        assert await error_of(other, f"open({path!r})") in {"PermissionError", "FileNotFoundError"}, path
    homes = "[d for s in os.listdir('/s') for d in os.listdir(f'/s/{s}')]"
    assert await error_of(other, homes) == "PermissionError"
    for session in (one, other):
        await session.close()


async def test_the_socket_directory_and_the_slots_cannot_be_changed(session: Session) -> None:
    for code in (
        "os.listdir('/run/cell')",
        "os.rename('/run/cell/cell.sock', '/run/cell/x')",
        "os.unlink('/run/cell/cell.sock')",
        "os.mkdir('/s/0/mine')",
        "os.rename(os.environ['HOME'], os.environ['HOME'] + '2')",
        "os.symlink('/tmp', '/run/cell/link')",
    ):
        assert await error_of(session, code) in {"PermissionError", "OSError", "FileNotFoundError"}, code


async def test_a_stopped_or_continued_supervisor_is_out_of_reach(session: Session) -> None:
    parent = await value_of(session, "os.getppid()")
    for number in ("SIGSTOP", "SIGTERM", "SIGCHLD", "SIGHUP"):
        assert await error_of(session, f"import signal; os.kill({parent}, signal.{number})") == "PermissionError"
    assert await error_of(session, f"os.setpgid(0, os.getpgid({parent}))") == "PermissionError"
    assert (await session.run("1")).state is State.KEPT


async def test_members_of_a_family_reach_no_neighbour(pool: SandboxPool) -> None:
    session, neighbour = await open_session(pool), await open_session(pool)
    await neighbour.run("x = 1; n = open('secret', 'w').write('s')")
    pid = await value_of(neighbour, "os.getpid()")
    home = await value_of(neighbour, "os.environ['HOME']")
    (forked,) = (await pool.fork(session.id, ForkSession(count=1))).sessions
    copy = Session(pool, forked.session_id)
    assert await error_of(copy, f"os.kill({pid}, 9)") in {"PermissionError", "ProcessLookupError"}
    assert await error_of(copy, f"open({home!r} + '/secret')") == "PermissionError"
    for code in ("os.kill(1, 9)", "os.setuid(0)", "import socket; socket.socket()", "open('/usr/x', 'w')"):
        assert await error_of(copy, code) in {"PermissionError", "OSError"}, code
    await copy.run("os.kill(-1, 9)", timeout_s=5)  # its siblings: none of them is promised to survive that
    assert await value_of(neighbour, "x") == "1"
    for one in (copy, session, neighbour):
        await one.close()
