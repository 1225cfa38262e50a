"""The safetensors files of a Hugging Face model directory, found by tensor name. Reads headers, no weights."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors import safe_open

from aster.errors import ConfigError


def tensor_files(path: Path) -> dict[str, Path]:
    """Tensor name -> safetensors file. Raises `ConfigError` for a directory without any."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        return {name: path / file for name, file in json.loads(index.read_text("utf-8"))["weight_map"].items()}
    single = path / "model.safetensors"
    if not single.is_file():
        present = ", ".join(sorted(os.listdir(path))[:8]) if path.is_dir() else "no such directory"
        raise ConfigError(f"model.path={str(path)!r} holds no model.safetensors (found: {present})")
    with safe_open(single, framework="pt") as tensors:
        return dict.fromkeys(tensors.keys(), single)
