"""PID 1 of a cell: starts zygote and attendant, answers the pool over gRPC on a Unix socket, ends after a silence.

    python -m sandbox_image.supervisor --socket /run/cell/cell.sock --slots 8 --slot-root /s --uid-base 200000

Without `--uid-base` all sessions share this process's uid: then nothing separates them from each other or from the
supervisor, and the backend must give each session a cell of its own (or be the one that promises no isolation).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from pathlib import Path

from sandbox_image import limits
from sandbox_image.cell import Cell
from sandbox_image.processes import Forker, Reaper

_START_S = 60.0
# gRPC's older poller: one thread less between the socket and the event loop, a fifth off every exchange.
_GRPC_EXPERIMENTS = "-event_engine_client,-event_engine_listener"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--slots", type=int, required=True)
    parser.add_argument("--warm", type=int, default=2)
    parser.add_argument("--slot-root", type=Path, required=True, help="directory with one subdirectory per slot")
    parser.add_argument("--uid-base", type=int, default=None)
    parser.add_argument(
        "--shared", action="append", default=[], help="a directory that sessions share, cleaned per uid"
    )
    parser.add_argument(
        "--idle-ttl", type=float, default=300.0, help="seconds of silence after which this process ends"
    )
    parser.add_argument("--die-with-parent", action="store_true")
    parser.add_argument("--seccomp", action="store_true", help="sessions filter their own system calls")
    return parser.parse_args()


async def _serve(args: argparse.Namespace, reaper: Reaper, zygote: Forker, attendant: Forker) -> None:
    reaper.start()
    await zygote.ready(timeout_s=_START_S)
    await attendant.ready(timeout_s=_START_S)
    for slot in range(args.slots):
        (args.slot_root / str(slot)).mkdir(exist_ok=True)
    cell = Cell(
        zygote=zygote,
        attendant=attendant,
        reaper=reaper,
        slots=args.slots,
        warm=min(args.warm, args.slots),
        root=args.slot_root,
        uid_base=args.uid_base,
        shared=args.shared,
        filtered=args.seccomp,
    )
    await cell.fill()
    # only now, with both forking processes running, may gRPC start its threads
    os.environ.setdefault("GRPC_EXPERIMENTS", _GRPC_EXPERIMENTS)
    from sandbox_image.service import serve

    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await serve(cell, zygote, socket=args.socket, idle_ttl_s=args.idle_ttl, stop=stop)
    await cell.shutdown()


def main() -> None:
    args = _arguments()
    # Ray starts threads with every signal blocked, and what they start inherits that: no cell could be interrupted.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    limits.set_dumpable(False)
    limits.become_subreaper()
    if args.die_with_parent:
        limits.die_with_parent()
    reaper = Reaper()
    zygote, attendant = Forker("zygote", reaper), Forker("attendant", reaper)
    asyncio.run(_serve(args, reaper, zygote, attendant))
    sys.stdout.flush()
    os._exit(0)  # gRPC's threads have nothing left to say


if __name__ == "__main__":
    main()
