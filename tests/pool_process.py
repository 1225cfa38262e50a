"""A pool in a process of its own, which a test can kill as a crash does: `kill -9`, in mid-call or between calls.

One line of JSON per call and answer; calls run side by side.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import Any

from waiting import until

ROOT = Path(__file__).parents[1]
_START_S = 120.0
_ANSWER_S = 60.0


class PoolProcess:
    def __init__(self, backend: str, *, node: str, **settings: object) -> None:
        self._command = [sys.executable, "-m", "pool_process", json.dumps([backend, node, settings])]
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._numbers = count(1)

    async def start(self) -> None:
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, limit=1 << 24
        )
        self._reader = asyncio.create_task(self._read())
        self.pid = self._process.pid
        self._answers[0] = asyncio.get_running_loop().create_future()
        self.owner = await asyncio.wait_for(self._answers[0], _START_S)

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            number, error, value = json.loads(line)
            if error:
                self._answers[number].set_exception(RuntimeError(error))
            else:
                self._answers[number].set_result(value)

    def call(self, method: str, *args: object) -> asyncio.Future[Any]:
        """`create`: the id. `execute(id, {...})`: the answer as a dict. `list_files(id)`: their names. `put`: as of
        `sandboxes`."""
        number = next(self._numbers)
        self._answers[number] = answer = asyncio.get_running_loop().create_future()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([number, method, args]).encode() + b"\n")
        return answer

    async def create(self, **body: object) -> str:
        return str(await asyncio.wait_for(self.call("create", body), _ANSWER_S))

    async def run(self, session_id: str, code: str, **body: object) -> dict[str, Any]:
        answer = await asyncio.wait_for(self.call("execute", session_id, {"code": code, **body}), _ANSWER_S)
        return dict(answer)

    async def there(self, session_id: str, path: str) -> None:
        """Until the session has a file of that name."""

        async def listed() -> bool:
            return path in await self.call("list_files", session_id)

        await until(listed)

    async def kill(self) -> None:
        """As a crash: nothing of the pool runs any more."""
        if self._process.returncode is None:
            os.kill(self.pid, signal.SIGKILL)
        await self._process.wait()
        await self._reader


async def _main(backend: str, node: str, settings: dict[str, Any]) -> None:
    from sandboxes import Session, pool_settings, put

    from serve.pool import SandboxPool
    from serve.schema import CreateSession, ExecuteRequest

    pool = SandboxPool(pool_settings(backend, **settings), node=node)
    await pool.start()
    tell(0, "", pool.owner)

    async def answer(number: int, method: str, args: list[Any]) -> None:
        try:
            if method == "create":
                tell(number, "", (await pool.create(CreateSession(**args[0]))).session_id)
            elif method == "execute":
                tell(number, "", (await pool.execute(args[0], ExecuteRequest(**args[1]))).model_dump(mode="json"))
            elif method == "put":
                await put(Session(pool, args[0]), args[1])
                tell(number, "", None)
            elif method == "list_files":
                tell(number, "", [file.path for file in (await pool.list_files(*args)).files])
            else:
                tell(number, "", await getattr(pool, method)(*args))
        except Exception as error:
            tell(number, repr(error), None)

    reader = asyncio.StreamReader(limit=1 << 24)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    calls = set()
    while line := await reader.readline():
        call = asyncio.create_task(answer(*json.loads(line)))
        calls.add(call)
        call.add_done_callback(calls.discard)
    await pool.stop()


def tell(number: int, error: str, value: object) -> None:
    print(json.dumps([number, error, value]), flush=True)


if __name__ == "__main__":
    asyncio.run(_main(*json.loads(sys.argv[1])))
