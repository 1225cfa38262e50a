"""Every file that we ship for a cluster is read by what will read it there, as far as that is installed here."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
KUBERAY = DEPLOY / "kuberay"


def _yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))


@pytest.mark.parametrize("path", sorted(DEPLOY.glob("ray-cluster*.yaml")), ids=lambda p: p.name)
def test_a_cluster_file_passes_the_schema_of_ray_up(path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(_yaml(path))
    validate_config(config)
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    starts = [c for c in (*config["head_start_ray_commands"], *config["worker_start_ray_commands"]) if "ray start" in c]
    assert starts
    assert all("RAY_AUTH_MODE=token" in command for command in starts), "every side needs the same mode"


def test_the_cloud_cluster_has_a_head_gpu_nodes_and_sandbox_nodes_without_gpu() -> None:
    types = _yaml(DEPLOY / "ray-cluster.yaml")["available_node_types"]
    assert types["gpu"]["resources"]["GPU"] == 8
    assert types["sandbox"]["resources"]["sandbox"] > 0
    assert "GPU" not in types["sandbox"]["resources"]
    assert "sandbox" not in types["gpu"]["resources"]


def test_ray_installs_what_its_autoscaler_needs_on_the_head_in_the_cloud() -> None:
    """By its own defaults for AWS, as long as our file sets no commands in their place; the image has no boto3."""
    from ray.autoscaler._private.util import prepare_config

    config = prepare_config(_yaml(DEPLOY / "ray-cluster.yaml"))
    assert [command for command in config["head_setup_commands"] if "boto3" in command]


def test_machines_reached_by_ssh_start_ray_from_the_gpu_build_where_there_is_one() -> None:
    config = _yaml(DEPLOY / "ray-cluster-ssh.yaml")
    for command in (*config["head_start_ray_commands"], *config["worker_start_ray_commands"]):
        assert "PATH=$PWD/.venv-gpu/bin:$PWD/.venv/bin:$PATH " in command


def test_only_sandbox_nodes_get_the_docker_socket() -> None:
    config = _yaml(DEPLOY / "ray-cluster.yaml")
    assert not [option for option in config["docker"]["run_options"] if "docker.sock" in option]
    holders = [n for n, t in config["available_node_types"].items() if "docker.sock" in str(t.get("docker", {}))]
    assert holders == ["sandbox"]


def _cluster_spec(path: Path) -> dict[str, Any]:
    document = _yaml(path)
    assert document["apiVersion"] == "ray.io/v1"
    spec = document["spec"]
    return spec["rayClusterSpec"] if document["kind"] == "RayJob" else spec


@pytest.mark.parametrize("path", sorted(KUBERAY.glob("*.yaml")), ids=lambda p: p.name)
def test_a_kuberay_file_has_the_installed_ray_token_auth_and_whole_pods(path: Path) -> None:
    spec = _cluster_spec(path)
    assert spec["rayVersion"] == ray.__version__
    assert spec["authOptions"] == {"mode": "token"}
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert set(groups) == {"gpu", "sandbox"}
    for group in groups.values():
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (spec["headGroupSpec"], *groups.values()):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod.get("volumes", ())}
        for container in (*pod["containers"], *pod.get("initContainers", ())):
            assert container["image"]
            assert {mount["name"] for mount in container.get("volumeMounts", ())} <= volumes
    # KubeRay hands the parameter to a shell: JSON inside double quotes
    assert groups["sandbox"]["rayStartParams"]["resources"] == '"{\\"sandbox\\": 64}"'


def test_the_job_runs_on_the_cluster_that_raycluster_yaml_describes() -> None:
    assert _cluster_spec(KUBERAY / "rayjob.yaml") == _cluster_spec(KUBERAY / "raycluster.yaml")


def test_the_jobs_entrypoint_names_files_verbs_and_options_that_exist() -> None:
    from aster.config import Recipe

    entrypoint = _yaml(KUBERAY / "rayjob.yaml")["spec"]["entrypoint"]
    deploy, train = (part.split() for part in entrypoint.split("&&"))
    assert (ROOT / deploy[1]).is_file()
    assert train[:4] == ["python", "-m", "aster.train", "--recipe"]
    recipe = Recipe.load(train[4], train[5:])
    assert recipe.model.path == "/aster/runs/sft/hf"
    mounts = _cluster_spec(KUBERAY / "rayjob.yaml")["headGroupSpec"]["template"]["spec"]["containers"][0][
        "volumeMounts"
    ]
    assert recipe.run.dir in {mount["mountPath"] for mount in mounts}


def test_cells_sockets_and_the_docker_socket_share_one_volume_at_one_path() -> None:
    """A cell's directory is bind-mounted by path, so the pool and the daemon must see it under the same one."""
    sandbox = next(g for g in _cluster_spec(KUBERAY / "rayjob.yaml")["workerGroupSpecs"] if g["groupName"] == "sandbox")
    pod = sandbox["template"]["spec"]
    everyone = (*pod["containers"], *pod["initContainers"])
    assert {m["mountPath"] for c in everyone for m in c["volumeMounts"] if m["name"] == "sockets"} == {"/run/aster"}
    entrypoint = _yaml(KUBERAY / "rayjob.yaml")["spec"]["entrypoint"]
    assert "--socket-root /run/aster/" in entrypoint


def test_the_serve_file_passes_serves_schema_and_our_own() -> None:
    from ray.serve.schema import ServeDeploySchema

    from serve.app import SandboxAppArgs

    config = _yaml(DEPLOY / "serve.yaml")
    (application,) = ServeDeploySchema.model_validate(config).applications
    assert application.import_path == "serve.app:build_app"
    SandboxAppArgs.model_validate(application.args)
    assert config["http_options"]["host"] == "127.0.0.1", "loopback unless somebody decides otherwise"


def test_the_dockerfile_copies_only_what_is_there() -> None:
    text = (DEPLOY / "docker" / "Dockerfile").read_text("utf-8")
    sources = [s for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for s in line.split()[:-1]]
    assert sources
    assert [s for s in sources if not (ROOT / s).exists()] == []


def test_the_dockerfile_installs_where_every_package_is_to_be_found() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    wanted = {f"{pattern.removesuffix('*')}/__init__.py" for pattern in packages["find"]["include"]}
    before, install, _ = (DEPLOY / "docker" / "Dockerfile").read_text("utf-8").partition("RUN python deploy/")
    assert install
    assert wanted <= set(re.findall(r"^COPY (\S+) \1$", before, re.MULTILINE))


@pytest.mark.parametrize("path", [*sorted(DEPLOY.glob("*.sh")), ROOT / ".ci" / "run"], ids=lambda p: p.name)
def test_a_script_parses_and_is_executable(path: Path) -> None:
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True, check=False).stderr == b""
    assert path.stat().st_mode & 0o111


@pytest.mark.parametrize("path", [ROOT / "README.md", DEPLOY / "README.md"], ids=lambda p: str(p.relative_to(ROOT)))
def test_words_beside_a_make_target_are_a_comment(path: Path) -> None:
    """So that the line can be pasted: make would take every word for a target."""
    blocks = re.findall(r"^```\n(.*?)^```", path.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("make ")]
    assert lines
    assert [line for line in lines if not re.fullmatch(r"make [\w-]+( [A-Z]+=\S+)*( +# .*)?", line)] == []
