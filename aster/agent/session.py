"""What the tools of one trajectory share: its sandbox session, opened at the first cell, and what they remember.

Calls are serialised by the episode; nobody here knows what a tool is. Deadlines are the caller's, but for the wait in
front of a full service, which is given up as soon as it could not end in time.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import random
from typing import Any

from aster.errors import BackPressure, SandboxLost
from aster.roles import ExecResult, Sandbox, SandboxFactory

log = logging.getLogger(__name__)

_CLOSE_S = 10.0  # a session that does not close by then is left to the service's idle limit
_MIN_RETRY_S = 0.05
_background: set[asyncio.Task[None]] = set()  # asyncio itself keeps only weak references to tasks


class ToolSession:
    """One trajectory's. `memory` belongs to its tools: whatever can be deep-copied, for a fork."""

    def __init__(self, sandboxes: SandboxFactory | None, *, key: str, timeout_s: float, deadline: float) -> None:
        """`timeout_s` of one cell; `deadline` of everything, in seconds of the event loop's clock."""
        self.memory: dict[str, Any] = {}
        self.timeout_s = timeout_s
        self.queue_s = 0.0  # waited for room, in the service and in front of it
        self.node = ""  # of the last sandbox session: ids are OWNER.RANDOM.SEAL
        self.loss_told = False  # the last observation said that the next cell finds a fresh interpreter
        self._sandboxes = sandboxes
        self._sandbox: Sandbox | None = None
        self._key = key
        self._deadline = deadline
        self._cells = 0

    @property
    def session_id(self) -> str:
        """Of the sandbox session; "" before the first cell."""
        return self._sandbox.session_id if self._sandbox else ""

    async def execute(self, code: str) -> ExecResult:
        """One cell, sent once. Only a refusal before anything ran (BackPressure) is sent again, under the same id.

        Raises SandboxError: the trajectory then ends as lost by us.
        """
        self._cells += 1
        call_id = f"call-{self._cells}"
        while True:
            try:
                sandbox = self._sandbox = self._sandbox or await self._open()
                self.node = sandbox.session_id.partition(".")[0]
                response = await sandbox.execute(code, timeout_s=self.timeout_s, call_id=call_id)
            except BackPressure as full:
                await self._wait_for_room(full)
            else:
                self.queue_s += response.queue_s
                return response

    async def fork(self, *, key: str, deadline: float) -> ToolSession:
        """A copy of the sandbox session and of `memory`, each of which goes its own way from here."""
        child = ToolSession(self._sandboxes, key=key, timeout_s=self.timeout_s, deadline=deadline)
        child.memory = copy.deepcopy(self.memory)
        child.loss_told = self.loss_told
        child._cells = self._cells
        while self._sandbox is not None and child._sandbox is None:
            try:
                child._sandbox = await self._arrival(self._sandbox.fork())
            except BackPressure as full:
                await self._wait_for_room(full)
        return child

    async def close(self) -> None:
        """End the sandbox session, if there is one. Waits a little, never raises: the answer no longer matters."""
        sandbox, self._sandbox = self._sandbox, None
        if sandbox is not None:
            await asyncio.wait({_spawn(_close(sandbox))}, timeout=_CLOSE_S)

    async def _open(self) -> Sandbox:
        assert self._sandboxes is not None, "a tool that runs cells must say `needs_sandbox`"
        return await self._arrival(self._sandboxes.open(self._key))

    async def _arrival(self, opening: Any) -> Sandbox:
        """A session that arrives after nobody waits for it any more is closed again."""
        arriving: asyncio.Future[Sandbox] = asyncio.ensure_future(opening)
        try:
            return await asyncio.shield(arriving)
        except asyncio.CancelledError:  # also when the deadline has passed
            arriving.add_done_callback(_close_late)
            raise

    async def _wait_for_room(self, full: BackPressure) -> None:
        """Jittered, so that a full service is not asked by everybody at the same moment."""
        pause = max(full.retry_after_s, _MIN_RETRY_S) * random.uniform(0.75, 1.25)
        if asyncio.get_running_loop().time() + pause >= self._deadline:
            raise SandboxLost("", f"the sandbox was full ({full.reason}) and the trajectory's time was over") from full
        self.queue_s += pause
        await asyncio.sleep(pause)


def _spawn(work: Any) -> asyncio.Task[None]:
    task: asyncio.Task[None] = asyncio.ensure_future(work)
    _background.add(task)
    task.add_done_callback(_background.discard)
    return task


async def _close(sandbox: Sandbox) -> None:
    try:
        async with asyncio.timeout(_CLOSE_S):
            await sandbox.close()
    except Exception:  # policy: a session that cannot be closed is swept by the service's idle limit
        log.warning("sandbox session %s was not closed", sandbox.session_id, exc_info=True)


def _close_late(opening: asyncio.Future[Sandbox]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        _spawn(_close(opening.result()))
