"""Where a model is: a folder as named, or a hub id in the local cache. Reads no file, downloads nothing."""

from __future__ import annotations

import re
from pathlib import Path

from ..spec.errors import ModelError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")


def find_model(model: str | Path, *, cache: Path | None = None) -> Path:
    """The folder of `model`: a path, or a hub id such as `Qwen/Qwen2.5-0.5B` found in the hub's local cache.

    `cache` is the cache folder to look in; None is the one huggingface_hub uses. Nothing is
    downloaded. Raises ModelError when there is no such folder and no such cached model.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError(
            "model.not_a_folder",
            f"{folder} is a file.",
            "A model is a folder with config.json, safetensors weights and a tokenizer.",
            "Name the folder that holds the file.",
        )
    text = str(model)
    if _HUB_ID.fullmatch(text) is None:
        raise ModelError(
            "model.not_found",
            f"There is no folder {text}.",
            "The path does not exist, and it is no hub id either.",
            "Check the path.",
        )
    return _cached_snapshot(text, cache)


def _cached_snapshot(hub_id: str, cache: Path | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, cache_dir=cache, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, FileNotFoundError) as error:
        raise ModelError(
            "model.not_found",
            f"There is no folder {hub_id}, and no model of that name in the local hub cache.",
            "llmc reads models that are on this machine and downloads nothing.",
            f"Download it first (`hf download {hub_id}`), or name a model folder.",
        ) from error


def source_name(model: str | Path) -> str:
    """A short name for `model`, the last part of a path or hub id, fit for a file name."""
    text = str(model)
    name = Path(text).expanduser().resolve().name if Path(text).expanduser().exists() else text
    return re.sub(r"[^\w.-]+", "-", name.rsplit("/", 1)[-1]).strip("-") or "model"
