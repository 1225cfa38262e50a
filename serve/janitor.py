"""The janitor: one small process per machine and user, which outlives every pool and removes what dead ones left.

    python -m serve.janitor ROOT

Each pool starts one that ends at once if there is one already; it ends when no owner is left. A pool that is killed for
good (its driver, its cluster, its machine's Ray) cannot clean up, and its containers would stay: supervisors end by
themselves, but a container that removed itself would take the evidence of its end with it. What may be removed is
decided by `serve.owner`: a lease that has ended, and a lock that nobody holds.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from serve import owner
from serve.cells.detached import launch

_POLL_S = 2.0
_AFTER_FAILURE_S = 20.0
_LOG_BYTES = 1 << 20
_KEPT_VARIABLES = ("PATH", "HOME", "TMPDIR", "LANG")

logger = logging.getLogger(__name__)


def ensure(root: Path) -> None:
    """Start the janitor of `root` unless it runs. Blocks for a few tens of milliseconds."""
    lock = owner.try_lock(root / "janitor.lock")
    if lock is None:
        return
    lock.close()
    log = root / "janitor.log"
    if log.exists() and log.stat().st_size > _LOG_BYTES:
        log.unlink()
    environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    environment |= {name: value for name, value in os.environ.items() if name.startswith("DOCKER_")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-s", "-m", "serve.janitor", str(root)]
    try:
        launch(command, environment=environment, record=root / "janitor.process", log=log)
    except (OSError, subprocess.SubprocessError) as error:  # every pool tries again each minute
        logger.error("the sandbox's janitor could not be started: %s", error)


def sweep(root: Path) -> int:
    """Remove what abandoned owners left, cells first; how many cells that were. One that fails is left for next time.

    Raises the last failure when all others are done.
    """
    swept = 0
    failure: Exception | None = None
    for dead in owner.abandoned(root):
        try:
            swept += remove_cells(dead)
            dead.erase()
        except (
            Exception
        ) as error:  # a daemon that does not answer now: the directory stays, so that nothing is forgotten
            failure = error
            failure.add_note(f"removing what {dead.name} left")
    if failure is not None:
        raise failure
    return swept


def remove_cells(dead: owner.Owner) -> int:
    """End the cells of a dead owner, whichever backend made them."""
    removers: dict[str, Callable[[Path], int]] = {"docker": _docker, "bwrap": _bwrap}
    remover = removers.get(dead.backend)  # the cells of `process` died with their owner
    return remover(dead.directory) if remover else 0


def _docker(directory: Path) -> int:
    from serve.cells.docker import remove_cells

    return remove_cells(directory)


def _bwrap(directory: Path) -> int:
    from serve.cells.bwrap import remove_cells

    return remove_cells(directory)


def main(root: Path) -> None:
    while (lock := owner.try_lock(root / "janitor.lock")) is not None:
        while owner.names(root):
            try:
                sweep(root)
                time.sleep(_POLL_S)
            except Exception:  # policy: it must outlive whatever a sweep meets; what is left is met again
                logger.exception("will try again in %g s", _AFTER_FAILURE_S)
                time.sleep(_AFTER_FAILURE_S)
        lock.close()
        if not owner.names(root):  # asked again: a pool that began before the lock was free started no janitor
            return


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main(Path(sys.argv[1]))
