"""The serving environment's own interpreter, as a cell without an image uses it."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import sandbox_image

_NEEDED = ("grpc", "google.protobuf")
_WANTED = ("numpy", "scipy", "sympy", "mpmath", "matplotlib", "typing_extensions")
_COMPILE_S = 120
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1")

# of every cell, whatever the backend. A fixed hash seed: a cell that is run again prints its sets in the same order
CELL_ENVIRONMENT = {
    **_ONE_THREAD,
    "PYTHONHASHSEED": "0",
    "MPLBACKEND": "Agg",
    "LANG": "C.UTF-8",
    "PYTHONUNBUFFERED": "1",
}


@dataclass(frozen=True)
class HostPython:
    executable: str
    prefix: Path
    search_path: tuple[Path, ...]  # directories that hold the packages, in the order of sys.path
    package: Path  # of `sandbox_image`


def host_python() -> HostPython:
    """The base interpreter (not the virtual environment's link to it) and where its packages are."""
    found = [_directory_of(name) for name in (*_NEEDED, *_WANTED)]
    missing = [name for name, where in zip(_NEEDED, found, strict=False) if where is None]
    if missing:
        raise ModuleNotFoundError(f"{', '.join(missing)} not importable: install the extra `sandbox`")
    wanted = {where for where in found if where is not None}
    order = [Path(entry) for entry in sys.path if entry and Path(entry) in wanted]
    return HostPython(
        executable=os.path.realpath(sys.executable),
        prefix=Path(sys.base_prefix),
        search_path=tuple(dict.fromkeys(order)),
        package=Path(sandbox_image.__file__).parent,
    )


def compiled_packages(python: HostPython) -> Path:
    """A directory of byte code, and matplotlib's list of fonts, for everything that a cell imports; made on first use.

    A cell sees the environment read-only; where that was installed without byte code, every start of a cell would
    compile sympy again (6 s instead of 1). Only we can write the directory; cells see it read-only.
    """
    key = f"{python.executable}:{':'.join(map(str, python.search_path))}:{python.package}:{_WANTED}"
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aster"
    directory = base / f"bytecode-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    directory.mkdir(parents=True, exist_ok=True)
    status = directory.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise PermissionError(f"{directory} must belong to uid {os.geteuid()} and be writable by nobody else")
    done = directory / "complete"
    newest = max(path.stat().st_mtime for path in python.search_path)
    if done.exists() and done.stat().st_mtime > newest:
        return directory
    environment = {**CELL_ENVIRONMENT, "PATH": os.defpath, "PYTHONPYCACHEPREFIX": str(directory)}
    environment["PYTHONPATH"] = ":".join(map(str, (python.package.parent, *python.search_path)))
    subprocess.run(
        [python.executable, "-s", "-m", "sandbox_image.prepare", str(directory / "fonts")],
        env=environment,
        cwd="/",
        check=True,
        capture_output=True,
        timeout=_COMPILE_S,
    )
    done.touch()
    return directory


def _directory_of(name: str) -> Path | None:
    """The `sys.path` entry that holds package `name`, found without importing it."""
    top = name.partition(".")[0]
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None
    if spec is None:
        return None
    where = spec.origin or next(iter(spec.submodule_search_locations or ()), None)
    if where is None:
        return None
    path = Path(where)
    for parent in path.parents:
        if parent.name == top:
            return parent.parent
    return path.parent
