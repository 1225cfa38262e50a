"""A small Debian root file system with a full python3, made by debootstrap from the host's own mirror. Needs root."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

RECIPE = "1"  # part of the base image's name: count up when what follows changes
_PACKAGES = ("python3",)  # not python3-minimal, which has no json
_DEBOOTSTRAP_S = 600
# what a cell never uses: package manager, documentation, locales, perl
_DROP = (
    "usr/share/doc",
    "usr/share/man",
    "usr/share/info",
    "usr/share/locale",
    "usr/share/perl5",
    "usr/share/perl",
    "usr/lib/apt",
    "usr/lib/x86_64-linux-gnu/perl",
    "usr/lib/x86_64-linux-gnu/perl-base",
    "usr/share/zoneinfo/right",
    "var/cache/apt",
    "var/lib/apt/lists",
    "var/log",
    "var/cache/debconf",
)
_FALLBACK_SUITE = "bookworm"


def suite(os_release: Path = Path("/etc/os-release")) -> str:
    """The host's own Debian or Ubuntu release, since debootstrap and the mirror know it; else Debian's."""
    fields = (
        dict(re.findall(r'^(\w+)="?([^"\n]*)"?$', os_release.read_text(), re.MULTILINE)) if os_release.exists() else {}
    )
    return fields.get("VERSION_CODENAME") or _FALLBACK_SUITE


def host_mirror(suite: str, apt: Path = Path("/etc/apt")) -> str | None:
    """The URI from which the host's APT takes `suite`, in either of its two file formats."""
    for path in sorted(apt.glob("sources.list.d/*.sources")):
        for stanza in re.split(r"\n\s*\n", path.read_text()):
            fields = dict(re.findall(r"^(\w[\w-]*):\s*(.+)$", stanza, re.MULTILINE))
            if suite in fields.get("Suites", "").split() and "main" in fields.get("Components", "").split():
                return fields["URIs"].split()[0]
    for path in (apt / "sources.list", *sorted(apt.glob("sources.list.d/*.list"))):
        if not path.exists():
            continue
        line = re.compile(rf"^deb\s+(?:\[[^]]*\]\s+)?(\S+)\s+{re.escape(suite)}\s.*\bmain\b", re.MULTILINE)
        if found := line.search(path.read_text()):
            return found.group(1)
    return None


def make(cache: Path, *, suite: str, mirror: str | None) -> Path:
    """A tar of the root file system in `cache`; made once."""
    from sandbox_image.build import BuildError

    target = cache / f"rootfs-{suite}-{RECIPE}.tar"
    if target.exists():
        return target
    program = shutil.which("debootstrap") or shutil.which("debootstrap", path="/usr/sbin:/sbin")
    if program is None:
        raise BuildError("debootstrap is not installed: install it, or give a base image (--base, BASE_IMAGE)")
    if os.geteuid() != 0:
        raise BuildError("debootstrap needs root: run `make image` as root, or give a base image (--base, BASE_IMAGE)")
    mirror = mirror or host_mirror(suite)
    with tempfile.TemporaryDirectory(prefix="aster-rootfs-") as directory:
        root = Path(directory) / "root"
        command = [program, "--variant=minbase", f"--include={','.join(_PACKAGES)}", suite, str(root)]
        command += [mirror] if mirror else []
        try:
            done = subprocess.run(command, capture_output=True, timeout=_DEBOOTSTRAP_S, check=False)
        except subprocess.TimeoutExpired:
            raise BuildError(f"debootstrap did not end within {_DEBOOTSTRAP_S} s; is the mirror reachable?") from None
        if done.returncode != 0:
            words = (done.stdout + done.stderr).decode(errors="replace")[-2000:]
            raise BuildError(f"debootstrap {suite} failed; choose a mirror with --mirror or give --base:\n{words}")
        for name in _DROP:
            shutil.rmtree(root / name, ignore_errors=True)
        making = target.with_suffix(f".{os.getpid()}")
        with tarfile.open(making, "w", format=tarfile.PAX_FORMAT) as tar:
            for name in sorted(os.listdir(root)):
                if name not in ("dev", "proc", "sys"):  # Docker mounts its own
                    tar.add(root / name, name)
        making.rename(target)
    return target
