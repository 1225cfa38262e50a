"""Engines that died are replaced in the background, each once, until replacements do not live to finish anything."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from actors.handles import CLOSE_S, EngineHandle, Publisher, Replace, within
from aster.errors import EngineLost, GangFailure, WeightSyncError

log = logging.getLogger(__name__)

_BARREN = 3  # replacements in a row that died before they had finished a trajectory: no more are made then


class Replacements:
    """Of one pool's engines, on its event loop."""

    def __init__(
        self,
        replace_engine: Replace | None,
        *,
        publisher: Publisher | None,
        arrived: Callable[[EngineHandle, EngineHandle, bool], None],
        ended: Callable[[BaseException | None], None],
    ) -> None:
        """`replace_engine`: None = the dead stay dead. `arrived(dead, engine, is_current)`: an engine that has the
        weights published last, or has to wait for the next. `ended(error)`: after each replacement, however it went;
        with an error when that was not to be expected."""
        self._replace_engine, self._publisher = replace_engine, publisher
        self._arrived, self._ended = arrived, ended
        self._mourned: set[str] = set()
        self._made: set[str] = set()  # names of replacements
        self._barren = 0
        self.under_way: set[asyncio.Task[None]] = set()

    def see_to(self, engines: Iterable[EngineHandle]) -> None:
        """Have every one of them that died replaced."""
        if self._replace_engine is None:
            return
        for engine in engines:
            if engine.lost and engine.name not in self._mourned:
                self._mourned.add(engine.name)
                self._barren += engine.name in self._made
                if self._barren >= _BARREN:
                    log.error("%s is not replaced: %d replacements died before any finished work", engine.name, _BARREN)
                    continue
                task = asyncio.create_task(
                    self._bring_up(engine, self._replace_engine), name=f"replacement of {engine.name}"
                )
                self.under_way.add(task)
                task.add_done_callback(self._over)

    def works(self) -> None:
        """Some engine has finished something: whatever kills engines, it does not kill all at once."""
        self._barren = 0

    async def _bring_up(self, dead: EngineHandle, replace_engine: Replace) -> None:
        log.warning("%s is dead and is being replaced: %s", dead.name, dead.lost)
        try:
            engine = await replace_engine(dead)
        except EngineLost as error:  # policy: the others go on; without any the pool says so
            log.error("%s was not replaced: %s", dead.name, error)
            return
        self._made.add(engine.name)
        try:
            is_current = self._publisher is None or await self._publisher.admit(engine)
        except BaseException as error:
            await within(CLOSE_S, "closing", {engine.name: engine.close()})
            if not isinstance(error, EngineLost | WeightSyncError | GangFailure):
                raise
            log.error("%s does not get the weights, and leaves again: %s", engine.name, error)
            return
        self._arrived(dead, engine, is_current)

    def _over(self, task: asyncio.Task[None]) -> None:
        self.under_way.discard(task)
        if not task.cancelled():
            self._ended(task.exception())
