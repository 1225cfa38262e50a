"""A data set named on a command line: a local path, a URL, or a Hugging Face id, as local files."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from urllib.parse import urlparse

import httpx

from aster.errors import DataError

_KINDS = ((".parquet",), (".jsonl", ".ndjson"), (".json",))  # of a folder's files those of the first kind are its data
_SUFFIXES = tuple(suffix for kind in _KINDS for suffix in kind)
_ABOUT = frozenset({"dataset_infos.json", "dataset_info.json"})
_SHARD = re.compile(r"(-\d+-of-\d+|/\d+)\Z")
_TIMEOUT_S = 60.0


def local_files(name: str, *, cache: Path | None = None) -> list[Path]:
    """The files of `name`: a file, a directory (its data files, sorted), a URL of one file, or a data set's id.

    A directory's data are its parquet files, where it has none its JSON Lines, else its JSON. `OWNER/NAME:train` is
    one split of a data set, and needed where it has several (`OWNER/NAME:main/train`: and several configurations).
    Downloads are kept in `cache` (default: below the Hugging Face cache). Raises `DataError` with the cure.
    """
    path = Path(name)
    if path.is_file():
        return [path]
    if path.is_dir():
        return _data_files(path, name)
    if name.startswith(("http://", "https://")):
        return [_download(name, cache or _cache())]
    data_set, _, split = name.partition(":")
    if data_set.count("/") == 1 and not Path(data_set).suffix:
        return _of_split(_from_hub(data_set), data_set, split)
    raise DataError(f"{name}: no such file or directory, and neither a URL nor a data set's id OWNER/NAME[:SPLIT]")


def _data_files(directory: Path, name: str) -> list[Path]:
    found = sorted(p for p in directory.rglob("*") if p.name not in _ABOUT and p.is_file())
    for kind in _KINDS:
        if data := [p for p in found if p.suffix in kind]:
            return data
    raise DataError(f"{name} holds no file of the kinds {', '.join(_SUFFIXES)}")


def _of_split(directory: Path, data_set: str, split: str) -> list[Path]:
    """The shards of the one split of that name, "" = of the only one. DataError, with all there are, where it is not
    one."""
    named = {p: _SHARD.sub("", str(p.relative_to(directory).with_suffix(""))) for p in _data_files(directory, data_set)}
    ends = re.compile(rf"(?:.*?/)?{re.escape(split)}(?=/|\Z)") if split else re.compile(".*")
    found = {p: match[0] for p, name in named.items() if (match := ends.match(name))}
    if len(set(found.values())) != 1:
        every = sorted(set(named.values()))
        raise DataError(
            f"data set {data_set} {f'has not one {split!r}, but' if split else 'has'} {', '.join(every)}: "
            f"name one, e.g. {data_set}:{max(every, key=lambda name: 'train' in name)}"
        )
    return list(found)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        directory = snapshot_download(name, repo_type="dataset", allow_patterns=[f"*{s}" for s in _SUFFIXES])
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, httpx.HTTPError, OSError) as error:
        raise DataError(
            f"data set {name} cannot be fetched from the hub ({type(error).__name__}: {str(error).splitlines()[0]}): "
            "download it elsewhere and give the path of its parquet or JSON Lines file"
        ) from None
    return Path(directory)


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
