"""From what the user calls a model to the folder that holds its weights."""

from __future__ import annotations

import json
import re
from pathlib import Path

INDEX = "model.safetensors.index.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WANTED = ["*.json", "*.safetensors"]
_UNWANTED = ["original/*", "metal/*"]  # the same weights once more


class NotFound(ValueError):
    """No such model; the message says what was tried and what to do."""


def locate(path_or_id: str | Path) -> Path:
    """The folder with the safetensors files of a model.

    A folder is taken as it is, or its `original/` if only that has weights. Anything else is a Hugging Face
    id, found in the local cache or downloaded (huggingface-hub shows the progress). Raises NotFound.
    """
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return weights_folder(folder)
    name = str(path_or_id)
    if folder.exists():
        raise NotFound(f"{name} is a file; a checkpoint is a folder")
    if not _HUB_ID.fullmatch(name):
        raise NotFound(f"there is no folder {name}")
    return weights_folder(_snapshot(name))


def weights_folder(folder: Path) -> Path:
    for candidate in (folder, folder / "original"):
        if (candidate / INDEX).exists() or any(candidate.glob("*.safetensors")):
            return candidate
    raise NotFound(f"{folder} holds no *.safetensors and no {INDEX}, nor does an original/ folder in it")


def inside(path: Path, folder: Path) -> bool:
    """Whether a file of a checkpoint really lies in its folder. In a Hugging Face cache, a snapshot's files
    are links to
    the blobs of the same repository."""
    root = folder.resolve()
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        root = root.parent.parent
    return path.resolve().is_relative_to(root)


def _snapshot(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError:
        raise NotFound(f"there is no folder {name}, and huggingface-hub, which could download it, is not "
                       "installed: pip install 'gptoss-compile[compile]'") from None
    try:
        cached = Path(snapshot_download(name, local_files_only=True))
        if _complete(cached):
            return cached
    except LocalEntryNotFoundError:
        pass
    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except Exception as error:  # offline, no such model, no access: whatever it is, the user gets one line
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise NotFound(f"{name} is no folder, is not complete in the local Hugging Face cache, and cannot be "
                       f"downloaded: {reason}") from None


def _complete(folder: Path) -> bool:
    """Whether an earlier download fetched all weights: a snapshot may hold a part of its repository."""
    try:
        index = folder / INDEX
        if index.exists():
            shards = json.loads(index.read_bytes())["weight_map"].values()
            return all((folder / name).exists() for name in shards)
        return (folder / "config.json").exists() and weights_folder(folder) is not None
    except (ValueError, KeyError, AttributeError):
        return False
