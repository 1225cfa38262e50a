"""What every session is forked from: imports the scientific packages once, stays single-threaded, runs no user code,
speaks no gRPC.

`python -m sandbox_image.zygote FD`: FD is one end of a SOCK_SEQPACKET pair; `forks.py` has the protocol.
"""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.metadata
import os
import random
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn

from sandbox_image import forks, limits, seccomp, session

PACKAGES = ("numpy", "scipy", "sympy", "mpmath")
# imported lazily by their packages, and then private to each session that uses them: once, here, is cheaper
_PARTS = ("numpy.random", "scipy.linalg", "scipy.special", "scipy.optimize")
LATER = ("matplotlib",)  # there, but imported by the sessions that draw: most do not


def import_packages() -> dict[str, str]:
    """Version of each package; "" where the machine does not have it."""
    versions = {}
    for name in PACKAGES:
        try:
            module = importlib.import_module(name)
        except ImportError:
            versions[name] = ""
        else:
            versions[name] = str(getattr(module, "__version__", "?"))
    for part in _PARTS:
        if versions[part.partition(".")[0]]:
            importlib.import_module(part)
    for name in LATER:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = ""
    return versions


def font_list() -> Path | None:
    """matplotlib's list of fonts as `prepare.py` made it, in the image or beside the host's byte code; without one,
    the first import in every session would look for all fonts of the machine."""
    places = [Path(__file__).parents[1] / "fonts", Path(sys.pycache_prefix or "/nowhere") / "fonts"]
    return next((path for place in places for path in sorted(place.glob("fontlist-*.json"))), None)


def main(fd: int) -> None:
    control = forks.take_up(fd)
    packages = import_packages()
    work: dict[str, forks.Work] = {"fork": functools.partial(_session, fonts=font_list())}
    gc.collect()
    gc.freeze()  # the collector of a session never touches, and so never copies, these pages
    forks.serve(control, work, packages=packages)


def _session(request: dict[str, Any], control: socket.socket, fds: list[int], *, fonts: Path | None) -> NoReturn:
    channel, stdout, stderr = fds
    uid: int | None = request["uid"]
    os.setsid()
    control.close()
    null = os.open("/dev/null", os.O_RDONLY)
    for source, target in ((null, 0), (stdout, 1), (stderr, 2)):
        os.dup2(source, target)
    for directory in (request["home"], request["tmp"]):
        os.mkdir(directory, 0o700)
        if uid is not None:
            os.chown(directory, uid, uid)
    limits.first_to_be_killed()
    supervisor = request["supervisor"]
    limits.drop_to(uid)
    os.chdir(request["home"])  # after the drop: without DAC_OVERRIDE not even root may enter another's 0700 directory
    os.umask(0o077)
    limits.die_with_parent()
    if os.getppid() != supervisor:  # it has died already, and nobody else would ever end us
        os._exit(0)
    if request["by_tree"]:
        limits.become_subreaper()  # no uid to kill by: keep every descendant in this process's tree
    os.environ.update(HOME=request["home"], TMPDIR=request["tmp"])
    _prepare_matplotlib(os.path.join(request["tmp"], ".matplotlib"), fonts)
    _reseed()
    if request["filtered"]:
        seccomp.apply()
    session.main(channel)
    os._exit(0)


def _prepare_matplotlib(directory: str, fonts: Path | None) -> None:
    """Its cache directory must be writable, and the session's alone."""
    os.environ["MPLCONFIGDIR"] = directory
    if fonts is not None:
        os.mkdir(directory)
        os.symlink(fonts, os.path.join(directory, fonts.name))


def _reseed() -> None:
    """Siblings must not share random numbers. `random` itself re-seeds after a fork."""
    random.seed()
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed()
    if (sympy_random := sys.modules.get("sympy.core.random")) is not None:
        sympy_random.rng.seed()


if __name__ == "__main__":
    main(int(sys.argv[1]))
