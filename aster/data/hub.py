"""A data set named on a command line: a local path, a URL, or a Hugging Face id, as local files."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from urllib.parse import urlparse

import httpx

from aster.errors import DataError

_SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".json")
_TIMEOUT_S = 60.0


def local_files(name: str, *, cache: Path | None = None) -> list[Path]:
    """The files of `name`: a file, a directory (its data files, sorted), a URL of one file, or a data set's id.

    Downloads are kept in `cache` (default: below the Hugging Face cache). Raises `DataError` with the cure.
    """
    path = Path(name)
    if path.is_file():
        return [path]
    if path.is_dir():
        return _data_files(path, name)
    if name.startswith(("http://", "https://")):
        return [_download(name, cache or _cache())]
    if name.count("/") == 1 and not path.suffix:
        return _from_hub(name)
    raise DataError(f"{name}: no such file or directory, and neither a URL nor a data set's id OWNER/NAME")


def _data_files(directory: Path, name: str) -> list[Path]:
    found = sorted(p for p in directory.rglob("*") if p.suffix in _SUFFIXES and p.is_file())
    if not found:
        raise DataError(f"{name} holds no file of the kinds {', '.join(_SUFFIXES)}")
    return found


def _from_hub(name: str) -> list[Path]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        directory = snapshot_download(name, repo_type="dataset", allow_patterns=[f"*{s}" for s in _SUFFIXES])
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, httpx.HTTPError, OSError) as error:
        raise DataError(
            f"data set {name} cannot be fetched from the hub ({type(error).__name__}: {str(error).splitlines()[0]}): "
            "download it elsewhere and give the path of its parquet or JSON Lines file"
        ) from None
    return _data_files(Path(directory), name)


def _download(url: str, cache: Path) -> Path:
    suffix = Path(urlparse(url).path).suffix
    if suffix not in _SUFFIXES:
        raise DataError(
            f"{url}: unknown kind of file {suffix!r}; give a URL that ends in one of {', '.join(_SUFFIXES)}"
        )
    target = cache / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}{suffix}"
    if target.is_file():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(f"{suffix}.part")
    try:
        with httpx.stream("GET", url, follow_redirects=True, timeout=_TIMEOUT_S) as answer, open(partial, "wb") as file:
            answer.raise_for_status()
            for chunk in answer.iter_bytes():
                file.write(chunk)
    except httpx.HTTPError as error:
        partial.unlink(missing_ok=True)
        raise DataError(f"{url} cannot be fetched ({type(error).__name__}: {error}): give a local path") from None
    partial.replace(target)
    return target


def _cache() -> Path:
    return Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface") / "aster"
