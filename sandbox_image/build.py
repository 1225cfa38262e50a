"""Builds the image of a cell where no image registry may be reachable: `python -m sandbox_image.build`.

    base image   --base IMAGE, else a Debian root file system made by debootstrap (rootfs.py), cached as a local image
    packages     the host's pip installs requirements.txt for the base's Python; the build itself needs no network
    image        base + packages + this directory, labelled with a hash of all three: built again only when one changed

Not copied into the image. Talks to Docker through the SDK, never through a command-line client.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
IMAGE = "aster-sandbox:latest"
LABEL = "aster.sandbox.content"
_HOST_ONLY = {"build.py", "rootfs.py", "Dockerfile", "seccomp.json"}
_BUILD_S, _RUN_S, _PIP_S = 900, 120, 600
_MIN_PYTHON = (3, 11)

_DESCRIBE = (
    "import json, sys, platform; print(json.dumps([sys.version_info[0], sys.version_info[1], platform.machine()]))"
)
_VERIFY = "import json, math, sqlite3, ssl, ctypes, numpy, scipy, sympy, mpmath, grpc, google.protobuf; print('ok')"


class BuildError(RuntimeError):
    """The image cannot be made; the message says which step and what would cure it."""


def package_files() -> list[Path]:
    """What of this directory goes into the image."""
    return sorted(
        path
        for path in HERE.rglob("*")
        if path.suffix in {".py", ".txt"} and path.name not in _HOST_ONLY and "__pycache__" not in path.parts
    )


def content_hash(base_id: str) -> str:
    digest = hashlib.sha256(base_id.encode())
    for path in (*package_files(), HERE / "Dockerfile"):
        digest.update(str(path.relative_to(HERE)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def build(*, base: str | None, tag: str, cache: Path, force: bool = False, mirror: str | None = None) -> str:
    """The image's id. Does nothing when `tag` was built from the same content."""
    client = _client()
    base = base or _default_base(client, cache=cache, mirror=mirror)
    base_id = _image_id(client, base)
    if base_id is None:
        raise BuildError(f"no local image {base!r}: load or tag one, or leave the base out to make a Debian one")
    content = content_hash(base_id)
    existing = _image(client, tag)
    if existing is not None and existing.labels.get(LABEL) == content and not force:
        _say(f"{tag} is up to date ({content})")
        return str(existing.id)
    major, minor, machine = json.loads(_run(client, base, _DESCRIBE))
    if (major, minor) < _MIN_PYTHON:
        raise BuildError(f"base {base!r} has Python {major}.{minor}; a cell needs {_MIN_PYTHON[0]}.{_MIN_PYTHON[1]}")
    site = install_packages(cache, python=f"{major}.{minor}", machine=machine)
    began = time.monotonic()
    _docker_build(client, base=base, tag=tag, site=site, content=content)
    _run(client, tag, _VERIFY)
    image = _image(client, tag)
    assert image is not None
    _say(f"built {tag} ({content}) in {time.monotonic() - began:.0f} s")
    return str(image.id)


def install_packages(cache: Path, *, python: str, machine: str) -> Path:
    """requirements.txt as wheels for `python`, in a directory that is made once. Uses the host's own pip settings."""
    requirements = HERE / "requirements.txt"
    key = hashlib.sha256(f"{python} {machine} {requirements.read_text()}".encode()).hexdigest()[:12]
    target = cache / f"site-{python}-{key}"
    if target.is_dir():
        return target
    making = target.with_suffix(f".{os.getpid()}")
    shutil.rmtree(making, ignore_errors=True)
    began = time.monotonic()
    command = [*_installer(), "--target", str(making), "--python-version", python, "--only-binary=:all:"]
    done = subprocess.run([*command, "-r", str(requirements)], capture_output=True, timeout=_PIP_S, check=False)
    if done.returncode != 0:
        raise BuildError(f"the packages could not be installed:\n{done.stderr.decode(errors='replace')[-3000:]}")
    slim(making)
    making.rename(target)
    packages = len(list(target.glob("*.dist-info")))
    _say(f"installed {packages} packages for Python {python} in {time.monotonic() - began:.0f} s")
    return target


def _installer() -> list[str]:
    """pip of this interpreter, of the path, or uv; each with the user's own configuration."""
    for command in ([sys.executable, "-m", "pip"], ["python3", "-m", "pip"]):
        if shutil.which(command[0]) and not subprocess.run([*command, "--version"], capture_output=True).returncode:
            return [*command, "install", "--quiet", "--no-compile", "--no-warn-conflicts", "--implementation", "cp"]
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", "--quiet", "--no-compile-bytecode"]
    raise BuildError("neither pip nor uv is here: install one of them")


def slim(site: Path) -> None:
    """Remove what no session needs: the packages' own tests, headers, command-line entry points, compiled files."""
    for path in sorted(site.rglob("*"), reverse=True):
        useless = path.name in {"tests", "__pycache__", "include", "benchmarks", "sample_data"} and path.is_dir()
        if useless and "sympy/testing" not in str(path):
            shutil.rmtree(path)
    for name in ("bin", "share"):
        shutil.rmtree(site / name, ignore_errors=True)


def _docker_build(client: Any, *, base: str, tag: str, site: Path, content: str) -> None:
    import docker.errors

    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.add(HERE / "Dockerfile", "Dockerfile")
        for path in package_files():
            tar.add(path, f"sandbox_image/{path.relative_to(HERE)}")
        tar.add(site, "site")
    context.seek(0)
    try:
        client.images.build(
            fileobj=context,
            custom_context=True,
            tag=tag,
            buildargs={"BASE_IMAGE": base},
            labels={LABEL: content},
            network_mode="none",
            rm=True,
            forcerm=True,
            timeout=_BUILD_S,
        )
    except docker.errors.BuildError as error:
        log = "".join(str(line.get("stream", line.get("error", ""))) for line in error.build_log)
        raise BuildError(f"docker build failed: {error}\n{log[-3000:]}") from None
    except docker.errors.APIError as error:
        raise BuildError(f"docker build failed: {error}") from None


def _client() -> Any:
    import docker
    import docker.errors
    import requests

    try:
        client = docker.from_env(timeout=_BUILD_S)
        client.ping()
    except (docker.errors.DockerException, requests.RequestException) as error:
        raise BuildError(f"no Docker daemon answers ({error}): start dockerd or set DOCKER_HOST") from None
    return client


def _image(client: Any, name: str) -> Any:
    import docker.errors

    try:
        return client.images.get(name)
    except docker.errors.ImageNotFound:
        return None


def _image_id(client: Any, name: str) -> str | None:
    image = _image(client, name)
    return None if image is None else str(image.id)


def _default_base(client: Any, *, cache: Path, mirror: str | None) -> str:
    from sandbox_image import rootfs

    suite = rootfs.suite()
    name = f"aster-sandbox-base:{suite}-{rootfs.RECIPE}"
    if _image_id(client, name) is None:
        began = time.monotonic()
        tar = rootfs.make(cache, suite=suite, mirror=mirror)
        _say(f"root file system of {tar.stat().st_size >> 20} MB in {time.monotonic() - began:.0f} s")
        repository, _, version = name.partition(":")
        client.api.import_image_from_file(str(tar), repository=repository, tag=version)
    return name


def _run(client: Any, image: str, code: str) -> str:
    """Output of `python3 -c CODE` in the image, without network."""
    import docker.errors

    try:
        output: bytes = client.containers.run(
            image, ["-c", code], entrypoint=["python3"], network_mode="none", remove=True, read_only=True
        )
    except docker.errors.ContainerError as error:
        words = (error.stderr or b"").decode(errors="replace")[-2000:]
        raise BuildError(f"{image}: python3 -c {code!r} failed: {words}") from None
    except docker.errors.APIError as error:
        raise BuildError(f"{image} has no python3 that runs: {error}") from None
    return output.decode().strip()


def _say(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the sandbox image, without an image registry if need be.")
    parser.add_argument(
        "--base", default=os.environ.get("BASE_IMAGE") or None, help="a local image with Python >= 3.11"
    )
    parser.add_argument("--tag", default=IMAGE)
    parser.add_argument(
        "--cache", type=Path, default=Path(".cache/sandbox_image"), help="packages and root file system"
    )
    parser.add_argument("--mirror", default=None, help="Debian mirror for debootstrap; default: the host's own")
    parser.add_argument("--force", action="store_true", help="build even when nothing changed")
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    try:
        build(base=args.base, tag=args.tag, cache=args.cache.resolve(), force=args.force, mirror=args.mirror)
    except BuildError as error:
        sys.exit(f"sandbox image: {error}")


if __name__ == "__main__":
    main()
