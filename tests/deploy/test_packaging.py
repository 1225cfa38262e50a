"""What an installed copy holds, and what the README says there is."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import tomllib
from pathlib import Path

from deploy_scripts import ROOT

PACKAGES = ("aster", "actors", "serve", "sandbox_image")


def _files(*folders: str) -> list[Path]:
    """Tracked files, and those that git does not ignore; by hand where there is no git (an unpacked archive)."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *folders]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        return sorted(path for name in listed.stdout.splitlines() if (path := ROOT / name).is_file())
    return sorted(p for f in folders for p in (ROOT / f).rglob("*") if p.is_file() and "__pycache__" not in p.parts)


def test_every_data_file_of_a_package_is_installed_with_it() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["package-data"]
    patterns = [f"{package.replace('.', '/')}/{glob}" for package, globs in data.items() for glob in globs]
    names = [str(p.relative_to(ROOT)) for p in _files(*PACKAGES) if p.suffix not in {".py", ".pyi"}]
    assert names
    assert [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)] == []


def test_every_folder_with_modules_is_a_package_that_setuptools_finds() -> None:
    assert {
        str(p.parent.relative_to(ROOT)) for p in _files(*PACKAGES) if not (p.parent / "__init__.py").exists()
    } == set()


def _tree() -> list[str]:
    """Paths of the README's annotated tree: indentation and trailing slashes spelled out."""
    block = re.search(
        r"^## The tree.*?```text\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    assert block is not None
    folders: list[str] = []
    paths: list[str] = []
    for line in block[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        folders[depth:] = [name.rstrip("/")]
        paths.append("/".join(folders[: depth + 1]))
    return paths


def test_the_tree_in_the_readme_names_nothing_that_is_not_there() -> None:
    assert [path for path in _tree() if not (ROOT / path).exists()] == []


def test_the_tree_in_the_readme_names_every_module() -> None:
    listed = set(_tree())
    modules = {str(p.relative_to(ROOT)) for p in _files(*PACKAGES) if p.suffix == ".py"}
    generated = {name for name in modules if "_pb2" in name}
    missing = sorted(name for name in modules - generated - listed if not name.endswith("__init__.py"))
    assert missing == [], "give each one line in the README's tree"


def test_the_readme_names_the_verbs_that_there_are() -> None:
    from aster.cli import VERBS

    named = set(re.findall(r"^\| `aster (\w+)` \|", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE))
    assert named == set(VERBS)


def test_what_the_readme_leaves_to_the_config_is_explained_there() -> None:
    from aster.config import Recipe

    sentence = re.search(r"Explained there and not here are (.*?)\.\n", (ROOT / "README.md").read_text("utf-8"))
    assert sentence is not None
    for section, field in re.findall(r"`(\w+)\.(\w+)", sentence[1]):
        section_type = type(Recipe.model_fields[section].default)
        assert section_type.model_fields[field].description, f"{section}.{field} has no word on it in aster/config.py"


def test_no_message_tells_to_install_this_project_from_an_index() -> None:
    """It is on none: a cure names the package that is missing."""
    named = [p for p in _files(*PACKAGES) if p.suffix == ".py" and "aster-rl[" in p.read_text("utf-8")]
    assert [str(p.relative_to(ROOT)) for p in named] == []
