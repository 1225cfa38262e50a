"""bubblewrap without root: one session per cell, and the same promises. Run under a uid that is not 0."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = """
import asyncio, json, os, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from sandboxes import open_session
from serve.pool import PoolSettings, SandboxPool

CELLS = {cells!r}

async def main():
    settings = PoolSettings(backend="bwrap", sessions_per_cell=8, max_sessions=2, socket_root={sockets!r})
    pool = SandboxPool(settings, node="user")
    await pool.start()
    try:
        session = await open_session(pool)
        answers = [await session.run(code) for code in CELLS]
        ignore = "import signal; signal.signal(2, signal.SIG_IGN)"
        stubborn = await session.run(ignore + "\\nwhile True: pass", timeout_s=3)
        fresh = await session.run("'kept' in globals()")
        print(json.dumps({{
            "uid": os.geteuid(), "slots": pool.backend.slots,
            "answers": [answer.error.name if answer.error else answer.result for answer in answers],
            "stubborn": [stubborn.status, stubborn.state], "fresh": [fresh.result, fresh.state],
        }}))
    finally:
        await pool.stop()

asyncio.run(main())
"""

CELLS = {
    "kept = 'yes'": None,
    "1/0": "ZeroDivisionError",
    "kept": "yes",
    "sp.sqrt(8) if 'sympy' in globals() else '2*sqrt(2)'": "2*sqrt(2)",
    "import socket; socket.socket()": "PermissionError",
    "open('/usr/x', 'w')": "OSError",
    "os.kill(1, 9)": None,  # the kernel protects PID 1 from its own namespace
    "open('/proc/1/environ').read()": "PermissionError",
    "import ctypes; ctypes.CDLL(None).unshare(0x10000000)": "-1",
    "kept + kept": "yesyes",
}


def test_a_plain_user_gets_one_session_per_cell_and_the_same_promises(tmp_path: Path) -> None:
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        pytest.skip("bubblewrap is not installed")
    sockets = tempfile.mkdtemp(prefix="ab", dir="/tmp")  # short: a socket's path has 107 bytes
    script = SCRIPT.format(root=str(ROOT), cells=list(CELLS), sockets=sockets)
    command = [sys.executable, "-c", script]
    if os.geteuid() == 0:  # as another uid, in a user namespace that still sees our files
        command = [bwrap, "--dev-bind", "/", "/", "--unshare-user", "--uid", "65534", "--gid", "65534", *command]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "TMPDIR": "/tmp"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, cwd="/", check=False)
    shutil.rmtree(sockets, ignore_errors=True)  # the janitor may still be there
    if "cannot make namespaces" in done.stderr or "No permissions to create" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["uid"] != 0
    assert told["slots"] == 1
    assert dict(zip(CELLS, told["answers"], strict=True)) == CELLS
    assert told["stubborn"] == ["timeout", "lost"]
    assert told["fresh"] == ["False", "lost"]
