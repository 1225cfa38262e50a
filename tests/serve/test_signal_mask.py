"""A pool that was started with signals blocked, as Ray's threads are, can still interrupt its cells."""

import signal

import pytest
from sandboxes import open_session, start_pool

from serve.schema import State, Status


@pytest.mark.parametrize("backend", ["bwrap", "process"])
async def test_a_timeout_keeps_the_state_although_the_pool_s_thread_blocks_signals(backend: str) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        pool = await start_pool(backend)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        session = await open_session(pool)
        await session.run("x = 1")  # a cell of its own: the interrupt may come before the first line of the next
        answer = await session.run("import time; time.sleep(9)", timeout_s=0.3)
        assert (answer.status, answer.state) == (Status.TIMEOUT, State.KEPT)
        assert (await session.run("x")).result == "1"
    finally:
        await pool.stop()
